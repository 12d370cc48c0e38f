#include "lacuna/prune/spectrum.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "lacuna/prune/chunks.h"
#include "lacuna/prune/one_thread.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kTile = 128;

}  // namespace

Spectrum::Spectrum(at::Tensor values, at::Tensor vectors)
    : values_(std::move(values)), vectors_(std::move(vectors)) {}

Spectrum::Spectrum(Spectrum&& other) noexcept
    : values_(std::move(other.values_)), vectors_(std::move(other.vectors_)) {}

Result<Spectrum> Spectrum::of(const DampedGram& gram) {
  at::Tensor values, vectors;
  const auto decompose = [&] {
    std::tie(values, vectors) = at::linalg_eigh(gram.unit.to(at::kDouble));
    values = values.clamp_min_(0).to(at::kFloat);
    vectors = vectors.to(at::kFloat).contiguous();
  };
  try {
    std::optional<OneThread> alone;
    if (gram.unit.is_cpu()) alone.emplace();
    decompose();
  } catch (const c10::Error&) {
    values = at::Tensor();
  }
  if (!values.defined() || !values.isfinite().all().item<bool>() ||
      !vectors.isfinite().all().item<bool>())
    return check_failed(
        "inputs: the eigenvalues of the Gram matrix can't be found. Raise --damping or use other "
        "calibration data.");
  return Spectrum(std::move(values), std::move(vectors));
}

at::Tensor Spectrum::compute_inverse(double rho, const Executor& executor) const {
  const int64_t n = values_.size(0);
  const at::Tensor roots = (values_ + rho).rsqrt_();
  if (!values_.is_cpu()) {
    const at::Tensor half = vectors_ * roots;
    return at::mm(half, half.t());
  }
  at::Tensor half = at::empty_like(vectors_);
  row_strips(vectors_, executor, [&](int64_t first, int64_t count) {
    at::Tensor rows = half.narrow(0, first, count);
    at::mul_out(rows, vectors_.narrow(0, first, count), roots);
  });
  at::Tensor inverse = at::empty_like(vectors_);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // on and above the diagonal
  for (int64_t row = 0; row < n; row += kTile)
    for (int64_t column = row; column < n; column += kTile) tiles.emplace_back(row, column);
  parallel_chunks(executor, static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const auto [row, column] = tiles[static_cast<size_t>(i)];
    const int64_t down = std::min(kTile, n - row), across = std::min(kTile, n - column);
    at::Tensor tile = inverse.narrow(0, row, down).narrow(1, column, across);
    at::mm_out(tile, half.narrow(0, row, down), half.narrow(0, column, across).t());
    if (row != column) inverse.narrow(0, column, across).narrow(1, row, down).copy_(tile.t());
  });
  return inverse;
}

at::Tensor Spectrum::inverse(double rho, const Executor& executor) const {
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = remembered_.find(rho); found != remembered_.end()) return found->second;
  }
  at::Tensor inverse = compute_inverse(rho, executor);
  const std::lock_guard lock(mutex_);
  if ((remembered_.size() + 1) * inverse.nbytes() <= kRememberedBytes)
    remembered_.emplace(rho, inverse);
  return inverse;
}

}  // namespace lacuna::prune
