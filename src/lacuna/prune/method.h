// What a pruning method is. A method sees one weight matrix and the statistics of its inputs, never
// a model. Adding one is adding a file: define a Method and register it (see magnitude.cc).
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"

namespace lacuna::prune {

/// What competes for being kept.
enum class Group : uint8_t { kRow, kLayer, kBlock128 };
std::string_view group_name(Group group);
Result<Group> parse_group(std::string_view name);

struct InverseFactor;  // inverse_factor.h

/// Statistics of the inputs of one Linear, in float32. Linears with the same input (q, k, v; gate,
/// up) share them.
struct InputStatistics {
  int64_t sequences = 0, tokens = 0;
  /// sum over tokens of x x^T, [in, in]; undefined when the method doesn't need it
  at::Tensor gram;
  at::Tensor square_sums;  ///< sum over tokens of x_j^2, [in]
  /// What Method::prepare() derived from `gram`, once for all Linears with this input.
  std::shared_ptr<const InverseFactor> factor;
};

struct Request {
  format::Pattern pattern = format::Pattern::unstructured();
  double sparsity = 0.5;       ///< share of zeros; follows from the pattern for keep:of
  std::optional<Group> group;  ///< nothing: the method's own
  double damping = 0.01;       ///< relative to the mean of the Gram matrix's diagonal
  Executor executor;  ///< runs the solver's own loops on the CPU; results don't depend on it
};

struct Pruned {
  at::Tensor weight;                  ///< float32 [out, in], zeros where mask is false
  at::Tensor mask;                    ///< bool [out, in], true = kept
  double damping = 0;                 ///< used in the end (0: method has none)
  std::vector<std::string> warnings;  ///< "damping raised to 0.1: Cholesky failed at 0.01", ...
};

class Method {
 public:
  virtual ~Method() = default;
  virtual std::string_view name() const = 0;
  virtual bool needs_gram() const = 0;    ///< InputStatistics::gram must be there
  virtual bool needs_inputs() const = 0;  ///< calibration is needed at all
  virtual Group default_group() const = 0;
  /// Does what all Linears with one input share, into the statistics. prune() does it itself when
  /// this was not called. Calls for different inputs may run at the same time.
  /// @errors as prune()
  virtual Status prepare(InputStatistics& statistics, const Request& request) const;
  /// @param weight float32 [out, in]; not changed
  /// @errors kBadInput: NaN or infinity in weight or statistics; kUsage: a pattern or group that
  /// the method can't do
  virtual Result<Pruned> prune(const at::Tensor& weight, const InputStatistics& statistics,
                               const Request& request) const = 0;
};

/// All methods, in the order of --help. @errors kUsage: unknown name (lists the known ones)
const std::vector<const Method*>& methods();
Result<const Method*> find_method(std::string_view name);

/// |X (W - W')|_F / |X W|_F from the Gram matrix; 0 when both are 0.
/// @determinism the same bits for any executor
double relative_error(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& gram,
                      const Executor& executor = Executor::serial());

}  // namespace lacuna::prune
