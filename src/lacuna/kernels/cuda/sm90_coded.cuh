// What kernels share whose weights are codes, read through the rings of sm90_ring.cuh: the place of
// the scales, packing and unpacking, and the kernel as the library shows it. What differs is the
// unit (Unit of sm90_ring.cuh), which also says
//
//   struct Unit {
//     static constexpr bool kSparse;  // 2:4
//     static constexpr bool kScaled;  // one scale a row; else the units hold those of their groups
//     // Packs the unit of a dense [n,k] matrix of codes (as bf16 numbers) at (row, column).
//     static __device__ void pack(const unsigned short* dense, int n, int k, int row, int column,
//                                 unsigned char* unit, GpuPackReport* report, int lane);
//     // Where the units hold the scales: puts them there. @param scales  bf16 [n, groups]
//     static __device__ void pack_scales(const unsigned short* scales, int n, int k, int row,
//                                        int column, unsigned char* unit, int lane);
//     // Writes its rows, a lane's two of them times their scales (given where rows have them).
//     static __device__ void unpack(const unsigned char* unit, UnitRows& rows, float scale_g,
//                                   float scale_g8, int lane);
//   };
//
// Packed weights:  |scales of rows: float32, padded to 16| to a multiple of 128 |units [tile][k]|
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "lacuna/kernels/cuda/sm90_coded_limits.h"
#include "lacuna/kernels/cuda/sm90_codes.cuh"
#include "lacuna/kernels/cuda/sm90_ring.cuh"
#include "lacuna/kernels/cuda/sm90_unit_rows.cuh"
#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::cuda {

struct CodedShape {
  std::int64_t n, k;

  int row_tiles() const { return ceil_div(n, kTileRows); }
  int units() const { return static_cast<int>(k / kUnitColumns); }
  std::int64_t all_units() const { return static_cast<std::int64_t>(row_tiles()) * units(); }
  std::size_t scale_bytes() const {
    return (static_cast<std::size_t>(row_tiles()) * kTileRows * sizeof(float) + 127) / 128 * 128;
  }
};

// Codes want many warps: each waits for what it turns into operands. 31 of them leave 64 registers
// a thread, 24 leave 80, 17 96, 16 128, 12 168.
constexpr int coded_max_warps(int token_tiles, int tiles_per_warp) {
  const int fragments = token_tiles * tiles_per_warp;
  return fragments > 16 ? 11 : fragments > 8 ? 15 : fragments > 4 ? 16 : fragments > 2 ? 23 : 30;
}

template <class Unit>
std::size_t coded_units_at(const CodedShape& shape) {
  return Unit::kScaled ? shape.scale_bytes() : 0;
}

template <class Unit>
std::size_t coded_packed_bytes(const CodedShape& shape) {
  return coded_units_at<Unit>(shape) + static_cast<std::size_t>(shape.all_units()) * Unit::kBytes;
}

// One warp a unit.
template <class Unit>
__global__ void __launch_bounds__(kUnpackWarps * 32)
    coded_pack_kernel(const unsigned short* dense, int n, int k, int row_tiles, int units,
                      unsigned char* packed, GpuPackReport* report) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + (threadIdx.x >> 5);
  if (i >= static_cast<std::int64_t>(row_tiles) * units) return;
  Unit::pack(dense, n, k, static_cast<int>(i / units) * kTileRows,
             static_cast<int>(i % units) * kUnitColumns, packed + i * Unit::kBytes, report,
             threadIdx.x & 31);
}

