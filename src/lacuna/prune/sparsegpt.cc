#include "lacuna/prune/builtin.h"
#include "lacuna/prune/column_loop.h"
#include "lacuna/prune/inverse_factor.h"
#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

/// Optimal brain surgeon over the columns from left to right: the error of every dropped weight is
/// spread over the columns to its right. Score w^2 / U_jj^2 (inverse_factor.h).
/// - unstructured, by default: each stripe of 128 columns drops its share over all rows, chosen
///   from the weights as updated by the stripes before it;
/// - keep:of: each group is chosen when the loop reaches it;
/// - block:RxC: as unstructured, a block's score being the mean of its weights' scores. The mean
///   leaves out how the block's weights depend on each other; the loop then treats them exactly.
/// With group row or layer everything that competes is seen at once: the mask comes from the dense
/// weights, before the loop.
/// @paper Frantar and Alistarh, SparseGPT, https://arxiv.org/abs/2301.00774
class SparseGpt final : public Method {
 public:
  std::string_view name() const override { return "sparsegpt"; }
  bool needs_gram() const override { return true; }
  bool needs_inputs() const override { return true; }
  Group default_group() const override { return Group::kBlock128; }

  Status prepare(InputStatistics& statistics, const Request& request) const override {
    LACUNA_TRY(InverseFactor factor, inverse_factor(statistics, request.damping, request.executor));
    statistics.factor = std::make_shared<const InverseFactor>(std::move(factor));
    return {};
  }

  Result<Pruned> prune(const at::Tensor& weight, const InputStatistics& statistics,
                       const Request& request) const override {
    LACUNA_CHECK(check_request(*this, weight, statistics, request));
    if (!statistics.factor) {
      InputStatistics prepared = statistics;
      LACUNA_CHECK(prepare(prepared, request));
      return prune_with(weight, *prepared.factor, request);
    }
    return prune_with(weight, *statistics.factor, request);
  }

 private:
  Pruned prune_with(const at::Tensor& weight, const InverseFactor& factor,
                    const Request& request) const {
    Pruned pruned;
    pruned.damping = factor.damping;
    pruned.warnings = factor.warnings;
    pruned.weight = weight.clone(at::MemoryFormat::Contiguous);
    pruned.mask = at::ones(weight.sizes(), weight.options().dtype(at::kBool));
    const format::Pattern& pattern = request.pattern;
    const bool keep_of = pattern.kind == format::PatternKind::kKeepOf;
    if (!keep_of && dropped_of(weight.numel(), request.sparsity) == 0) return pruned;

    pruned.weight.masked_fill_(factor.dead, 0);  // whatever they were, they add nothing
    const at::Tensor diagonal = factor.upper.diagonal();
    const Group group = request.group.value_or(default_group());
    const bool stripe_by_stripe = !keep_of && group == Group::kBlock128;
    if (!keep_of && !stripe_by_stripe)
      pruned.mask = select((pruned.weight / diagonal).square(), pattern, request.sparsity, group);

    Share share{request.sparsity};
    const int64_t columns = weight.size(1), step = stripe_columns(pattern);
    for (int64_t first = 0; first < columns; first += step) {
      const int64_t width = std::min(step, columns - first);
      if (stripe_by_stripe) {
        const at::Tensor scores =
            (pruned.weight.narrow(1, first, width) / diagonal.narrow(0, first, width)).square();
        pruned.mask.narrow(1, first, width).copy_(select_stripe(scores, pattern, share));
      }
      column_loop({pruned.weight, pruned.mask, factor.upper, first, width,
                   keep_of ? pattern.keep : 0, keep_of ? pattern.of : 0},
                  request.executor);
    }
    return pruned;
  }
};

}  // namespace

const Method& sparsegpt_method() {
  static const SparseGpt method;
  return method;
}

}  // namespace lacuna::prune
