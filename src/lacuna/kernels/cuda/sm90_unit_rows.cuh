// A unit of 16 rows x 128 columns on its way back to a dense bf16 matrix: through shared memory, so
// that a warp stores 256 bytes of each row.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lacuna/kernels/cuda/sm90_stream.cuh"

namespace lacuna::kernels::cuda {

inline constexpr int kUnpackWarps = 8;
inline constexpr int kUnpackStride = 2 * kUnitColumns + 32;  // of a row: no bank conflicts

// Rows of one warp, which it has written itself.
using UnitRows = unsigned char[kTileRows * kUnpackStride];

// Stores those of the first `rows_left` rows. @param to  the unit's first element in a matrix of k
// columns, a multiple of 128, aligned to 16 bytes, or to 8 alone (not `vectors`)
__device__ __forceinline__ void store_unit_rows(const UnitRows& own, unsigned short* to, int k,
                                                int rows_left, bool vectors, int lane) {
  __syncwarp();
  if (vectors) {
    const int half = lane >> 4, part = lane & 15;
#pragma unroll
    for (int r = half; r < kTileRows; r += 2) {
      const uint4 v = *reinterpret_cast<const uint4*>(own + r * kUnpackStride + part * 16);
      if (r < rows_left) {
        *reinterpret_cast<uint4*>(to + static_cast<std::size_t>(r) * k + part * 8) = v;
      }
    }
  } else {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const uint2 v = *reinterpret_cast<const uint2*>(own + r * kUnpackStride + lane * 8);
      if (r < rows_left) {
        *reinterpret_cast<uint2*>(to + static_cast<std::size_t>(r) * k + lane * 4) = v;
      }
    }
  }
}

}  // namespace lacuna::kernels::cuda
