#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// |w dL/dw|: by how much, to first order, the loss of the model moves when this weight alone goes.
/// By default the whole layer competes, since it is a loss.
/// @paper Molchanov et al., Pruning Convolutional Neural Networks for Resource Efficient Inference,
/// https://arxiv.org/abs/1611.06440
class Gradient final : public Score {
 public:
  std::string_view name() const override { return "gradient"; }
  Needs needs() const override { return Needs::kNorms; }
  Slope slope() const override { return Slope::kMean; }
  Group default_group() const override { return Group::kLayer; }
  at::Tensor scores(const Problem& problem) const override {
    return (problem.weight * problem.request.gradient).abs_();
  }
};

}  // namespace

const Score& gradient_score() {
  static const Gradient score;
  return score;
}

}  // namespace lacuna::prune
