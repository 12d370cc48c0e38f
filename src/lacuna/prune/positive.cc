#include "lacuna/prune/positive.h"

#include <optional>

#include "lacuna/prune/chunks.h"
#include "lacuna/prune/one_thread.h"

namespace lacuna::prune {
namespace {

constexpr double kLeastEigenvalue = 1e-4;  // of the largest, once they are clipped

constexpr int64_t kTile = kFactorTile;

/// cuSOLVER's bits don't change from run to run, so a GPU factors the whole at once.
bool cholesky_on_gpu(const at::Tensor& matrix) {
  const auto [factor, info] = at::linalg_cholesky_ex(matrix);
  if (info.item<int>() != 0 || !factor.diagonal().isfinite().all().item<bool>()) return false;
  matrix.copy_(factor);
  return true;
}

}  // namespace

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

at::Tensor clipped(const at::Tensor& matrix) {
  std::optional<OneThread> alone;
  if (matrix.is_cpu()) alone.emplace();
  if (!matrix.isfinite().all().item<bool>()) return {};
  try {
    const auto [values, vectors] = at::linalg_eigh(matrix.to(at::kDouble));
    const double least = kLeastEigenvalue * values.abs().max().item<double>();
    return at::mm(vectors * values.clamp_min(least), vectors.t()).to(at::kFloat);
  } catch (const c10::Error&) {
    return {};
  }
}

}  // namespace lacuna::prune
