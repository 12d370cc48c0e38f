#include "lacuna/prune/builtin.h"

namespace lacuna::prune {
namespace {

/// Score |W_ij|; kept weights are unchanged. By default the whole layer competes.
class Magnitude final : public Method {
 public:
  std::string_view name() const override { return "magnitude"; }
  bool needs_gram() const override { return false; }
  bool needs_inputs() const override { return false; }
  Group default_group() const override { return Group::kLayer; }

  Result<Pruned> prune(const at::Tensor& weight, const InputStatistics& statistics,
                       const Request& request) const override {
    LACUNA_CHECK(check_request(*this, weight, statistics, request));
    return keep_by_scores(*this, weight, weight.abs(), request);
  }
};

}  // namespace

const Method& magnitude_method() {
  static const Magnitude method;
  return method;
}

}  // namespace lacuna::prune
