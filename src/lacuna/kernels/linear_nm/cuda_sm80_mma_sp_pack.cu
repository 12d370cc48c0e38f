// Packed weights: units of 16 rows x 128 columns, 2,304 bytes, ordered [row tile][unit along K]:
//
//   0     256              768              1280             1792            2304
//   +------+----------------+----------------+----------------+----------------+
//   | meta | step 0: values | step 1         | step 2         | step 3         |  step: 32 columns
//   +------+----------------+----------------+----------------+----------------+
//   lane 4g+t (g = 0..7, t = 0..3) reads 16 bytes of each step and 8 of the metadata for all four:
//     values    a0: row g, group t | a1: row g+8, group t | a2: row g, group t+4 | a3: row g+8, t+4
//               (a group is 4 columns, of which 2 are kept, bf16 or f16)
//     metadata  word w (steps 2w, 2w+1): of step 2w + t/2, columns 16(t%2)..+15, low 16 bits row g,
//               high 16 bits row g+8, 4 bits a group: the places of the two kept values, rising.
//               Steps 2w and 2w+1 differ in the selector of mma.sp.
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_pack.h"

#include "lacuna/kernels/cuda/sm90_unit_rows.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_groups.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp_limits.h"

namespace lacuna::kernels::linear_nm {
namespace {

using cuda::ceil_div;
using cuda::kTileRows;
using cuda::kUnpackStride;
using cuda::kUnpackWarps;

static_assert(kMmaSpUnitColumns == cuda::kUnitColumns && kMmaSpSteps == cuda::kSteps);

// One warp packs one unit. A lane writes its own fragments (see the picture) and its metadata.
__global__ void linear_nm_pack_kernel(const unsigned short* dense, int n, int k, int row_tiles,
                                      int units, unsigned char* packed, PackReport* report) {
  const int lane = threadIdx.x & 31;
  const std::int64_t unit_index =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (unit_index >= static_cast<std::int64_t>(row_tiles) * units) return;
  const int tile = static_cast<int>(unit_index / units);
  const int column0 = static_cast<int>(unit_index % units) * kMmaSpUnitColumns;
  unsigned char* unit = packed + unit_index * kMmaSpUnitBytes;
  const int g = lane >> 2, t = lane & 3;

  const DenseGroups groups{dense, n, k};
  const int row0 = tile * kTileRows;
#pragma unroll
  for (int s = 0; s < kMmaSpSteps; ++s) {
    unsigned a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Group group =
          groups.read(row0 + g + 8 * (i & 1), column0 + 32 * s + 4 * (t + 4 * (i >> 1)), report);
      a[i] = group.value[0] | static_cast<unsigned>(group.value[1]) << 16;
    }
    *reinterpret_cast<uint4*>(unit + kMmaSpMetadataBytes + s * kMmaSpStepBytes + lane * 16) =
        make_uint4(a[0], a[1], a[2], a[3]);
  }
  *reinterpret_cast<uint2*>(unit + lane * 8) = groups.metadata(row0, column0, lane);
}

// The way back: one warp unpacks one unit, each lane the groups whose values it reads. The places
// of a group lie in the metadata of the lane that mma.sp takes them from.
__global__ void __launch_bounds__(kUnpackWarps * 32)
    linear_nm_unpack_kernel(const unsigned char* packed, int n, int k, int row_tiles, int units,
                            unsigned short* dense, bool vectors) {
  __shared__ __align__(16) cuda::UnitRows tiles[kUnpackWarps];
  const int lane = threadIdx.x & 31;
  const std::int64_t unit_index =
      static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + (threadIdx.x >> 5);
  if (unit_index >= static_cast<std::int64_t>(row_tiles) * units) return;
  unsigned char* const own = tiles[threadIdx.x >> 5];
  const int tile = static_cast<int>(unit_index / units);
  const int column0 = static_cast<int>(unit_index % units) * kMmaSpUnitColumns;
  const unsigned char* unit = packed + unit_index * kMmaSpUnitBytes;
  const int g = lane >> 2, t = lane & 3;
  const uint2 metadata = *reinterpret_cast<const uint2*>(unit + lane * 8);
  uint4 word[kMmaSpSteps];
#pragma unroll
  for (int s = 0; s < kMmaSpSteps; ++s) {
    word[s] = *reinterpret_cast<const uint4*>(unit + kMmaSpMetadataBytes + s * kMmaSpStepBytes +
                                              lane * 16);
  }
#pragma unroll
  for (int s = 0; s < kMmaSpSteps; ++s) {
    const unsigned values[4] = {word[s].x, word[s].y, word[s].z, word[s].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // columns 0..15 and 16..31 of the step
      const unsigned places = places_of(metadata, s, half, lane);
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // rows g and g + 8
        const unsigned place = places >> (16 * i + 4 * t);
        const unsigned kept = values[2 * half + i];
        const unsigned long long group =
            static_cast<unsigned long long>(kept & 0xffff) << (16 * (place & 3)) |
            static_cast<unsigned long long>(kept >> 16) << (16 * (place >> 2 & 3));
        *reinterpret_cast<unsigned long long*>(own + (g + 8 * i) * kUnpackStride + 64 * s +
                                               32 * half + 8 * t) = group;
      }
    }
  }
  const int row0 = tile * kTileRows;
  cuda::store_unit_rows(tiles[threadIdx.x >> 5],
                        dense + static_cast<std::size_t>(row0) * k + column0, k, n - row0, vectors,
                        lane);
}

}  // namespace

