#include <algorithm>
#include <limits>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/damped_gram.h"

namespace lacuna::prune {
namespace {

constexpr double kNever = std::numeric_limits<double>::infinity();
// Swaps that gain less of a row's error than float32 can tell are not made.
constexpr double kLeastGain = 1e-6;
// The weights on either side whose pairs are compared, and swaps of a row at most.
constexpr int64_t kShortList = 16, kMostSwaps = 1000;
constexpr int64_t kMostSweeps = 20;

/// A strip of rows: b = dense weights, v = weights now (v = 0 where nothing is kept), both scaled,
/// and g = (b - v) G.
struct Rows {
  at::Tensor dense, now, kept, gradient, error;  // [R, n], error [R, 1]
};

/// What the error of a row changes by when v_k goes and x comes in at q: first
/// 2 v_k g_k + v_k^2, after which the gradient at q is p = g_q + v_k G_kq, then x^2 - 2 x p.
/// Best is x = p; weights that must stay as they were come back as b_q.
at::Tensor incoming(const at::Tensor& gradient, const at::Tensor& dense, bool resolved) {
  return resolved ? gradient : dense.expand_as(gradient);
}
at::Tensor cost_in(const at::Tensor& x, const at::Tensor& gradient) {
  return x * (x - 2 * gradient);
}
at::Tensor cost_out(const at::Tensor& value, const at::Tensor& gradient) {
  return value * (value + 2 * gradient);
}

/// The best swap of each row among the most promising weights of either side, which are all there
/// are in short rows. @return rows that gained
at::Tensor swap_once(const at::Tensor& unit, Rows& rows, bool resolved) {
  const int64_t n = unit.size(0), list = std::min(kShortList, n);
  const at::Tensor out =
      cost_out(rows.now, rows.gradient).masked_fill_(rows.kept.logical_not(), kNever);
  const at::Tensor in = cost_in(incoming(rows.gradient, rows.dense, resolved), rows.gradient)
                            .masked_fill_(rows.kept, kNever);
  const auto [out_cost, out_at] = at::topk(out, list, 1, /*largest=*/false, /*sorted=*/true);
  const at::Tensor in_at = std::get<1>(at::topk(in, list, 1, /*largest=*/false, /*sorted=*/true));
  const at::Tensor leaving = rows.now.gather(1, out_at).unsqueeze(2);  // [R, list, 1]
  const at::Tensor after = rows.gradient.gather(1, in_at).unsqueeze(1) +
                           leaving * unit.take(out_at.unsqueeze(2) * n + in_at.unsqueeze(1));
  const at::Tensor x = incoming(after, rows.dense.gather(1, in_at).unsqueeze(1), resolved);
  const at::Tensor change =
      (out_cost.unsqueeze(2) + cost_in(x, after))
          .masked_fill_(rows.kept.gather(1, in_at).unsqueeze(1), kNever)  // a row with few dropped
          .flatten(1);
  const at::Tensor best = change.argmin(1, /*keepdim=*/true);
  const at::Tensor gain = change.gather(1, best);
  const at::Tensor better = gain < rows.error * -kLeastGain;

  const at::Tensor k = out_at.gather(1, best.div(list, "floor"));
  const at::Tensor q = in_at.gather(1, best.remainder(list));
  const at::Tensor gone = rows.now.gather(1, k).mul_(better);
  const at::Tensor come = x.flatten(1).gather(1, best);
  const at::Tensor old_q = rows.now.gather(1, q), stays = rows.kept.gather(1, k);
  rows.now.scatter_(1, k, rows.now.gather(1, k).sub_(gone));
  rows.now.scatter_(1, q, at::where(better, come, old_q));
  rows.kept.scatter_(1, k, stays.logical_and(better.logical_not()));
  rows.kept.scatter_(1, q, rows.kept.gather(1, q).logical_or(better));
  rows.gradient.addcmul_(unit.index_select(0, k.flatten()), gone)
      .addcmul_(unit.index_select(0, q.flatten()), at::where(better, come, 0), -1);
  rows.error.add_(at::where(better, gain, 0));
  return better.flatten();
}

/// The best swap of each row within one group of columns. @return whether a row gained
bool swap_in_group(const at::Tensor& unit, Rows& rows, int64_t first, int64_t width,
                   bool resolved) {
  const auto of_group = [&](const at::Tensor& matrix) { return matrix.narrow(1, first, width); };
  const at::Tensor now = of_group(rows.now), kept = of_group(rows.kept);
  const at::Tensor gradient = of_group(rows.gradient);
  const at::Tensor corner = of_group(unit).narrow(0, first, width);
  const at::Tensor after = gradient.unsqueeze(1) + now.unsqueeze(2) * corner;  // [R, k, q]
  const at::Tensor x = incoming(after, of_group(rows.dense).unsqueeze(1), resolved);
  const at::Tensor change = (cost_out(now, gradient).unsqueeze(2) + cost_in(x, after))
                                .masked_fill_(kept.logical_not().unsqueeze(2), kNever)
                                .masked_fill_(kept.unsqueeze(1), kNever)
                                .flatten(1);
  const at::Tensor best = change.argmin(1, /*keepdim=*/true);
  const at::Tensor gain = change.gather(1, best);
  const at::Tensor better = gain < rows.error * -kLeastGain;
  if (!better.any().item<bool>()) return false;

  const at::Tensor k = best.div(width, "floor"), q = best.remainder(width);
  const at::Tensor before = now.clone();
  now.scatter_(1, k, at::where(better, 0, now.gather(1, k)));
  now.scatter_(1, q, at::where(better, x.flatten(1).gather(1, best), now.gather(1, q)));
  kept.scatter_(1, k, kept.gather(1, k).logical_and(better.logical_not()));
  kept.scatter_(1, q, kept.gather(1, q).logical_or(better));
  rows.gradient.addmm_(before - now, unit.narrow(0, first, width));
  rows.error.add_(at::where(better, gain, 0));
  return true;
}

void swap_in_rows(const at::Tensor& unit, Rows& rows, bool resolved) {
  at::Tensor active;  // rows that gained by their last swap; undefined: all
  for (int64_t swap = 0; swap < kMostSwaps; ++swap) {
    if (!active.defined()) {
      const at::Tensor gained = swap_once(unit, rows, resolved);
      active = gained.nonzero().flatten();
    } else {
      Rows some{rows.dense.index_select(0, active), rows.now.index_select(0, active),
                rows.kept.index_select(0, active), rows.gradient.index_select(0, active),
                rows.error.index_select(0, active)};
      const at::Tensor gained = swap_once(unit, some, resolved);
      rows.now.index_copy_(0, active, some.now);
      rows.kept.index_copy_(0, active, some.kept);
      rows.gradient.index_copy_(0, active, some.gradient);
      rows.error.index_copy_(0, active, some.error);
      active = active.masked_select(gained);
    }
    if (active.numel() == 0) return;
  }
}

void swap_in_groups(const at::Tensor& unit, Rows& rows, int64_t of, bool resolved) {
  const int64_t columns = unit.size(0);
  for (int64_t sweep = 0; sweep < kMostSweeps; ++sweep) {
    bool any = false;
    for (int64_t first = 0; first < columns; first += of)
      any |= swap_in_group(unit, rows, first, std::min(of, columns - first), resolved);
    if (!any) return;
  }
}

/// Exchanges a kept weight for a dropped one of the same row (keep:of: of the same group) as long
/// as that lowers the damped error of the outputs, the best pair first. Weights that a solver has
/// changed are followed by the best value for the one that comes in; others keep their values.
/// In rows of more than 16 kept or dropped weights pairs are looked for among the 16 most
/// promising ones of either side.
/// @paper Zimmer et al., SparseSwaps, https://arxiv.org/abs/2512.10922 (the idea; the formulas are
/// derived above)
class Swaps final : public Refinement {
 public:
  std::string_view name() const override { return "swaps"; }
  Needs needs() const override { return Needs::kGram; }
  bool never_raises_the_damped_error() const override { return true; }
  bool takes_changed_weights() const override { return true; }
  Status prepare(InputStatistics& statistics, const Request& request) const override {
    return prepare_damped(statistics, request);
  }

