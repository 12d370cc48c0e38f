// A unit of 16 rows x 128 columns on its way back to a dense matrix, of bf16 or of codes: through
// shared memory, so that a warp stores all of its columns of each row at once.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lacuna/kernels/cuda/sm90_stream.cuh"

namespace lacuna::kernels::cuda {

inline constexpr int kUnpackWarps = 8;
// Of a row: no bank conflicts.
inline constexpr int kUnpackStride = 2 * kUnitColumns + 32;
inline constexpr int kUnpackCodesStride = kUnitColumns + 16;

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

// The same for codes, rows of kUnpackCodesStride bytes. @param to  aligned to 16 bytes
__device__ __forceinline__ void store_unit_codes(const UnitRows& own, unsigned char* to, int k,
                                                 int rows_left, int lane) {
  __syncwarp();
  const int quarter = lane >> 3, part = lane & 7;
#pragma unroll
  for (int r = quarter; r < kTileRows; r += 4) {
    const uint4 v = *reinterpret_cast<const uint4*>(own + r * kUnpackCodesStride + part * 16);
    if (r < rows_left) {
      *reinterpret_cast<uint4*>(to + static_cast<std::size_t>(r) * k + part * 16) = v;
    }
  }
}

}  // namespace lacuna::kernels::cuda
