// A matrix with a bitmap, dense again, on a GPU.
#pragma once

#include <cuda_runtime_api.h>

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::expand {

// dense[r,c] = the next value of row r where its bit c is set, else 0: bits are copied, nothing is
// converted.
// @shape dense [rows, columns], contiguous, of elements as wide as the values
// @cost every byte of bitmap, values and dense once; the bitmap again from L2, ceil(columns/1024)/2
//       times
// @errors cudaErrorInvalidValue: elements of neither 2 nor 4 bytes, or pointers not aligned to them
cudaError_t expand(const GpuBitmapMatrix& matrix, void* dense, cudaStream_t stream);

}  // namespace lacuna::kernels::expand
