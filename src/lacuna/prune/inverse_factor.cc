#include "lacuna/prune/inverse_factor.h"

#include <algorithm>
#include <cmath>

namespace lacuna::prune {
namespace {

constexpr double kMostDamping = 10;

/// L of the damped Hessian with rows and columns in reverse order; nothing when it has none.
at::Tensor reversed_cholesky(const InputStatistics& statistics, const at::Tensor& dead,
                             double damping) {
  at::Tensor hessian = statistics.gram.flip({0, 1});
  hessian.mul_(2.0 / static_cast<double>(std::max<int64_t>(1, statistics.sequences)));
  at::Tensor diagonal = hessian.diagonal();
  diagonal.masked_fill_(dead.flip(0), 1);
  diagonal.add_(diagonal.mean() * damping);
  auto [factor, info] = at::linalg_cholesky_ex(hessian);
  if (info.item<int>() != 0 || !factor.diagonal().isfinite().all().item<bool>()) return {};
  return factor;
}

}  // namespace

Result<InverseFactor> inverse_factor(const InputStatistics& statistics, double damping) {
  const at::Tensor& gram = statistics.gram;
  if (!gram.diagonal().isfinite().all().item<bool>())
    return bad_input("inputs: Gram matrix must be finite (got NaN or infinity on its diagonal).");
  InverseFactor result;
  result.dead = gram.diagonal() == 0;
  at::Tensor lower;
  for (double now = damping;;) {
    lower = reversed_cholesky(statistics, result.dead, now);
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
  at::Tensor inverse = at::eye(gram.size(0), gram.options());
  at::linalg_solve_triangular_out(inverse, lower, inverse, /*upper=*/false);
  lower.reset();
  result.upper = inverse.flip({0, 1}).contiguous();
  return result;
}

}  // namespace lacuna::prune
