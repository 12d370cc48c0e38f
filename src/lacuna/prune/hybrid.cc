#include "lacuna/prune/hybrid.h"

#include <algorithm>
#include <cmath>

#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

/// Indices of the columns that stay dense, and of the others, in ascending order.
struct Division {
  at::Tensor dense, others;
};

Division divide(const at::Tensor& weight, const InputStatistics& statistics, int64_t dense) {
  at::Tensor mass = weight.square().sum({0}, false, at::kDouble);
  if (statistics.square_sums.defined()) mass *= statistics.square_sums.to(weight.device());
  const at::Tensor kept = keep_largest(mass.to(at::kFloat).unsqueeze(0), dense).squeeze(0);
  return {kept.nonzero().flatten(), kept.logical_not().nonzero().flatten()};
}

at::Tensor part(const at::Tensor& matrix, const at::Tensor& rows, const at::Tensor& columns) {
  return matrix.index_select(0, rows).index_select(1, columns);
}

/// (G_DD + damping)^-1 G_DR [D, R], in float64.
Result<at::Tensor> regression(const at::Tensor& gram, const Division& division, double damping) {
  at::Tensor system = part(gram, division.dense, division.dense).to(at::kDouble);
  const double mean = gram.diagonal().to(at::kDouble).mean().item<double>();
  system.diagonal().add_(mean > 0 ? damping * mean : 1);
  const auto [factor, info] = at::linalg_cholesky_ex(system);
  if (info.any().item<bool>())
    return check_failed("dense columns: their Gram matrix has no factor. Raise --damping.");
  return at::cholesky_solve(part(gram, division.dense, division.others).to(at::kDouble), factor);
}

/// Statistics of the other columns alone; with `slopes` of what the dense ones leave unexplained.
InputStatistics of_others(const InputStatistics& statistics, const Division& division,
                          const at::Tensor& slopes) {
  InputStatistics others;
  others.sequences = statistics.sequences;
  others.tokens = statistics.tokens;
  const auto take = [&](const at::Tensor& sums) {
    return sums.defined() ? sums.index_select(0, division.others) : sums;
  };
  others.square_sums = take(statistics.square_sums);
  others.sums = take(statistics.sums);
  if (!statistics.gram.defined()) return others;
  others.gram = part(statistics.gram, division.others, division.others);
  if (!slopes.defined()) return others;
  const at::Tensor across = part(statistics.gram, division.others, division.dense).to(at::kDouble);
  others.gram = (others.gram.to(at::kDouble) - at::mm(across, slopes)).to(at::kFloat);
  others.gram = (others.gram + others.gram.t()) / 2;
  return others;
}

}  // namespace

Status check_hybrid(const Request& request) {
  const format::Pattern& rest = request.rest;
  if (rest.kind != format::PatternKind::kKeepOf ||
      request.pattern.kind != format::PatternKind::kUnstructured)
    return usage_error("--pattern: dense columns go with KEEP:OF alone (got {}).", rest.text());
  if (!(request.sparsity <= rest.sparsity() + 1e-9))
    return usage_error("--sparsity: {} with dense columns has {:g} at most (got {}).", rest.text(),
                       rest.sparsity(), request.sparsity);
  if (request.group || request.keep_mask || !request.quantization.none())
    return usage_error(
        "--pattern {}+dense: neither --group nor --quantize. Leave them out, or convert the "
        "finished model by `lacuna convert --quantize`.",
        rest.text());
  return {};
}

int64_t dense_columns(const Request& request, int64_t columns) {
  const auto of = static_cast<int64_t>(request.rest.of);
  const double pruned = static_cast<double>(columns) * request.sparsity / request.rest.sparsity();
  const auto groups = static_cast<int64_t>(std::llround(pruned / static_cast<double>(of)));
  return columns - std::min(columns / of, groups) * of;
}

std::vector<double> hybrid_sparsities(const std::vector<Shape>& shapes, const Request& request) {
  std::vector<double> sparsities;
  double owed = 0;  // zeros
  for (const Shape& shape : shapes) {
    const double weights = static_cast<double>(shape[0]) * static_cast<double>(shape[1]);
    owed += request.sparsity * weights;
    Request one = request;
    one.sparsity = std::clamp(owed / weights, 0.0, request.rest.sparsity());
    const int64_t pruned = shape[1] - dense_columns(one, shape[1]);
    const double reached = static_cast<double>(pruned) / static_cast<double>(shape[1]);
    sparsities.push_back(reached * request.rest.sparsity());
    owed -= sparsities.back() * weights;
  }
  return sparsities;
}

Result<Pruned> prune_hybrid(const Method& method, const at::Tensor& weight,
                            const InputStatistics& statistics, const Request& request) {
  const Division division = divide(weight, statistics, dense_columns(request, weight.size(1)));
  if (division.others.numel() == 0)
    return Pruned{.weight = weight.clone(), .mask = at::ones_like(weight, at::kBool)};
  const bool compensates = method.changes_weights() && division.dense.numel() > 0 &&
                           division.others.numel() > 0 && statistics.gram.defined();
  at::Tensor slopes;
  if (compensates) {
    LACUNA_TRY(slopes, regression(statistics.gram, division, request.damping));
  }
  Request inner = request;
  inner.pattern = request.rest;
  inner.rest = {};
  inner.sparsity = request.rest.sparsity();
  if (request.gradient.defined())
    inner.gradient = request.gradient.index_select(1, division.others);
  const at::Tensor others = weight.index_select(1, division.others);
  LACUNA_TRY(Pruned pruned, method.prune(others, of_others(statistics, division, slopes), inner));
  at::Tensor whole = weight.clone(), mask = at::ones_like(weight, at::kBool);
  if (compensates) {
    const at::Tensor lost = (others - pruned.weight).to(at::kDouble);
    const at::Tensor dense =
        weight.index_select(1, division.dense).to(at::kDouble) + at::mm(lost, slopes.t());
    whole.index_copy_(1, division.dense, dense.to(at::kFloat));
  }
  whole.index_copy_(1, division.others, pruned.weight);
  mask.index_copy_(1, division.others, pruned.mask);
  pruned.weight = whole;
  pruned.mask = mask;
  return pruned;
}

}  // namespace lacuna::prune
