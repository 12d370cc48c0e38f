// What a pruning method is: a score that ranks weights, a solver that makes good what the dropped
// ones did, and refinements of the result (stages.h). A method sees one weight matrix and the
// statistics of its inputs, never a model.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/dtype.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"
#include "lacuna/format/quantization.h"

namespace lacuna::prune {

/// What competes for being kept.
enum class Group : uint8_t { kRow, kLayer, kBlock128 };
std::string_view group_name(Group group);
Result<Group> parse_group(std::string_view name);

/// What a score wants of a weight's gradients over the calibration sequences (gradients.h).
enum class Slope : uint8_t {
  kNone,
  kMean,        ///< the mean of the gradient of a sequence's loss
  kMeanSquare,  ///< the mean of its square: the diagonal of the empirical Fisher matrix
  kRegional     ///< root mean square of the gradient of |output of the block|_2
};

struct InverseFactor;  // inverse_factor.h
struct DampedGram;     // damped_gram.h
class Spectrum;        // spectrum.h
class Grid;            // grid.h

/// Statistics of the inputs of one Linear, in float32. Linears with the same input (q, k, v; gate,
/// up) share them.
struct InputStatistics {
  int64_t sequences = 0, tokens = 0;
  /// sum over tokens of x x^T, [in, in]; undefined when the method doesn't need it
  at::Tensor gram;
  at::Tensor square_sums;  ///< sum over tokens of x_j^2, [in]
  at::Tensor sums;         ///< sum over tokens of x_j, [in]
  /// What Method::prepare() derived from `gram`, once for all Linears with this input.
  std::shared_ptr<const InverseFactor> factor;
  std::shared_ptr<const DampedGram> damped;
  std::shared_ptr<const Spectrum> spectrum;
};

/// How kept weights become codes.
enum class Coding : uint8_t {
  kGptq,  ///< errors spread over what is left, then descent (coding.h)
  kAwq    ///< ranges by the energy of the inputs, then the nearest code
};
std::string_view coding_name(Coding coding);
Result<Coding> parse_coding(std::string_view name);

struct Request {
  format::Pattern pattern = format::Pattern::unstructured();
  double sparsity = 0.5;  ///< share of zeros; follows from the pattern for keep:of
  format::Pattern rest;  ///< keep:of of the columns that don't stay dense (hybrid.h); none: no such
                         ///< division
  std::optional<Group> group;         ///< nothing: the method's own
  double damping = 0.01;              ///< relative to the mean of the Gram matrix's diagonal
  format::Quantization quantization;  ///< kept weights become codes of it, if it is one
  Coding coding = Coding::kGptq;
  DType values = DType::kF32;  ///< of the weight in the file; bounds the scales of codes
  bool keep_mask = false;      ///< codes alone, on the non-zeros that are there
  at::Tensor gradient;         ///< float32 [out, in], as Method::slope() asks for it
  /// Products that steer a search may be rounded (rounded_products.h): the model itself is held in
  /// 16 bits, and on a GPU.
  bool rounded_products = false;
  Executor coder;     ///< runs what makes codes, which is on the CPU wherever the weight is
  Executor executor;  ///< runs the solver's own loops on the CPU; results don't depend on it
};

struct Pruned {
  at::Tensor weight;  ///< float32 [out, in], zeros where mask is false
  at::Tensor mask;    ///< bool [out, in], true = kept
  /// With codes: kept weights are values of it, and may be 0. All is on the CPU then.
  std::shared_ptr<const Grid> grid;
  double damping = 0;                 ///< used in the end (0: method has none)
  int64_t iterations = 0;             ///< of a solver that iterates
  bool fell_back = false;             ///< the solver took its second choice; a warning says why
  std::vector<std::string> warnings;  ///< "damping raised to 0.1: Cholesky failed at 0.01", ...
};

class Score;
class Solver;
class Refinement;
struct Problem;

/// A method as a person names it: a usual combination, stages spelled out, or stages that replace
/// those of the combination. Empty means: of the combination, or without one: the solver's own
/// score, no solver, no refinement.
struct MethodChoice {
  std::string method, score, solve;
  std::vector<std::string> refine;  ///< one after the other
  bool codes = false;               ///< Request::quantization will ask for some
};

/// A combination of stages.
class Method {
 public:
  /// @param score  null: the solver chooses
  Method(std::string name, const Score* score, const Solver& solver,
         std::vector<const Refinement*> refinements = {});
  /// "wanda", or of a combination without a name: "score=wanda solve=alps refine=swaps"
  std::string_view name() const { return name_; }
  std::string_view about() const { return about_; }  ///< one line for people
  bool needs_gram() const;                           ///< InputStatistics::gram must be there
  bool needs_inputs() const;                         ///< calibration is needed at all
  bool changes_weights() const;                      ///< the solver does, kept ones too
  Slope slope() const;                               ///< what Request::gradient must hold
  Group default_group() const;
  /// As Stage::working_bytes(), of whichever stage takes most.
  uint64_t working_bytes(uint64_t weights, uint64_t squared) const;
  /// Does what all Linears with one input share, into the statistics. prune() does it itself when
  /// this was not called. Not to be called inside a parallel region.
  /// @errors as prune()
  Status prepare(InputStatistics& statistics, const Request& request) const;
  /// Shapes, types, finite values, a sparsity in [0, 1], statistics where a stage needs them, a
  /// group only where the pattern leaves a choice. Messages begin with what is wrong ("weight",
  /// "inputs"); the caller puts the layer's name before it. @errors kBadInput, kUsage
  Status check(const at::Tensor& weight, const InputStatistics& statistics,
               const Request& request) const;
  /// Score, solve, refine, and make codes where they are asked for (coding.h). A refinement that
  /// says so never raises the damped error (damped_gram.h): that is checked every time.
  /// @param weight float32 [out, in]; not changed
  /// @errors as check(); kUsage: a pattern that a stage can't do; kCheckFailed: no factor of the
  /// Hessian, a refinement that broke its promise
  Result<Pruned> prune(const at::Tensor& weight, const InputStatistics& statistics,
                       const Request& request) const;

 private:
  friend Result<Method> compose(const MethodChoice& choice);
  Result<Pruned> run_stages(Problem problem) const;

  std::string name_, about_;
  const Score* score_;
  const Solver* solver_;
  std::vector<const Refinement*> refinements_;
  bool codes_ = false;
};

/// Whether a request's pattern, sparsity and group go together. @errors kUsage
Status check_pattern(const Request& request);

/// Combinations with a name, in the order of --help. @errors kUsage: unknown name (lists the known
/// ones)
const std::vector<const Method*>& methods();
Result<const Method*> find_method(std::string_view name);

/// @errors kUsage: an unknown name of a method or stage (lists the known ones), a solver that can't
/// choose without a score, a refinement that doesn't go with the solver
Result<Method> compose(const MethodChoice& choice);
/// Names of all stages of a kind, in the order of --help.
std::vector<std::string> score_names();
std::vector<std::string> solver_names();
std::vector<std::string> refinement_names();

/// |X (W - W')|_F / |X W|_F from the Gram matrix; 0 when both are 0.
/// @determinism the same bits for any executor
double relative_error(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& gram,
                      const Executor& executor = Executor::serial());

}  // namespace lacuna::prune
