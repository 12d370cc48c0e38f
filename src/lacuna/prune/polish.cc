#include "lacuna/prune/builtin.h"
#include "lacuna/prune/damped_gram.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kSteps = 100;
constexpr double kTolerance = 1e-4;

/// The kept weights as conjugate gradients leave them, on the mask as it is: the cheap form of
/// exact least squares.
class Polish final : public Refinement {
 public:
  std::string_view name() const override { return "polish"; }
  Needs needs() const override { return Needs::kGram; }
  bool never_raises_the_damped_error() const override { return true; }
  bool takes_changed_weights() const override { return true; }
  Status prepare(InputStatistics& statistics, const Request& request) const override {
    return prepare_damped(statistics, request);
  }
  Status refine(const Problem& problem, bool, Pruned& pruned) const override {
    const DampedGram& gram = *problem.statistics.damped;
    const at::Tensor scaled = gram.scaled(pruned.weight).contiguous();
    conjugate_gradients(gram, gram.scaled(problem.weight), pruned.mask, scaled, kSteps, kTolerance,
                        problem.request.executor);
    pruned.weight = gram.weight(scaled, pruned.mask);
    return {};
  }
};

}  // namespace

const Refinement& polish_refinement() {
  static const Polish refinement;
  return refinement;
}

}  // namespace lacuna::prune