template <class Unit>
__global__ void __launch_bounds__(kUnpackWarps * 32)
    coded_unpack_kernel(const float* scales, const unsigned char* packed, int n, int k,
                        int row_tiles, int units, unsigned short* dense) {
  __shared__ __align__(16) UnitRows rows[kUnpackWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + warp;
  if (i >= static_cast<std::int64_t>(row_tiles) * units) return;
  const int row = static_cast<int>(i / units) * kTileRows;
  const int column = static_cast<int>(i % units) * kUnitColumns, g = lane >> 2;
  const unsigned char* const unit = packed + i * Unit::kBytes;
  if constexpr (Unit::kScaled) {
    Unit::unpack(unit, rows[warp], scales[row + g], scales[row + g + 8], lane);
  } else {
    Unit::unpack(unit, rows[warp], lane);
  }
  store_unit_rows(rows[warp], dense + static_cast<std::size_t>(row) * k + column, k, n - row,
                  /*vectors=*/true, lane);
}

template <class Unit>
__global__ void __launch_bounds__(kUnpackWarps * 32)
    coded_unpack_codes_kernel(const unsigned char* packed, int n, int k, int row_tiles, int units,
                              unsigned char* codes) {
  __shared__ __align__(16) UnitRows rows[kUnpackWarps];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + warp;
  if (i >= static_cast<std::int64_t>(row_tiles) * units) return;
  const int row = static_cast<int>(i / units) * kTileRows;
  const int column = static_cast<int>(i % units) * kUnitColumns;
  Unit::unpack_codes(packed + i * Unit::kBytes, rows[warp], lane);
  store_unit_codes(rows[warp], codes + static_cast<std::size_t>(row) * k + column, k, n - row,
                   lane);
}

static __global__ void coded_scales_kernel(const __nv_bfloat16* scales, int n, int padded,
                                           float* packed) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < padded) packed[row] = row < n ? __bfloat162float(scales[row]) : 0.f;
}

// One warp a unit.
template <class Unit>
__global__ void __launch_bounds__(kUnpackWarps * 32)
    coded_group_scales_kernel(const unsigned short* scales, int n, int k, int row_tiles, int units,
                              unsigned char* packed) {
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + (threadIdx.x >> 5);
  if (i >= static_cast<std::int64_t>(row_tiles) * units) return;
  Unit::pack_scales(scales, n, k, static_cast<int>(i / units) * kTileRows,
                    static_cast<int>(i % units) * kUnitColumns, packed + i * Unit::kBytes,
                    threadIdx.x & 31);
}

// ---------- host ----------

