// How many weights each layer gives up, so that all of them together meet a budget.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// Who gives up more than the others.
enum class Allocation : uint8_t {
  kUniform,  ///< nobody
  kOwl,      ///< blocks with fewer outliers among Wanda's scores
  kError,    ///< blocks whose outputs suffer more where each layer drops half of its weights
  kCurves,   ///< whoever makes a weighted sum of all layers' squared relative errors least
};
std::string_view allocation_name(Allocation allocation);
std::vector<std::string> allocation_names();
Result<Allocation> parse_allocation(std::string_view name);

/// What the pruned model must be, in all.
struct Budget {
  enum class Kind : uint8_t {
    kSparsity,      ///< share of zeros over the weights that are pruned
    kBytes,         ///< of the finished model's safetensors files
    kMilliseconds,  ///< a token of one sequence takes in the Linears, as predicted
  };
  Kind kind = Kind::kSparsity;
  double amount = 0;
  /// Reads "sparsity=0.6", "bytes=2.1GB" (B, kB, MB, GB: decimal; KiB, MiB, GiB) or "tpot=12.5ms"
  /// (ms or us). @errors kUsage
  static Result<Budget> parse(std::string_view text);
  std::string text() const;           ///< that parse() reads
  std::string told(double of) const;  ///< an amount of this kind, for people: "2.10 GB"
};

struct AllocationOptions {
  Allocation by = Allocation::kUniform;
  std::optional<Budget> budget;  ///< nothing: Request::sparsity of the pruned weights
  double owl_multiple = 5;       ///< a score is an outlier above this many times the block's mean
  double owl_lambda = 0.08;      ///< sparsities lie within S -+ lambda: OWL's defaults
  double error_width = 0.1;      ///< the same of kError
  /// Of Budget::Kind::kMilliseconds: what a token takes in a layer at a sparsity; without it such a
  /// budget is refused. @errors why it can't be told
  std::function<Result<double>(const std::string& weight, double sparsity)> milliseconds;
  double other_milliseconds = 0;  ///< of what isn't pruned

  /// All layers get the sparsity of the request: nothing is to be done.
  bool none() const { return by == Allocation::kUniform && !budget; }
  bool needs_inputs() const { return by != Allocation::kUniform; }
};

/// A weight that takes part, and what was measured of it.
struct LayerShare {
  std::string name;
  int64_t block = 0, rows = 0, columns = 0;
  int64_t step = 1;       ///< weights that go at a time: one of every row where rows compete
  double outliers = 0;    ///< kOwl: of its block, percent
  double half_error = 0;  ///< kError: relative, with half of the weights dropped
  std::vector<double> squared_errors;  ///< kCurves: relative, at kCurveSparsities

  int64_t weights() const { return rows * columns; }
};

/// Where curves are measured. Between them an error is a power of the sparsity.
inline constexpr double kCurveSparsities[] = {0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95};

/// Measures what an allocation needs of the layers of one block.
/// @param shares   of one block; filled in
/// @param weights  float32 [out, in], in the order of `shares`
/// @param inputs   statistics of their inputs, in the same order
/// @cost kOwl: two passes over the scores; kCurves: out * in^2 multiply-adds a point, of which
/// kError has one
/// @determinism the same bits for any executor
void measure(std::vector<LayerShare>& shares, const std::vector<at::Tensor>& weights,
             const std::vector<const InputStatistics*>& inputs, const AllocationOptions& options,
             const Request& request);

/// ||X(W - W')||^2 / ||XW||^2 of a layer that drops this share, from the points that were measured.
double squared_error_at(const LayerShare& share, double sparsity);

/// What a layer costs at a sparsity: falls as the sparsity rises.
using LayerCost = std::function<double(size_t layer, double sparsity)>;

/// Sparsities by layer, in whole steps of each, whose costs add up to the most that `target`
/// allows: what is left would not pay for one more step of any layer that still has one to give
/// back.
/// - uniform: one sparsity;
/// - owl: blocks' outlier shares, mapped to S -+ lambda around their mean;
/// - error: likewise with the blocks' mean errors, those with the least spared most;
/// - curves: the lower convex hull of every layer's (cost, error), whose edges are taken in the
///   order of the error that they add for what they save, the last one in part; errors weigh by
///   the layers' sizes.
/// @paper Yin et al., Outlier Weighed Layerwise Sparsity (OWL), https://arxiv.org/abs/2310.05175
/// @errors kUsage: no sparsity meets the target, or all are dense already (both ends are named)
Result<std::vector<double>> allocate(const std::vector<LayerShare>& shares,
                                     const AllocationOptions& options, const LayerCost& cost,
                                     double target);

}  // namespace lacuna::prune
