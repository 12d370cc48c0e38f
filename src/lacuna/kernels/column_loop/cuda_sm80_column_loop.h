// The inner loop of optimal-brain-surgeon pruning (prune/column_loop.h) on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::column_loop {

// For column j = 0 .. width-1 of every row: at the start of a group of `of` columns keep the `keep`
// weights of largest (w/U_jj)^2 (of equal ones those to the left), then for a dropped w:
// error = w / U_jj, w = 0, and the columns to its right in the stripe lose error * U_jk. Kept
// weights have error 0.
// @cost rows * width^2 multiply-adds; every row and the corner of U once from device memory
// @determinism the same bits in every run
// @errors cudaErrorInvalidValue: a width outside 1 .. 128 or a group outside 1 .. 64
cudaError_t column_loop(const GpuColumnLoop& stripe, cudaStream_t stream);

}  // namespace lacuna::kernels::column_loop