  Status refine(const Problem& problem, bool resolved, Pruned& pruned) const override {
    const format::Pattern& pattern = problem.request.pattern;
    if (pattern.kind == format::PatternKind::kBlock)
      return usage_error("--refine swaps: can't do {} (need unstructured or KEEP:OF).",
                         pattern.text());
    const DampedGram& gram = *problem.statistics.damped;
    const at::Tensor weight = pruned.weight.clone(), mask = pruned.mask.clone();
    row_strips(weight, problem.request.executor, [&](int64_t first, int64_t count) {
      const auto strip = [&](const at::Tensor& matrix) { return matrix.narrow(0, first, count); };
      const at::Tensor dense = gram.scaled(strip(problem.weight));
      Rows rows{dense, gram.scaled(strip(weight)), strip(mask).clone(), {}, {}};
      const auto error = [&] {
        const at::Tensor distance = dense - rows.now;
        rows.gradient = at::mm(distance, gram.unit);
        return (distance * rows.gradient).sum({1}, /*keepdim=*/true);
      };
      const at::Tensor before = error();
      rows.error = before.clone();
      if (pattern.kind == format::PatternKind::kKeepOf)
        swap_in_groups(gram.unit, rows, pattern.of, resolved);
      else
        swap_in_rows(gram.unit, rows, resolved);
      // Sums of float32 changes drift: a row that did not gain after all stays as it was. Values
      // that did not move keep their bits.
      const at::Tensor good = error() < before;
      const at::Tensor moved = rows.kept != strip(mask);
      const at::Tensor values =
          resolved ? gram.weight(rows.now, rows.kept) : strip(problem.weight) * rows.kept;
      strip(weight).copy_(at::where(good.logical_and(moved), values, strip(weight)));
      strip(mask).copy_(at::where(good, rows.kept, strip(mask)));
    });
    pruned.weight = weight.masked_fill_(mask.logical_not(), 0);
    pruned.mask = mask;
    return {};
  }
};

}  // namespace

const Refinement& swaps_refinement() {
  static const Swaps refinement;
  return refinement;
}

}  // namespace lacuna::prune