// The cut for a problem, from measured rules (bench/lab/cuda_linear_coded). They want 8 to 18 warps
// a block and as few row tiles a warp as that allows.
// @param at_once  (token tiles, cluster, &count): clusters of blocks that the device holds at a
// time
template <class Unit, class AtOnce>
cudaError_t coded_cut(const CodedShape& shape, int t, const AtOnce& at_once, StreamPlan* plan) {
  const int tiles = shape.row_tiles(), units = shape.units();
  StreamPlan p;
  p.least_shared = kAloneBytes;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;
  int clusters = 0, row_tiles = 0;
  const auto share_k = [&](int cluster) {
    p.cluster = cluster;
    const cudaError_t error = at_once(p.token_tiles, cluster, &clusters);
    if (error == cudaSuccess) row_tiles = ceil_div(tiles, clusters);
    return error;
  };

  // Two blocks share K. Few rows and a long K: four, for each then reads a quarter of x alone. Many
  // rows: none, where x is little beside the weights or the sums would be many.
  cudaError_t error = share_k(units >= 4 ? 2 : 1);
  if (error != cudaSuccess) return error;
  const bool few = t <= 2 || (t <= 8 && Unit::kSparse);
  const bool small = Unit::kBytes < 1024;  // as many bytes a stage, and room for sums
  const int most_rows = small && t > 2 && t <= 8 ? 28 : 15;  // warps of a block
  if (row_tiles > most_rows && (few || t > 32)) {
    error = share_k(1);
  } else if (row_tiles <= 6 && units >= 64 && t > 2 && (Unit::kSparse || t <= 32) &&
             !(small && (t <= 8 || t > 32))) {
    error = share_k(4);
  }
  while (error == cudaSuccess && tiles * 4 < clusters * 3 && p.cluster < kMaxCluster &&
         units >= 8 * p.cluster) {
    error = share_k(2 * p.cluster);
  }
  if (error != cudaSuccess) return error;
  const int part = ceil_div(units, p.cluster);

  p.tiles_per_warp = row_tiles <= (t > 32 && !small ? 6 : most_rows) ? 1 : 2;
  const int max_warps = Unit::max_warps(p.token_tiles, p.tiles_per_warp);
  const int most = std::min(max_warps - 1, most_rows);
  const int waves = ceil_div(row_tiles, most * p.tiles_per_warp);
  if (waves > 1) row_tiles = ceil_div(tiles, static_cast<std::int64_t>(clusters) * waves);
  const int wanted_x_warps = t <= 2 ? 2 : t <= 8 ? 3 : t <= 32 ? 2 : 4;
  for (p.row_warps = ceil_div(row_tiles, p.tiles_per_warp); p.row_warps >= 1; p.row_warps /= 2) {
    // Each K warp with eight units or more, unless the block is small.
    const int by_k = std::max(part / 8, std::min(8 / p.row_warps, part / 2));
    for (p.k_warps = std::max(1, std::min((t > 32 ? 14 : 18) / p.row_warps, by_k)); p.k_warps >= 1;
         --p.k_warps) {
      const int warps = p.row_warps * p.k_warps;
      p.x_warps = std::min(t > 32 && warps > 12 ? 2 : wanted_x_warps, max_warps + 1 - warps);
      const bool deep = t <= 8 && warps >= 14 && p.cluster <= 2 && !(Unit::kSparse && t <= 2);
      const bool crowded = !Unit::kSparse && p.cluster == 1 && warps >= 14;
      const bool long_stages = small && (t <= 2 || p.row_warps > 15);
      const int stage_units = long_stages ? 4 : small || (t <= 32 && !crowded) ? 2 : 1;
      for (const int least : {2, 1}) {  // stages
        for (p.stage_units = stage_units; p.stage_units >= 1; --p.stage_units) {
          const int rounds = ceil_div(part, p.stage_units * p.k_warps);
          if (rounds == 1 && p.stage_units > 1) continue;
          p.x_stages = std::min(3, rounds);
          for (p.stages = std::min(deep ? 3 : 2, rounds); p.stages >= std::min(least, rounds);
               --p.stages) {
            const std::size_t bytes = ring_shared_bytes<Unit>(p);
            if (bytes > 0 && bytes <= kMaxSharedBytes) {
              *plan = p;
              return cudaSuccess;
            }
          }
        }
      }
    }
  }
  return cudaErrorNotSupported;
}

// The functions of GpuLinearKernel.

template <class Unit>
struct CodedKernel {
  struct Call {
    std::int64_t t;
    StreamPlan plan;
  };

  static int measure(const void*, int64_t n, int64_t k, void*, GpuLayout* layout, GpuStream) {
    const CodedShape shape{n, k};
    if (coded_shape_refusal(n, k, 1) != nullptr) return cudaErrorInvalidValue;
    layout->packed_bytes = coded_packed_bytes<Unit>(shape);
    hold(layout, shape);
    return cudaSuccess;
  }

  static int pack(const GpuLayout* layout, const void* dense, const void*, void* packed,
                  GpuPackReport* report, GpuStream stream) {
    const auto shape = held<CodedShape>(layout);
    const auto to = static_cast<cudaStream_t>(stream);
    if (dense == nullptr || packed == nullptr || reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
        reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
      return cudaErrorInvalidValue;
    }
    if (report != nullptr) {
      cudaError_t error = cudaMemsetAsync(&report->violations, 0, sizeof(report->violations), to);
      if (error == cudaSuccess) {
        error = cudaMemsetAsync(&report->first_group, 0xff, sizeof(report->first_group), to);
      }
      if (error != cudaSuccess) return error;
    }
    coded_pack_kernel<Unit>
        <<<ceil_div(shape.all_units(), kUnpackWarps), kUnpackWarps * 32, 0, to>>>(
            static_cast<const unsigned short*>(dense), static_cast<int>(shape.n),
            static_cast<int>(shape.k), shape.row_tiles(), shape.units(),
            static_cast<unsigned char*>(packed) + coded_units_at<Unit>(shape), report);
    return cudaGetLastError();
  }

