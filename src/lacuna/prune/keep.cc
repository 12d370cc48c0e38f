#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// The weights of the mask, unchanged.
class Keep final : public Solver {
 public:
  std::string_view name() const override { return "none"; }
  Needs needs() const override { return Needs::kNothing; }
  std::optional<Group> own_group() const override { return std::nullopt; }
  bool changes_weights() const override { return false; }
  Result<Pruned> solve(const Problem& problem) const override {
    Pruned pruned;
    pruned.mask = problem.mask;
    pruned.weight = problem.weight.masked_fill(problem.mask.logical_not(), 0);
    return pruned;
  }
};

}  // namespace

const Solver& no_solver() {
  static const Keep solver;
  return solver;
}

}  // namespace lacuna::prune
