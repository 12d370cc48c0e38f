#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// w^2 E[g^2], g the gradient of a sequence's loss: optimal brain damage with the diagonal of the
/// empirical Fisher matrix for that of the Hessian (but for a factor of 2). By default the whole
/// layer competes, since it is a loss.
/// @paper LeCun, Denker and Solla, Optimal Brain Damage, NIPS 1989
class Fisher final : public Score {
 public:
  std::string_view name() const override { return "fisher"; }
  Needs needs() const override { return Needs::kNorms; }
  Slope slope() const override { return Slope::kMeanSquare; }
  Group default_group() const override { return Group::kLayer; }
  at::Tensor scores(const Problem& problem) const override {
    return problem.weight.square().mul_(problem.request.gradient);
  }
};

}  // namespace

const Score& fisher_score() {
  static const Fisher score;
  return score;
}

}  // namespace lacuna::prune
