// The eigendecomposition of a damped Gram matrix, once for all Linears with one input.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <mutex>

#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"
#include "lacuna/prune/damped_gram.h"

namespace lacuna::prune {

/// unit = Q diag(L) Q^T. Thread-safe.
class Spectrum {
 public:
  static constexpr size_t kRememberedBytes = size_t{64} << 20;  ///< for shrinkages

  /// Eigenvalues that rounding made negative are taken for 0.
  /// @cost about 9 n^3 multiply-adds in float64 (float32 where products may be rounded), on one
  /// thread of a CPU
  /// @determinism the same bits whatever the number of threads; not inside a parallel region
  /// @errors kCheckFailed: the decomposition did not converge
  static Result<Spectrum> of(const DampedGram& gram);
  Spectrum(Spectrum&& other) noexcept;

  /// rho (unit + rho I)^-1, float32 [n, n], of norm 1 at most: what it multiplies may be rounded
  /// without harm. The last few are remembered: Linears with one input ask for the same ones.
  /// @cost n^3 / 2 multiply-adds @determinism the same bits for any executor
  at::Tensor shrinkage(double rho, const Executor& executor) const;

 private:
  Spectrum(at::Tensor values, at::Tensor vectors, bool rounded_products);
  at::Tensor compute_shrinkage(double rho, const Executor& executor) const;

  at::Tensor values_, vectors_;  // float32 [n], [n, n]
  bool rounded_products_;
  mutable std::mutex mutex_;
  mutable std::map<double, at::Tensor> remembered_;
};

}  // namespace lacuna::prune
