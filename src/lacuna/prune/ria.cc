#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// (|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) |X_j|_2^(1/2): a weight counts by its share of
/// its row and of its column. By default the whole layer competes. The sums are taken in float64,
/// whose rounding doesn't show: their order may depend on the threads.
/// @paper Zhang et al., Plug-and-Play: An Efficient Post-training Pruning Method for Large Language
/// Models, ICLR 2024
class Ria final : public Score {
 public:
  std::string_view name() const override { return "ria"; }
  Needs needs() const override { return Needs::kNorms; }
  Group default_group() const override { return Group::kLayer; }
  at::Tensor scores(const Problem& problem) const override {
    const at::Tensor size = problem.weight.abs();
    // A row or a column of zeros has nothing to share out.
    const auto share = [&](int64_t along) {
      const at::Tensor sums = size.sum({along}, /*keepdim=*/true, at::kDouble).to(at::kFloat);
      return size / sums.masked_fill(sums == 0, 1);
    };
    const at::Tensor norms = problem.statistics.square_sums.to(size.device()).sqrt();
    return share(0).add_(share(1)).mul_(norms.sqrt());
  }
};

}  // namespace

const Score& ria_score() {
  static const Ria score;
  return score;
}

}  // namespace lacuna::prune
