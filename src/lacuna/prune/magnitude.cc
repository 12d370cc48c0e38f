#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// |W_ij|. By default the whole layer competes.
class Magnitude final : public Score {
 public:
  std::string_view name() const override { return "magnitude"; }
  Needs needs() const override { return Needs::kNothing; }
  Group default_group() const override { return Group::kLayer; }
  at::Tensor scores(const Problem& problem) const override { return problem.weight.abs(); }
};

}  // namespace

const Score& magnitude_score() {
  static const Magnitude score;
  return score;
}

}  // namespace lacuna::prune
