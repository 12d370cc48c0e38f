#include "lacuna/prune/inverse_factor.h"

#include <algorithm>

#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

constexpr double kMostDamping = 10;

// Matrices are cut into tiles of this many rows and columns. LAPACK's own Cholesky chooses its
// blocks by the number of threads, and the bits change with it; up to this size it has but one.
constexpr int64_t kTile = 128;

// Up to this size a GPU inverts a triangle by substitution.
constexpr int64_t kGpuTile = 512;

/// cuSOLVER's bits don't change from run to run, so a GPU factors the whole at once.
bool cholesky_on_gpu(const at::Tensor& matrix) {
  const auto [factor, info] = at::linalg_cholesky_ex(matrix);
  if (info.item<int>() != 0 || !factor.diagonal().isfinite().all().item<bool>()) return false;
  matrix.copy_(factor);
  return true;
}

/// Replaces a lower triangular matrix by its inverse: halves, joined by products, which a GPU does
/// far better than substitutions. [A 0; B C]^-1 = [A^-1 0; -C^-1 B A^-1 C^-1]
void invert_lower_on_gpu(const at::Tensor& lower) {
  const int64_t n = lower.size(0);
  if (n <= kGpuTile) {
    lower.copy_(at::linalg_solve_triangular(lower, at::eye(n, lower.options()), /*upper=*/false));
    return;
  }
  const int64_t half = (n / 2 + kTile - 1) / kTile * kTile, rest = n - half;
  const at::Tensor a = lower.narrow(0, 0, half).narrow(1, 0, half);
  const at::Tensor b = lower.narrow(0, half, rest).narrow(1, 0, half);
  const at::Tensor c = lower.narrow(0, half, rest).narrow(1, half, rest);
  invert_lower_on_gpu(a);
  invert_lower_on_gpu(c);
  const at::Tensor right = at::mm(b, a);
  b.addmm_(c, right, /*beta=*/0, /*alpha=*/-1);
}

/// Replaces the lower triangle of a symmetric matrix by its Cholesky factor and clears the upper;
/// false when there is none.
bool cholesky_in_place(const at::Tensor& matrix, const Executor& executor) {
  if (!matrix.is_cpu()) return cholesky_on_gpu(matrix);
  const int64_t n = matrix.size(0);
  for (int64_t k = 0; k < n; k += kTile) {
    const int64_t width = std::min(kTile, n - k), rest = n - k - width;
    const at::Tensor corner = matrix.narrow(0, k, width).narrow(1, k, width);
    const auto [factor, info] = at::linalg_cholesky_ex(corner);
    if (info.item<int>() != 0 || !factor.diagonal().isfinite().all().item<bool>()) return false;
    corner.copy_(factor);
    matrix.narrow(0, k, width).narrow(1, k + width, rest).zero_();
    const int64_t tiles = (rest + kTile - 1) / kTile;
    const at::Tensor panel = matrix.narrow(0, k + width, rest).narrow(1, k, width);
    parallel_chunks(executor, tiles, [&](int64_t i) {
      const at::Tensor rows = panel.narrow(0, i * kTile, std::min(kTile, rest - i * kTile));
      rows.copy_(at::linalg_solve_triangular(factor.t(), rows, /*upper=*/true, /*left=*/false));
    });
    parallel_chunks(executor, tiles, [&](int64_t j) {  // the lower triangle of what is left
      const int64_t from = j * kTile, across = std::min(kTile, rest - from);
      matrix.narrow(0, k + width + from, rest - from)
          .narrow(1, k + width + from, across)
          .addmm_(panel.narrow(0, from, rest - from), panel.narrow(0, from, across).t(), 1, -1);
    });
  }
  return true;
}

/// L^-1 of a lower triangular matrix, which is used up.
at::Tensor inverse_of_lower(at::Tensor lower, const Executor& executor) {
  if (!lower.is_cpu()) {
    invert_lower_on_gpu(lower);
    return lower;
  }
  const int64_t n = lower.size(0);
  at::Tensor inverse = at::eye(n, lower.options());
  parallel_chunks(executor, (n + kTile - 1) / kTile, [&](int64_t tile) {
    const int64_t first = tile * kTile, below = n - first;
    const at::Tensor columns =
        inverse.narrow(0, first, below).narrow(1, first, std::min(kTile, below));
    columns.copy_(at::linalg_solve_triangular(lower.narrow(0, first, below).narrow(1, first, below),
                                              columns, /*upper=*/false));
  });
  return inverse;
}

/// L of the damped Hessian with rows and columns in reverse order; nothing when it has none.
at::Tensor reversed_cholesky(const InputStatistics& statistics, const at::Tensor& dead,
                             double damping, const Executor& executor) {
  at::Tensor hessian = statistics.gram.flip({0, 1});
  hessian.mul_(2.0 / static_cast<double>(std::max<int64_t>(1, statistics.sequences)));
  at::Tensor diagonal = hessian.diagonal();
  diagonal.masked_fill_(dead.flip(0), 1);
  // In float64, whose rounding doesn't show: the order of this sum may depend on the threads.
  diagonal.add_(diagonal.to(at::kDouble).mean().item<double>() * damping);
  return cholesky_in_place(hessian, executor) ? hessian : at::Tensor();
}

}  // namespace

Result<InverseFactor> inverse_factor(const InputStatistics& statistics, double damping,
                                     const Executor& requested) {
  const Executor executor = statistics.gram.is_cpu() ? requested : Executor::serial();
  const at::Tensor& gram = statistics.gram;
  if (!gram.diagonal().isfinite().all().item<bool>())
    return bad_input("inputs: Gram matrix must be finite (got NaN or infinity on its diagonal).");
  InverseFactor result;
  result.dead = gram.diagonal() == 0;
  at::Tensor lower;
  for (double now = damping;;) {
    lower = reversed_cholesky(statistics, result.dead, now, executor);
    if (lower.defined()) {
      result.damping = now;
      break;
    }
    const double next = std::max(now * 10, 1e-3);
    if (next > kMostDamping)
      return check_failed(
          "inputs: the Hessian can't be factored even with damping {:g}. Use other calibration "
          "data.",
          now);
    result.warnings.push_back(
        fmt::format("damping raised to {:g}: Cholesky failed at {:g}", next, now));
    now = next;
  }
  result.upper = inverse_of_lower(std::move(lower), executor).flip({0, 1});
  return result;
}

}  // namespace lacuna::prune
