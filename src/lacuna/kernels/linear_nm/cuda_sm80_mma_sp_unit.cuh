// The product of a unit as cuda_sm80_mma_sp_pack.cu draws it, from shared memory.
#pragma once

#include "lacuna/kernels/cuda/halves.cuh"
#include "lacuna/kernels/cuda/sm90_stream.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_pack.h"

namespace lacuna::kernels::linear_nm {

// Adds the product of unit w of MT row tiles, `tile_bytes` apart, with the x of this lane (an
// address for ldmatrix, tokens `x_stride` bytes apart) to the sums.
template <class Half, int NT, int MT>
__device__ __forceinline__ void multiply_unit(float (&sums)[MT][NT][4], unsigned w, int tile_bytes,
                                              unsigned x, unsigned x_stride, int lane) {
  uint2 metadata[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    metadata[m] = cuda::load_shared2(w + m * tile_bytes + lane * 8);
  }
#pragma unroll
  for (int step = 0; step < kMmaSpSteps; ++step) {
    uint4 a[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      a[m] = cuda::load_shared4(w + m * tile_bytes + kMmaSpMetadataBytes + step * kMmaSpStepBytes +
                                lane * 16);
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const uint4 fragment = cuda::load_matrices(x + j * 8 * x_stride + step * 64);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned e = step < 2 ? metadata[m].x : metadata[m].y;
        if (step % 2 == 0) {
          Half::template multiply_sparse<0>(sums[m][j], a[m], fragment, e);
        } else {
          Half::template multiply_sparse<1>(sums[m][j], a[m], fragment, e);
        }
      }
    }
  }
}

}  // namespace lacuna::kernels::linear_nm
