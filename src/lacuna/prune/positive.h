// Gram matrices that rounding, or damage, left without a Cholesky factor.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "lacuna/core/executor.h"

namespace lacuna::prune {

/// Where one can't be factored it is tried with more damping, up to this much of its mean diagonal.
inline constexpr double kMostDamping = 10;
inline double more_damping(double damping) { return std::max(damping * 10, 1e-3); }

/// Matrices are cut into tiles of this many rows and columns. LAPACK's own Cholesky chooses its
/// blocks by the number of threads, and the bits change with it; up to this size it has but one.
inline constexpr int64_t kFactorTile = 128;

/// Replaces the lower triangle of a symmetric matrix by its Cholesky factor and clears the upper;
/// false when there is none. The same bits on any number of threads.
/// @shape [n, n] @dtype float32
bool cholesky_in_place(const at::Tensor& matrix, const Executor& executor);

/// The nearest symmetric matrix whose eigenvalues are clearly positive; nothing when they can't be
/// found. @cost an eigendecomposition in float64
at::Tensor clipped(const at::Tensor& matrix);

}  // namespace lacuna::prune
