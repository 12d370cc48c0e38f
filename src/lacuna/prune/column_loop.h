// The inner loop of optimal-brain-surgeon pruning: columns from left to right, each error spread
// over the columns to its right.
#pragma once

#include <ATen/ATen.h>

#include "lacuna/core/executor.h"
#include "lacuna/format/pattern.h"

namespace lacuna::prune {

class Grid;  // grid.h

/// A stripe of columns first .. first + width - 1 of a weight under work.
struct Stripe {
  at::Tensor weight;  ///< float32 [out, in] contiguous; changed from `first` on
  at::Tensor mask;    ///< bool [out, in] contiguous; read, or for keep:of written, in the stripe
  at::Tensor upper;   ///< float32 [in, in] contiguous: InverseFactor::upper
  int64_t first = 0, width = 0;
  int keep = 0, of = 0;        ///< keep:of chosen on the way; of = 0: the mask is given
  const Grid* grid = nullptr;  ///< where kept weights go, on the CPU; null: they stay as they are
};

/// For column j = first, first + 1, ...: at the start of a group of `of` columns keep the `keep`
/// weights of largest w^2 / U_jj^2, then for every w that becomes another w' (0 where it is
/// dropped, the nearest value of the grid where it is kept): e = (w - w') / U_jj, and all columns
/// to its right lose e U_jk. Columns past the stripe get their share by one product at the end.
/// Rows are independent.
/// @cost out * width * (in - first) multiply-adds
/// @determinism the same bits for any thread count
void column_loop(const Stripe& stripe, const Executor& executor);

/// The forms behind it: rows in parallel on the CPU; on a GPU the kernel of liblacuna_cuda.so,
/// where that is not there, columns as torch operations over all rows (any device). Only the first
/// knows grids.
void column_loop_rows(const Stripe& stripe, const Executor& executor);
void column_loop_gpu(const Stripe& stripe);
void column_loop_torch(const Stripe& stripe);

}  // namespace lacuna::prune
