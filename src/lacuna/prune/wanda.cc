#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// |W_ij| |X_j|_2. By default each output row competes alone.
/// @paper Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
/// https://arxiv.org/abs/2306.11695
class Wanda final : public Score {
 public:
  std::string_view name() const override { return "wanda"; }
  Needs needs() const override { return Needs::kNorms; }
  Group default_group() const override { return Group::kRow; }
  at::Tensor scores(const Problem& problem) const override {
    return problem.weight.abs() * problem.statistics.square_sums.to(problem.weight.device()).sqrt();
  }
};

}  // namespace

const Score& wanda_score() {
  static const Wanda score;
  return score;
}

}  // namespace lacuna::prune
