#include "lacuna/prune/builtin.h"
#include "lacuna/prune/inverse_factor.h"

namespace lacuna::prune {
namespace {

/// w^2 / [H^-1]_jj: by how much the loss of the layer's outputs grows (but for a factor of 2) when
/// this weight alone goes and all others of its row make up for it. By default the whole layer
/// competes, since it is a loss.
/// @paper Hassibi and Stork, Second Order Derivatives for Network Pruning: Optimal Brain Surgeon,
/// NIPS 1992
class Hessian final : public Score {
 public:
  std::string_view name() const override { return "hessian"; }
  Needs needs() const override { return Needs::kGram; }
  Group default_group() const override { return Group::kLayer; }
  Status prepare(InputStatistics& statistics, const Request& request) const override {
    return prepare_factor(statistics, request);
  }
  at::Tensor scores(const Problem& problem) const override {
    // H^-1 = U^T U, so its diagonal is what the squares of U's columns add up to.
    const InverseFactor& factor = *problem.statistics.factor;
    const at::Tensor diagonal = factor.upper.square().sum({0}, false, at::kDouble).to(at::kFloat);
    return (problem.weight.square() / diagonal).masked_fill_(factor.dead, 0);
  }
};

}  // namespace

const Score& hessian_score() {
  static const Hessian score;
  return score;
}

}  // namespace lacuna::prune