std::size_t mma_sp_packed_bytes(std::int64_t n, std::int64_t k) {
  return static_cast<std::size_t>((n + kTileRows - 1) / kTileRows) * (k / kMmaSpUnitColumns) *
         kMmaSpUnitBytes;
}

cudaError_t mma_sp_pack(const void* dense, std::int64_t n, std::int64_t k, void* packed,
                        PackReport* report, cudaStream_t stream) {
  if (mma_sp_shape_refusal(n, k, 1) != nullptr || dense == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(packed) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  if (report != nullptr) {
    cudaError_t error = cudaMemsetAsync(&report->violations, 0, sizeof(report->violations), stream);
    if (error == cudaSuccess) {
      error = cudaMemsetAsync(&report->first_group, 0xff, sizeof(report->first_group), stream);
    }
    if (error != cudaSuccess) return error;
  }
  const int row_tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kMmaSpUnitColumns);
  const std::int64_t warps = static_cast<std::int64_t>(row_tiles) * units;
  linear_nm_pack_kernel<<<ceil_div(warps, 8), 256, 0, stream>>>(
      static_cast<const unsigned short*>(dense), static_cast<int>(n), static_cast<int>(k),
      row_tiles, units, static_cast<unsigned char*>(packed), report);
  return cudaGetLastError();
}

cudaError_t mma_sp_unpack(const void* packed, std::int64_t n, std::int64_t k, void* dense,
                          cudaStream_t stream) {
  if (mma_sp_shape_refusal(n, k, 1) != nullptr || dense == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(packed) % 16 != 0) {
    return cudaErrorInvalidValue;
  }
  const int row_tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kMmaSpUnitColumns);
  const std::int64_t warps = static_cast<std::int64_t>(row_tiles) * units;
  linear_nm_unpack_kernel<<<ceil_div(warps, kUnpackWarps), kUnpackWarps * 32, 0, stream>>>(
      static_cast<const unsigned char*>(packed), static_cast<int>(n), static_cast<int>(k),
      row_tiles, units, static_cast<unsigned short*>(dense),
      reinterpret_cast<std::uintptr_t>(dense) % 16 == 0);
  return cudaGetLastError();
}

int mma_sp_layout_measure(const void*, std::int64_t n, std::int64_t k, void*, GpuLayout* layout,
                          GpuStream) {
  layout->packed_bytes = mma_sp_packed_bytes(n, k);
  hold(layout, MmaSpShape{n, k});
  return cudaSuccess;
}

int mma_sp_layout_pack(const GpuLayout* layout, const void* dense, const void*, void* packed,
                       GpuPackReport* report, GpuStream stream) {
  const auto [n, k] = held<MmaSpShape>(layout);
  return mma_sp_pack(dense, n, k, packed, report, static_cast<cudaStream_t>(stream));
}

int mma_sp_layout_unpack(const GpuLayout* layout, const void* packed, void* dense,
                         GpuStream stream) {
  const auto [n, k] = held<MmaSpShape>(layout);
  return mma_sp_unpack(packed, n, k, dense, static_cast<cudaStream_t>(stream));
}

}  // namespace lacuna::kernels::linear_nm
