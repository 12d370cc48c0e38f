#include "lacuna/prune/spectrum.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "lacuna/prune/chunks.h"
#include "lacuna/prune/one_thread.h"
#include "lacuna/prune/rounded_products.h"

namespace lacuna::prune {
namespace {

constexpr int64_t kTile = 128;

}  // namespace

Spectrum::Spectrum(at::Tensor values, at::Tensor vectors, bool rounded_products)
    : values_(std::move(values)),
      vectors_(std::move(vectors)),
      rounded_products_(rounded_products) {}

Spectrum::Spectrum(Spectrum&& other) noexcept
    : Spectrum(std::move(other.values_), std::move(other.vectors_), other.rounded_products_) {}

Result<Spectrum> Spectrum::of(const DampedGram& gram) {
  at::Tensor values, vectors;
  const auto decompose = [&] {
    std::tie(values, vectors) =
        at::linalg_eigh(gram.unit.to(gram.rounded_products ? at::kFloat : at::kDouble));
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
  return Spectrum(std::move(values), std::move(vectors), gram.rounded_products);
}

at::Tensor Spectrum::compute_shrinkage(double rho, const Executor& executor) const {
  const int64_t n = values_.size(0);
  const at::Tensor roots = (values_ + rho).reciprocal_().mul_(rho).sqrt_();
  if (!values_.is_cpu()) {
    const at::Tensor half = vectors_ * roots;
    const RoundedProducts rounded(rounded_products_);
    return at::mm(half, half.t());
  }
  at::Tensor half = at::empty_like(vectors_);
  row_strips(vectors_, executor, [&](int64_t first, int64_t count) {
    at::Tensor rows = half.narrow(0, first, count);
    at::mul_out(rows, vectors_.narrow(0, first, count), roots);
  });
  at::Tensor shrinkage = at::empty_like(vectors_);
  std::vector<std::pair<int64_t, int64_t>> tiles;  // on and above the diagonal
  for (int64_t row = 0; row < n; row += kTile)
    for (int64_t column = row; column < n; column += kTile) tiles.emplace_back(row, column);
  parallel_chunks(executor, static_cast<int64_t>(tiles.size()), [&](int64_t i) {
    const auto [row, column] = tiles[static_cast<size_t>(i)];
    const int64_t down = std::min(kTile, n - row), across = std::min(kTile, n - column);
    at::Tensor tile = shrinkage.narrow(0, row, down).narrow(1, column, across);
    at::mm_out(tile, half.narrow(0, row, down), half.narrow(0, column, across).t());
    if (row != column) shrinkage.narrow(0, column, across).narrow(1, row, down).copy_(tile.t());
  });
  return shrinkage;
}

at::Tensor Spectrum::shrinkage(double rho, const Executor& executor) const {
  {
    const std::lock_guard lock(mutex_);
    if (const auto found = remembered_.find(rho); found != remembered_.end()) return found->second;
  }
  at::Tensor shrinkage = compute_shrinkage(rho, executor);
  const std::lock_guard lock(mutex_);
  if ((remembered_.size() + 1) * shrinkage.nbytes() <= kRememberedBytes)
    remembered_.emplace(rho, shrinkage);
  return shrinkage;
}

}  // namespace lacuna::prune
