#include "lacuna/prune/inverse_factor.h"

#include <algorithm>

#include "lacuna/prune/chunks.h"
#include "lacuna/prune/positive.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kTile = kFactorTile;

// Up to this size a GPU inverts a triangle by substitution.
constexpr int64_t kGpuTile = 512;

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
/// @param clip  its eigenvalues, if it is none of a sum of squares
at::Tensor reversed_cholesky(const InputStatistics& statistics, const at::Tensor& dead,
                             double damping, bool clip, const Executor& executor) {
  at::Tensor hessian = statistics.gram.flip({0, 1});
  hessian.mul_(2.0 / static_cast<double>(std::max<int64_t>(1, statistics.sequences)));
  at::Tensor diagonal = hessian.diagonal();
  diagonal.masked_fill_(dead.flip(0), 1);
  // In float64, whose rounding doesn't show: the order of this sum may depend on the threads.
  diagonal.add_(diagonal.to(at::kDouble).mean().item<double>() * damping);
  if (clip) hessian = clipped(hessian);
  return hessian.defined() && cholesky_in_place(hessian, executor) ? hessian : at::Tensor();
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
  bool clip = false;
  for (double now = damping;;) {
    lower = reversed_cholesky(statistics, result.dead, now, clip, executor);
    if (lower.defined()) {
      result.damping = now;
      break;
    }
    if (clip)
      return check_failed(
          "inputs: the Hessian can't be factored even with damping {:g} and its eigenvalues "
          "clipped. Use other calibration data.",
          kMostDamping);
    const double next = more_damping(now);
    clip = next > kMostDamping;
    result.warnings.push_back(
        clip ? fmt::format("eigenvalues clipped: Cholesky failed up to damping {:g}", now)
             : fmt::format("damping raised to {:g}: Cholesky failed at {:g}", next, now));
    now = clip ? damping : next;
  }
  result.upper = inverse_of_lower(std::move(lower), executor).flip({0, 1});
  return result;
}

}  // namespace lacuna::prune
