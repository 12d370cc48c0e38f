#include "lacuna/prune/coding.h"

#include <algorithm>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/damped_gram.h"
#include "lacuna/prune/grid.h"
#include "lacuna/prune/inverse_factor.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kMostSweeps = 12;

/// A sweep over one row. With v = norms * weight, the error's gradient is g = (b - v) G, and G has
/// a unit diagonal: the best v_j is v_j + g_j, and a change d of it costs d (d - 2 g_j).
/// @return weights that changed
int64_t sweep_row(const Grid& grid, int64_t row, const DampedGram& gram, const bool* kept,
                  float* weight, float* gradient) {
  const int64_t n = gram.norms.numel();
  const float* norms = gram.norms.const_data_ptr<float>();
  const float* unit = gram.unit.const_data_ptr<float>();
  int64_t changed = 0;
  for (int64_t j = 0; j < n; ++j) {
    if (!kept[j]) continue;
    const float better = grid.nearest(row, j, weight[j] + gradient[j] / norms[j]);
    const float change = (better - weight[j]) * norms[j];
    if (!(change * (change - 2 * gradient[j]) < 0)) continue;
    weight[j] = better;
    ++changed;
    const float* __restrict of = unit + j * n;
    for (int64_t k = 0; k < n; ++k) gradient[k] -= change * of[k];
  }
  return changed;
}

void descend_rows(const Grid& grid, const DampedGram& gram, const at::Tensor& mask,
                  const at::Tensor& weight, const at::Tensor& gradient, const Executor& executor) {
  const int64_t n = weight.size(1);
  const bool* kept = mask.const_data_ptr<bool>();
  float* w = weight.mutable_data_ptr<float>();
  float* g = gradient.mutable_data_ptr<float>();
  row_strips(weight, executor, [&](int64_t first, int64_t count) {
    for (int64_t row = first; row < first + count; ++row)
      for (int64_t sweep = 0; sweep < kMostSweeps; ++sweep)
        if (sweep_row(grid, row, gram, kept + row * n, w + row * n, g + row * n) == 0) break;
  });
}

/// Coding::kAwq.
void round_to_nearest(const Problem& problem, Pruned& pruned) {
  const at::Tensor& weight = pruned.weight;
  const at::Tensor energy = problem.statistics.damped->norms.square();
  Grid grid(problem.request, weight);
  const at::Tensor rounded = at::zeros_like(weight, at::MemoryFormat::Contiguous);
  for (int64_t first = 0; first < weight.size(1); first += grid.width()) {
    const int64_t width = std::min(grid.width(), weight.size(1) - first);
    grid.choose(first / grid.width(), weight.narrow(1, first, width),
                pruned.mask.narrow(1, first, width), energy.narrow(0, first, width),
                problem.request.executor);
    for (int64_t j = first; j < first + width; ++j)
      rounded.select(1, j).copy_(grid.nearest(j, weight.select(1, j)));
  }
  pruned.weight = rounded.masked_fill_(pruned.mask.logical_not(), 0);
  pruned.grid = std::make_shared<const Grid>(std::move(grid));
}

}  // namespace

InputStatistics on_cpu(const InputStatistics& statistics) {
  InputStatistics here = statistics;
  for (at::Tensor* each : {&here.square_sums, &here.sums})
    if (each->defined()) *each = each->cpu();
  if (here.damped) {
    DampedGram damped = *here.damped;
    damped.unit = damped.unit.cpu();
    damped.norms = damped.norms.cpu();
    here.damped = std::make_shared<const DampedGram>(std::move(damped));
  }
  if (here.factor) {
    InverseFactor factor = *here.factor;
    factor.upper = factor.upper.cpu();
    factor.dead = factor.dead.cpu();
    here.factor = std::make_shared<const InverseFactor>(std::move(factor));
  }
  return here;
}

Status prepare_coding(InputStatistics& statistics, const Request& request) {
  LACUNA_CHECK(prepare_factor(statistics, request));
  return prepare_damped(statistics, request);
}

uint64_t coding_bytes(uint64_t weights, uint64_t squared) {
  return 3 * 4 * weights + 2 * 4 * squared;
}

std::pair<double, double> descend(const Problem& problem, Pruned& pruned) {
  const DampedGram& gram = *problem.statistics.damped;
  const Executor& executor = problem.request.executor;
  const auto error = [&] { return damped_error(problem.weight, pruned.weight, gram, executor); };
  const double before = error();
  const at::Tensor gradient =
      times_gram(gram.scaled(problem.weight - pruned.weight).contiguous(), gram, executor);
  pruned.weight = pruned.weight.contiguous();
  descend_rows(*pruned.grid, gram, pruned.mask.contiguous(), pruned.weight, gradient, executor);
  return {before, error()};
}

Status make_codes(const Problem& problem, Pruned& pruned) {
  if (problem.request.coding == Coding::kAwq) {
    round_to_nearest(problem, pruned);
    return {};
  }
  if (!pruned.grid) {
    LACUNA_TRY(Pruned coded, sparsegpt_solver().solve({pruned.weight, problem.statistics,
                                                       problem.request, pruned.mask}));
    pruned.weight = coded.weight;
    pruned.grid = coded.grid;
    for (const std::string& warning : coded.warnings)  // of its factor, unless they were said
      if (std::ranges::find(pruned.warnings, warning) == pruned.warnings.end())
        pruned.warnings.push_back(warning);
  }
  const auto [before, after] = descend(problem, pruned);
  constexpr double kRounding = 1e-5;  // what float32 products may add
  if (after <= before * (1 + kRounding)) return {};
  return check_failed(
      "codes: their descent raised the damped error of the outputs (from {:g} to {:g}). This is a "
      "fault of the program; report it.",
      before, after);
}

}  // namespace lacuna::prune
