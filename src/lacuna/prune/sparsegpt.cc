#include "lacuna/prune/builtin.h"
#include "lacuna/prune/column_loop.h"
#include "lacuna/prune/grid.h"
#include "lacuna/prune/inverse_factor.h"
#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

/// Optimal brain surgeon over the columns from left to right: the error of every dropped weight is
/// spread over the columns to its right. Under a mask that a score chose that is all; without one
/// it scores by w^2 / U_jj^2 (inverse_factor.h) on its way:
/// - unstructured, by default: each stripe of 128 columns drops its share over all rows, chosen
///   from the weights as updated by the stripes before it;
/// - keep:of: each group is chosen when the loop reaches it;
/// - block:RxC: as unstructured, a block's score being the mean of its weights' scores. The mean
///   leaves out how the block's weights depend on each other; the loop then treats them exactly.
/// With group row or layer everything that competes is seen at once: the mask comes from the dense
/// weights, before the loop.
/// With codes a kept weight goes to the nearest value of its grid when its column is reached, and
/// that error is spread like those of dropped ones. Scales are chosen when the loop reaches their
/// group, for the weights as they are then.
/// @paper Frantar and Alistarh, SparseGPT, https://arxiv.org/abs/2301.00774
class SparseGpt final : public Solver {
 public:
  std::string_view name() const override { return "sparsegpt"; }
  Needs needs() const override { return Needs::kGram; }
  std::optional<Group> own_group() const override { return Group::kBlock128; }
  bool changes_weights() const override { return true; }
  bool makes_codes() const override { return true; }
  Status prepare(InputStatistics& statistics, const Request& request) const override {
    return prepare_factor(statistics, request);
  }

  Result<Pruned> solve(const Problem& problem) const override {
    const at::Tensor& weight = problem.weight;
    const Request& request = problem.request;
    const InverseFactor& factor = *problem.statistics.factor;
    Pruned pruned;
    pruned.damping = factor.damping;
    pruned.warnings = factor.warnings;
    pruned.weight = weight.clone(at::MemoryFormat::Contiguous);
    pruned.weight.masked_fill_(factor.dead, 0);  // whatever they were, they add nothing

    const format::Pattern& pattern = request.pattern;
    const bool own = !problem.mask.defined();
    const bool keep_of = own && pattern.kind == format::PatternKind::kKeepOf;
    const bool by_stripe = own && !keep_of && request.group == Group::kBlock128;
    const at::Tensor diagonal = factor.upper.diagonal();
    if (!own)
      pruned.mask = problem.mask.clone();
    else if (keep_of || by_stripe)
      pruned.mask = at::ones(weight.sizes(), weight.options().dtype(at::kBool));
    else
      pruned.mask = select((pruned.weight / diagonal).square(), pattern, request.sparsity,
                           *request.group, request.executor);

    std::optional<Grid> grid;
    if (!request.quantization.none()) grid.emplace(request, weight);

    Share share{request.sparsity};
    const int64_t columns = weight.size(1), step = stripe_columns(pattern);
    for (int64_t first = 0; first < columns; first += step) {
      const int64_t width = std::min(step, columns - first);
      if (by_stripe) {
        const at::Tensor scores =
            (pruned.weight.narrow(1, first, width) / diagonal.narrow(0, first, width)).square();
        pruned.mask.narrow(1, first, width).copy_(select_stripe(scores, pattern, share));
      }
      const Stripe stripe{pruned.weight,
                          pruned.mask,
                          factor.upper,
                          first,
                          width,
                          keep_of ? pattern.keep : 0,
                          keep_of ? pattern.of : 0,
                          grid ? &*grid : nullptr};
      if (!grid) {
        column_loop(stripe, request.executor);
        continue;
      }
      for (const Stripe& part : between_groups(stripe, *grid)) {
        choose_scales(part, own, request, *grid);
        column_loop(part, request.executor);
      }
    }
    if (grid) pruned.grid = std::make_shared<const Grid>(std::move(*grid));
    return pruned;
  }

 private:
  /// A stripe cut where groups of a scale begin, so that each is up to date when its scale is
  /// chosen; whole where that would cut through groups of the pattern.
  static std::vector<Stripe> between_groups(const Stripe& stripe, const Grid& grid) {
    std::vector<Stripe> parts;
    const int64_t end = stripe.first + stripe.width;
    const bool cut = stripe.of == 0 || grid.width() % stripe.of == 0;
    for (Stripe part = stripe; part.first < end; part.first += part.width) {
      const int64_t next = (part.first / grid.width() + 1) * grid.width();
      part.width = (cut ? std::min(end, next) : end) - part.first;
      parts.push_back(part);
    }
    return parts;
  }

  /// Of the groups that begin in a stripe. Where the mask is not known yet, the weights that would
  /// be kept as things stand count.
  static void choose_scales(const Stripe& stripe, bool own, const Request& request, Grid& grid) {
    const at::Tensor diagonal = stripe.upper.diagonal();
    const int64_t columns = stripe.weight.size(1);
    for (int64_t group = (stripe.first + grid.width() - 1) / grid.width();
         group * grid.width() < stripe.first + stripe.width; ++group) {
      const int64_t first = group * grid.width(), width = std::min(grid.width(), columns - first);
      const at::Tensor weight = stripe.weight.narrow(1, first, width);
      const at::Tensor cost = diagonal.narrow(0, first, width).square().reciprocal();
      at::Tensor mask = stripe.mask.narrow(1, first, width);
      const bool known = stripe.of == 0 && (!own || width <= stripe.width);
      if (!known && (stripe.of == 0 || first % stripe.of == 0))
        mask = select(weight.square() * cost, request.pattern, request.sparsity,
                      request.group.value_or(Group::kRow), request.executor);
      grid.choose(group, weight, mask, cost, request.executor);
    }
  }
};

}  // namespace

const Solver& sparsegpt_solver() {
  static const SparseGpt solver;
  return solver;
}

}  // namespace lacuna::prune
