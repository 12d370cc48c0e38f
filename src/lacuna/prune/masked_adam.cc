#include "lacuna/prune/masked_adam.h"

#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>

#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

constexpr double kMeanDecay = 0.9, kSquareDecay = 0.999, kEpsilon = 1e-8;

double smallest_normal(at::ScalarType dtype) {
  switch (dtype) {
    case at::kHalf:
      return 0x1p-14;
    default:  // float32 and bfloat16 have the same exponents
      return std::numeric_limits<float>::min();
  }
}

}  // namespace

void MaskedAdam::add(const at::Tensor& weight, at::ScalarType dtype) {
  State state;
  state.master = weight.detach().to(at::kFloat, /*non_blocking=*/false, /*copy=*/true);
  state.mask = state.master != 0;
  state.mean = at::zeros_like(state.master);
  state.square = at::zeros_like(state.master);
  // In float32 the master itself under another name.
  working_.push_back(state.master.detach().to(dtype).requires_grad_());
  states_.push_back(std::move(state));
}

void MaskedAdam::step(const std::vector<at::Tensor>& gradients, double rate,
                      const Executor& executor) {
  TORCH_CHECK(gradients.size() == states_.size(), "MaskedAdam: a gradient for every matrix");
  ++steps_;
  const auto count = static_cast<double>(steps_);
  const double mean_part = 1 - std::pow(kMeanDecay, count);
  const double square_part = std::sqrt(1 - std::pow(kSquareDecay, count));
  for (size_t i = 0; i < states_.size(); ++i) {
    const State& state = states_[i];
    row_strips(state.master, executor, [&](int64_t first, int64_t rows) {
      const at::NoGradGuard off;  // of this thread
      const auto strip = [&](const at::Tensor& all) { return all.narrow(0, first, rows); };
      const at::Tensor gradient = strip(gradients[i]).to(at::kFloat).mul(strip(state.mask));
      const at::Tensor mean = strip(state.mean), square = strip(state.square);
      mean.mul_(kMeanDecay).add_(gradient, 1 - kMeanDecay);
      square.mul_(kSquareDecay).addcmul_(gradient, gradient, 1 - kSquareDecay);
      strip(state.master)
          .addcdiv_(mean, square.sqrt().div_(square_part).add_(kEpsilon), -rate / mean_part);
      if (working_[i].scalar_type() != at::kFloat) strip(working_[i]).copy_(strip(state.master));
    });
  }
}

at::Tensor MaskedAdam::rounded(size_t i, at::ScalarType dtype) const {
  const at::NoGradGuard off;
  const State& state = states_[i];
  at::Tensor values = state.master.to(dtype, /*non_blocking=*/false, /*copy=*/true);
  const at::Tensor lost = state.mask.logical_and(values == 0);
  return values.masked_fill_(lost, smallest_normal(dtype));
}

double rate_at(int64_t step, int64_t steps, double highest) {
  const double all = static_cast<double>(steps), done = static_cast<double>(step);
  const double rise = std::min(1.0, (done + 1) / std::max(1.0, all / 20));
  return highest * rise * 0.5 * (1 + std::cos(std::numbers::pi * done / all));
}

}  // namespace lacuna::prune
