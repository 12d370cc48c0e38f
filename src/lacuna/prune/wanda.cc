#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// Score |W_ij| |X_j|_2; kept weights are unchanged. By default each output row competes alone.
/// @paper Sun et al., A Simple and Effective Pruning Approach for Large Language Models,
/// https://arxiv.org/abs/2306.11695
class Wanda final : public Method {
 public:
  std::string_view name() const override { return "wanda"; }
  bool needs_gram() const override { return false; }
  bool needs_inputs() const override { return true; }
  Group default_group() const override { return Group::kRow; }

  Result<Pruned> prune(const at::Tensor& weight, const InputStatistics& statistics,
                       const Request& request) const override {
    LACUNA_CHECK(check_request(*this, weight, statistics, request));
    const at::Tensor norms = statistics.square_sums.to(weight.device()).sqrt();
    return keep_by_scores(*this, weight, weight.abs() * norms, request);
  }
};

}  // namespace

const Method& wanda_method() {
  static const Wanda method;
  return method;
}

}  // namespace lacuna::prune
