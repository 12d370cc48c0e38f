#include "lacuna/prune/damped_gram.h"

#include <algorithm>
#include <numeric>

#include "lacuna/prune/chunks.h"
#include "lacuna/prune/positive.h"
#include "lacuna/prune/rounded_products.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kBetweenTrueResiduals = 10;

/// Row by row sum of a * b. @shape [out, n] -> [out, 1]
at::Tensor dots(const at::Tensor& a, const at::Tensor& b) {
  return (a * b).sum({1}, /*keepdim=*/true);
}

/// d G d^T for every row d of dense - scaled; `residual` receives (dense - scaled) * G.
at::Tensor errors_of(const DampedGram& gram, const at::Tensor& dense, const at::Tensor& scaled,
                     at::Tensor& residual) {
  const at::Tensor distance = dense - scaled;
  residual = at::mm(distance, gram.unit);
  return dots(distance, residual);
}

/// One strip of rows, started at and left in `scaled`.
void strip(const DampedGram& gram, const at::Tensor& dense, const at::Tensor& kept,
           const at::Tensor& scaled, int64_t steps, double tolerance) {
  const at::Tensor start = scaled.clone();
  at::Tensor residual;
  const at::Tensor before = errors_of(gram, dense, scaled, residual);
  residual.mul_(kept);
  at::Tensor direction = residual.clone();
  at::Tensor size = dots(residual, residual);
  const at::Tensor enough = size * (tolerance * tolerance);
  for (int64_t step = 0; step < steps; ++step) {
    if ((size <= enough).all().item<bool>()) break;
    at::Tensor image;
    {
      const RoundedProducts rounded(gram.rounded_products);
      image = at::mm(direction, gram.unit).mul_(kept);
    }
    const at::Tensor curvature = dots(direction, image);
    const at::Tensor length = at::where(curvature > 0, size / curvature, 0);
    scaled.addcmul_(direction, length);
    if (gram.rounded_products && (step + 1) % kBetweenTrueResiduals == 0 && step + 1 < steps) {
      errors_of(gram, dense, scaled, residual);
      residual.mul_(kept);
    } else {
      residual.addcmul_(image, length, -1);
    }
    const at::Tensor now = dots(residual, residual);
    const at::Tensor turn = at::where(size > 0, now / size, 0);
    direction.mul_(turn).add_(residual);
    size = now;
  }
  const at::Tensor after = errors_of(gram, dense, scaled, residual);
  // Written so that a NaN is refused too.
  scaled.copy_(at::where(after <= before, scaled, start));
}

DampedGram damped_by(const at::Tensor& gram, double damping, const Executor& executor) {
  // In float64, whose rounding doesn't show: the order of this sum may depend on the threads.
  const double mean = gram.diagonal().to(at::kDouble).mean().item<double>();
  DampedGram damped;
  damped.damping = damping;
  // Where all inputs are zero any weights do: the identity keeps them as they are.
  const auto extra = static_cast<float>(mean > 0 ? damping * mean : 1);
  damped.norms = (gram.diagonal() + extra).sqrt();
  damped.unit = at::empty_like(gram, at::MemoryFormat::Contiguous);
  row_strips(gram, executor, [&](int64_t first, int64_t count) {
    at::Tensor rows = damped.unit.narrow(0, first, count);
    at::div_out(rows, gram.narrow(0, first, count), damped.norms);
    rows.div_(damped.norms.narrow(0, first, count).unsqueeze(1));
  });
  damped.unit.diagonal().fill_(1);
  return damped;
}

}  // namespace

Result<DampedGram> damped_gram(const at::Tensor& gram, double damping, const Executor& executor) {
  if (!gram.diagonal().isfinite().all().item<bool>())
    return bad_input("inputs: Gram matrix must be finite (got NaN or infinity on its diagonal).");
  std::vector<std::string> warnings;
  // Rounding may leave directions of no or of negative length, along which weights would grow
  // without end.
  const auto sound = [&](DampedGram& damped) {
    if (!cholesky_in_place(damped.unit.clone(), executor)) return false;
    damped.warnings = warnings;
    return true;
  };
  double now = damping;
  for (; now <= std::max(damping, kMostDamping); now = more_damping(now)) {
    if (now != damping)
      warnings.push_back(fmt::format("damping raised to {:g}: the Gram matrix had no factor", now));
    DampedGram damped = damped_by(gram, now, executor);
    if (sound(damped)) return damped;
  }
  warnings.emplace_back("eigenvalues clipped: the Gram matrix had no factor at any damping");
  if (const at::Tensor positive = clipped(gram); positive.defined()) {
    DampedGram damped = damped_by(positive, damping, executor);
    if (sound(damped)) return damped;
  }
  return check_failed(
      "inputs: the Gram matrix can't be factored even with its eigenvalues clipped. Use other "
      "calibration data.");
}

double damped_error(const at::Tensor& weight, const at::Tensor& pruned, const DampedGram& gram,
                    const Executor& executor) {
  const at::Tensor errors = at::empty({weight.size(0)}, weight.options().dtype(at::kDouble));
  row_strips(weight, executor, [&](int64_t first, int64_t count) {
    const at::Tensor distance =
        gram.scaled(weight.narrow(0, first, count) - pruned.narrow(0, first, count));
    errors.narrow(0, first, count)
        .copy_((distance * at::mm(distance, gram.unit)).sum({1}, false, at::kDouble));
  });
  const at::Tensor on_cpu = errors.cpu();
  const double* values = on_cpu.const_data_ptr<double>();
  return std::accumulate(values, values + on_cpu.numel(), 0.0);
}

at::Tensor times_gram(const at::Tensor& a, const DampedGram& gram, const Executor& executor) {
  at::Tensor product = at::empty(a.sizes(), a.options());
  row_strips(a, executor, [&](int64_t first, int64_t count) {
    at::Tensor rows = product.narrow(0, first, count);
    at::mm_out(rows, a.narrow(0, first, count), gram.unit);
  });
  return product;
}

void conjugate_gradients(const DampedGram& gram, const at::Tensor& dense, const at::Tensor& mask,
                         const at::Tensor& scaled, int64_t steps, double tolerance,
                         const Executor& executor) {
  row_strips(dense, executor, [&](int64_t first, int64_t count) {
    strip(gram, dense.narrow(0, first, count), mask.narrow(0, first, count).to(at::kFloat),
          scaled.narrow(0, first, count), steps, tolerance);
  });
}

}  // namespace lacuna::prune
