#include <algorithm>

#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

constexpr double kGradientShare = 100;  // the paper's alpha

/// (alpha G_ij + |X_j|_2) |W_ij|: Wanda's score with the gradient of the norm of the block's
/// output, G its root mean square over the sequences, |X_j|_2 the root mean square of a sequence's
/// norm. By default each output row competes alone.
/// @paper Yang et al., Wanda++: Pruning Large Language Models via Regional Gradients,
/// https://arxiv.org/abs/2503.04992
class Regional final : public Score {
 public:
  std::string_view name() const override { return "regional"; }
  Needs needs() const override { return Needs::kNorms; }
  Slope slope() const override { return Slope::kRegional; }
  Group default_group() const override { return Group::kRow; }
  at::Tensor scores(const Problem& problem) const override {
    const InputStatistics& inputs = problem.statistics;
    const auto sequences = static_cast<double>(std::max<int64_t>(1, inputs.sequences));
    const at::Tensor norms = (inputs.square_sums.to(problem.weight.device()) / sequences).sqrt_();
    return (problem.request.gradient * kGradientShare).add_(norms).mul_(problem.weight.abs());
  }
};

}  // namespace

const Score& regional_score() {
  static const Regional score;
  return score;
}

}  // namespace lacuna::prune
