#include <algorithm>
#include <optional>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/damped_gram.h"
#include "lacuna/prune/one_thread.h"

namespace lacuna::prune {
namespace {

// What the systems of the rows that are solved together may take.
constexpr int64_t kSystemBytes = int64_t{16} << 20;

/// Solves G_kk x = b_k for the kept columns k of each row. Rows with fewer of them than the fullest
/// get equations x = 0 on top.
/// @param target  B0 G, scaled @return x in its columns, zeros elsewhere; and whether each row has
/// a solution
std::pair<at::Tensor, at::Tensor> solve_rows(const at::Tensor& unit, const at::Tensor& target,
                                             const at::Tensor& mask) {
  const at::Tensor counts = mask.sum({1}, /*keepdim=*/true);
  const int64_t most = counts.max().item<int64_t>();
  const at::Tensor columns = std::get<1>(at::sort(mask.to(at::kByte), /*stable=*/true, /*dim=*/1,
                                                  /*descending=*/true))
                                 .narrow(1, 0, most);
  const at::Tensor real = at::arange(most, counts.options()) < counts;
  const at::Tensor both = real.unsqueeze(2).logical_and(real.unsqueeze(1));
  at::Tensor systems =
      unit.take(columns.unsqueeze(2) * unit.size(1) + columns.unsqueeze(1)).mul_(both);
  systems.diagonal(0, 1, 2).fill_(1);
  const at::Tensor right = target.gather(1, columns).mul_(real).unsqueeze(2);
  const auto [factor, info] = at::linalg_cholesky_ex(systems);
  const at::Tensor solved = at::cholesky_solve(right, factor).squeeze(2).mul_(real);
  // Columns that a row does not keep stand behind those it does, so nothing is written twice.
  at::Tensor weights = at::zeros_like(target);
  weights.scatter_(1, columns, solved);
  const at::Tensor good = (info == 0).logical_and(solved.isfinite().all(1));
  return {weights, good.unsqueeze(1)};
}

/// Exact least squares of the damped outputs on the mask that a score chose: a Cholesky
/// factorisation for every row.
/// @cost out * kept^3 / 3 multiply-adds, kept = those of a row; on one thread of a CPU
class Exact final : public Solver {
 public:
  std::string_view name() const override { return "exact"; }
  Needs needs() const override { return Needs::kGram; }
  std::optional<Group> own_group() const override { return std::nullopt; }
  bool changes_weights() const override { return true; }
  Status prepare(InputStatistics& statistics, const Request& request) const override {
    return prepare_damped(statistics, request);
  }

  /// Scaled weights, targets, results; systems and their factors.
  uint64_t working_bytes(uint64_t weights, uint64_t squared) const override {
    return 3 * 4 * weights + 4 * squared + 16 * kSystemBytes;
  }

  Result<Pruned> solve(const Problem& problem) const override {
    const DampedGram& gram = *problem.statistics.damped;
    const Executor& executor = problem.request.executor;
    const at::Tensor dense = gram.scaled(problem.weight).contiguous();
    const at::Tensor target = times_gram(dense, gram, executor);
    const at::Tensor& mask = problem.mask;
    at::Tensor scaled = at::empty_like(dense),
               solved = at::empty({dense.size(0), 1}, mask.options());
    const int64_t most = std::max<int64_t>(1, mask.sum({1}).max().item<int64_t>());
    const int64_t height = std::max<int64_t>(1, kSystemBytes / (4 * most * most));
    const int64_t rows = dense.size(0);
    std::optional<OneThread> alone;
    if (dense.is_cpu()) alone.emplace();
    for (int64_t first = 0; first < rows; first += height) {
      const int64_t count = std::min(height, rows - first);
      const at::Tensor kept = mask.narrow(0, first, count);
      const auto [weights, good] = solve_rows(gram.unit, target.narrow(0, first, count), kept);
      // A row without a solution keeps the weights it had.
      scaled.narrow(0, first, count).copy_(at::where(good, weights, dense.narrow(0, first, count)));
      solved.narrow(0, first, count).copy_(good);
    }
    alone.reset();
    Pruned pruned;
    pruned.mask = mask;
    pruned.weight = gram.weight(scaled, mask);
    pruned.damping = gram.damping;
    pruned.warnings = gram.warnings;
    if (const int64_t failed = solved.logical_not().sum().item<int64_t>(); failed > 0) {
      pruned.fell_back = true;
      pruned.warnings.push_back(fmt::format(
          "exact: the equations of {} of {} rows can't be solved; they keep their weights", failed,
          rows));
    }
    return pruned;
  }
};

}  // namespace

const Solver& exact_solver() {
  static const Exact solver;
  return solver;
}

}  // namespace lacuna::prune