  static int pack_scales(const GpuLayout* layout, const void* scales, void* packed,
                         GpuStream stream) {
    const auto shape = held<CodedShape>(layout);
    const auto to = static_cast<cudaStream_t>(stream);
    if constexpr (Unit::kScaled) {
      const int padded = shape.row_tiles() * kTileRows;
      coded_scales_kernel<<<ceil_div(padded, 256), 256, 0, to>>>(
          static_cast<const __nv_bfloat16*>(scales), static_cast<int>(shape.n), padded,
          static_cast<float*>(packed));
    } else {
      coded_group_scales_kernel<Unit>
          <<<ceil_div(shape.all_units(), kUnpackWarps), kUnpackWarps * 32, 0, to>>>(
              static_cast<const unsigned short*>(scales), static_cast<int>(shape.n),
              static_cast<int>(shape.k), shape.row_tiles(), shape.units(),
              static_cast<unsigned char*>(packed));
    }
    return cudaGetLastError();
  }

  static int unpack(const GpuLayout* layout, const void* packed, void* dense, GpuStream stream) {
    const auto shape = held<CodedShape>(layout);
    if (dense == nullptr || reinterpret_cast<std::uintptr_t>(dense) % 16 != 0)
      return cudaErrorInvalidValue;
    coded_unpack_kernel<Unit><<<ceil_div(shape.all_units(), kUnpackWarps), kUnpackWarps * 32, 0,
                                static_cast<cudaStream_t>(stream)>>>(
        static_cast<const float*>(packed),
        static_cast<const unsigned char*>(packed) + coded_units_at<Unit>(shape),
        static_cast<int>(shape.n), static_cast<int>(shape.k), shape.row_tiles(), shape.units(),
        static_cast<unsigned short*>(dense));
    return cudaGetLastError();
  }

  static int unpack_codes(const GpuLayout* layout, const void* packed, void* codes,
                          GpuStream stream) {
    const auto shape = held<CodedShape>(layout);
    if (codes == nullptr || reinterpret_cast<std::uintptr_t>(codes) % 16 != 0)
      return cudaErrorInvalidValue;
    coded_unpack_codes_kernel<Unit><<<ceil_div(shape.all_units(), kUnpackWarps), kUnpackWarps * 32,
                                      0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const unsigned char*>(packed) + coded_units_at<Unit>(shape),
        static_cast<int>(shape.n), static_cast<int>(shape.k), shape.row_tiles(), shape.units(),
        static_cast<unsigned char*>(codes));
    return cudaGetLastError();
  }

  static int plan(const GpuLayout* layout, int64_t tokens, GpuPlan* plan) {
    const auto shape = held<CodedShape>(layout);
    if (coded_shape_refusal(shape.n, shape.k, tokens) != nullptr) return cudaErrorInvalidValue;
    Call call{tokens, {}};
    const cudaError_t error =
        coded_cut<Unit>(shape, static_cast<int>(tokens), ring_clusters_at_once<Unit>, &call.plan);
    if (error == cudaSuccess) hold(plan, call);
    return error;
  }

  static int run(const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                 void* y, void*, int overlap_previous, GpuStream stream) {
    const auto shape = held<CodedShape>(layout);
    const auto call = held<Call>(plan);
    return ring_run<Unit>(static_cast<const unsigned char*>(packed) + coded_units_at<Unit>(shape),
                          Unit::kScaled ? static_cast<const float*>(packed) : nullptr, x, y,
                          shape.n, shape.k, static_cast<int>(call.t), call.plan,
                          overlap_previous != 0, static_cast<cudaStream_t>(stream));
  }

  static constexpr GpuLinearKernel shown_as(const char* operation, const char* name) {
    return {.operation = operation,
            .name = name,
            .scratch_bytes = [](int64_t, int64_t) -> size_t { return 0; },
            .measure = measure,
            .pack = pack,
            .unpack = unpack,
            .max_tokens = [](const GpuLayout*) -> int64_t { return kRingMaxTokens; },
            .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
            .plan = plan,
            .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
            .run = run,
            .pack_scales = pack_scales,
            .rounded_from = nullptr,
            .plan_rounded = nullptr,
            .unpack_codes = nullptr};
  }
};

}  // namespace lacuna::kernels::cuda
