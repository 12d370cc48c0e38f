// What packing 2:4 weights for the sparse tensor cores is made of, whatever becomes of the values:
// the two kept values of a group of four, and the metadata of a unit of 16 rows x 128 columns.
#pragma once

#include <cstdint>

#include "lacuna/kernels/cuda/sm90_codes.cuh"
#include "lacuna/kernels/cuda/sm90_unit_rows.cuh"
#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::linear_nm {

struct Group {
  unsigned short value[2];  // bf16; a zero is +0
  unsigned places;          // 4 bits: the columns of both, rising
};

// A dense bf16 matrix [n,k] that is packed, k a multiple of 128.
struct DenseGroups {
  const unsigned short* dense;
  int n, k;

  // Rows past the end are zero. Groups with more than two non-zeros are counted where there is a
  // report.
  __device__ __forceinline__ Group read(int row, int column, GpuPackReport* report) const {
    uint2 word = make_uint2(0, 0);
    if (row < n) {
      word = *reinterpret_cast<const uint2*>(dense + static_cast<std::size_t>(row) * k + column);
    }
    const unsigned v[4] = {word.x & 0xffff, word.x >> 16, word.y & 0xffff, word.y >> 16};
    int position[2] = {-1, -1}, count = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if ((v[i] & 0x7fff) == 0) continue;  // +0.0 and -0.0
      if (count < 2) position[count] = i;
      ++count;
    }
    if (count == 0) {
      position[0] = 0;
      position[1] = 1;
    } else if (count == 1) {  // The partner is a zero: any place that keeps the order.
      if (position[0] == 3) {
        position[0] = 0;
        position[1] = 3;
      } else {
        position[1] = 3;
      }
    }
    Group group;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const unsigned kept = position[i] == 0   ? v[0]
                            : position[i] == 1 ? v[1]
                            : position[i] == 2 ? v[2]
                                               : v[3];
      group.value[i] = (kept & 0x7fff) == 0 ? 0 : kept;
    }
    if (count > 2 && report != nullptr) {
      atomicAdd(&report->violations, 1ull);
      atomicMin(&report->first_group, static_cast<unsigned long long>(row) * (k / 4) + column / 4);
    }
    group.places = position[0] | position[1] << 2;
    return group;
  }

  // The two words that lane 4g+t reads of the metadata of the unit at (row, column): word w of step
  // 2w + t/2, columns 16(t%2)..+15 of it, low half row g, high half row g+8, 4 bits a group.
  __device__ __forceinline__ uint2 metadata(int row, int column, int lane) const {
    const int g = lane >> 2, t = lane & 3;
    unsigned words[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      words[word] = 0;
      const int first = column + 32 * (2 * word + t / 2) + 16 * (t % 2);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        words[word] |= read(row + g + 8 * (i / 4), first + 4 * (i % 4), nullptr).places << (4 * i);
      }
    }
    return make_uint2(words[0], words[1]);
  }
};

// The metadata word of the lane that knows the places of this lane's groups t (half 0) or t+4
// (half 1) of a step, for rows g and g+8 `16 i + 4 t` bits up.
__device__ __forceinline__ unsigned places_of(uint2 metadata, int step, int half, int lane) {
  return __shfl_sync(~0u, step < 2 ? metadata.x : metadata.y, (lane & ~3) + 2 * (step % 2) + half);
}

// Writes the 32 columns of a step, given the pairs of this lane as an operand and the factors of
// its two rows.
__device__ __forceinline__ void unpack_step(const uint4& a, uint2 metadata, int step, float scale_g,
                                            float scale_g8, cuda::UnitRows& rows, int lane) {
  const int g = lane >> 2, t = lane & 3;
  const unsigned values[4] = {a.x, a.y, a.z, a.w};
#pragma unroll
  for (int half = 0; half < 2; ++half) {  // columns 0..15 and 16..31 of the step
    const unsigned places = places_of(metadata, step, half, lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // rows g and g + 8
      const unsigned place = places >> (16 * i + 4 * t);
      const unsigned kept = cuda::scaled_pair(values[2 * half + i], i ? scale_g8 : scale_g);
      const unsigned long long group =
          static_cast<unsigned long long>(kept & 0xffff) << (16 * (place & 3)) |
          static_cast<unsigned long long>(kept >> 16) << (16 * (place >> 2 & 3));
      *reinterpret_cast<unsigned long long*>(rows + (g + 8 * i) * cuda::kUnpackStride + 64 * step +
                                             32 * half + 8 * t) = group;
    }
  }
}

}  // namespace lacuna::kernels::linear_nm
