// The stages that a method is made of. Adding one is adding a file: define it and name it in
// builtin.h and method.cc (see magnitude.cc, exact.cc, swaps.cc).
#pragma once

#include <optional>
#include <string_view>

#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// What a stage reads of the inputs' statistics.
enum class Needs : uint8_t { kNothing, kNorms, kGram };

class Stage {
 public:
  virtual ~Stage() = default;
  virtual std::string_view name() const = 0;
  virtual Needs needs() const = 0;
  /// Fills in what it derives from the Gram matrix, unless another stage did already.
  virtual Status prepare(InputStatistics& statistics, const Request& request) const;
  /// Bytes at work beyond six float32 copies of the weight and two of the Gram matrix.
  /// @param weights  of the largest matrix @param squared  elements of its Gram matrix
  virtual uint64_t working_bytes(uint64_t weights, uint64_t squared) const;
};

/// One matrix under work; statistics are prepared, the request's group is set unless the pattern
/// has its own.
struct Problem {
  const at::Tensor& weight;  ///< float32 [out, in], dense
  const InputStatistics& statistics;
  const Request& request;
  at::Tensor mask;  ///< bool [out, in] that a score chose; undefined: the solver chooses
};

/// Ranks weights; the largest stay.
class Score : public Stage {
 public:
  virtual Group default_group() const = 0;
  virtual Slope slope() const { return Slope::kNone; }
  /// @param problem  without a mask
  /// @return float32 [out, in], finite and not negative
  virtual at::Tensor scores(const Problem& problem) const = 0;
};

/// Makes weights under a mask.
class Solver : public Stage {
 public:
  /// What competes when it chooses for itself; nothing: it needs a score.
  virtual std::optional<Group> own_group() const = 0;
  virtual bool changes_weights() const = 0;  ///< kept ones too
  /// Puts kept weights on the grid of Request::quantization itself; others leave it alone.
  virtual bool makes_codes() const { return false; }
  virtual Result<Pruned> solve(const Problem& problem) const = 0;
};

/// Makes a result better, keeping its pattern and its count of zeros.
class Refinement : public Stage {
 public:
  virtual bool never_raises_the_damped_error() const = 0;
  virtual bool takes_changed_weights() const = 0;
  /// @param resolved  the solver has changed kept weights, so it may do so too
  virtual Status refine(const Problem& problem, bool resolved, Pruned& pruned) const = 0;
};

}  // namespace lacuna::prune
