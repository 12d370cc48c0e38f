// The idea: that of cuda_sm90_mma_sp (2:4 weights are 9/16 of the dense bytes, and mma.sp takes
// them as they lie) with what cards from 8.0 on have: every thread copies 16 bytes at a time into
// shared memory while it multiplies what came before (cp.async), and no block knows of another.
//
// A block: row_warps x k_warps warps. A group of row_warps shares x; the groups take units of 128
// columns in turn:
//
//               group 0    group 1   |  stage 1 ...
//             +----------+----------+
//   row warp  | unit 0   | unit 1   |  MT row tiles a warp, sums in registers over all stages
//      0      |          |          |
//      1      +----------+----------+
//             x of unit 0  x of unit 1   t tokens, each row 16 bytes longer (ldmatrix meets no
//                                        conflict)
//
//   A stage of a group: | x | units of warp 0 | units of warp 1 | .., kStages of them in a ring.
//   One barrier of the group a stage: behind it the stage has come, and the one before it is free.
//   At the end the groups' sums are added in their order, through the same memory.
//
// Bytes: 1.125 N K of weights once, 2 T K of x for each block, from L2.
// Measured on compute capability 9.0 alone (docs/kernels.md has the table); its own cards, 8.0 to
// 8.9, have run none of it.
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "lacuna/kernels/cuda/halves.cuh"
#include "lacuna/kernels/cuda/sm80_follow.cuh"
#include "lacuna/kernels/cuda/sm90_stream.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_unit.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp_limits.h"

namespace lacuna::kernels::linear_nm {
namespace {

using cuda::Bf16;
using cuda::ceil_div;
using cuda::Fp16;
using cuda::kFragmentFloats;
using cuda::kTileRows;

constexpr int kUnitColumns = kMmaSpUnitColumns;
constexpr int kUnitVectors = kMmaSpUnitBytes / 16;
constexpr int kXVectors = kUnitColumns / 8;  // of a token in a unit
constexpr int kXStride = 2 * kUnitColumns + 16;
constexpr int kMaxWarps = 8;

// Stages of a ring. At the planned cuts of 1, 2, 4, 8 token tiles the rings take 143, 108, 215 and
// 143 KB; cards with less shared memory get fewer groups along K.
__host__ __device__ constexpr int stages_of(int token_tiles) {
  return token_tiles == 1 ? 4 : token_tiles < 8 ? 3 : 2;
}

struct Params {
  const unsigned char* weights;
  const unsigned short* x;
  unsigned short* y;
  int n, k, t, row_tiles, units;
  int row_warps, k_warps;
};

__host__ __device__ constexpr int stage_bytes(int token_tiles, int tiles_per_warp, int row_warps) {
  return token_tiles * 8 * kXStride + row_warps * tiles_per_warp * kMmaSpUnitBytes;
}

__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}

// Until all but the last kLeft groups of this thread's copies have come.
template <int kLeft>
__device__ __forceinline__ void await_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
}

// NT token tiles, MT row tiles of a warp.
template <class Half, int NT, int MT>
__global__ void __launch_bounds__(kMaxWarps * 32) sparse_kernel(const Params p) {
  constexpr int kStages = stages_of(NT);
  extern __shared__ __align__(128) unsigned char shared[];
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int group = warp / p.row_warps, row_warp = warp - group * p.row_warps;
  const int group_threads = 32 * p.row_warps, thread = row_warp * 32 + lane;
  const int first_tile = (static_cast<int>(blockIdx.x) * p.row_warps + row_warp) * MT;
  const int bytes = stage_bytes(NT, MT, p.row_warps);
  const unsigned ring = cuda::shared_address(shared) + group * kStages * bytes;
  const unsigned own = NT * 8 * kXStride + row_warp * MT * kMmaSpUnitBytes;  // in a stage

  const auto fetch_weights = [&](int unit, unsigned stage) {
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      // A tile past the end repeats the last one: its sums are never stored.
      const std::size_t tile = min(first_tile + m, p.row_tiles - 1);
      const unsigned char* from = p.weights + (tile * p.units + unit) * kMmaSpUnitBytes;
#pragma unroll
      for (int i = 0; i < (kUnitVectors + 31) / 32; ++i) {
        const int v = i * 32 + lane;
        if (v < kUnitVectors)
          cuda::copy16(stage + own + m * kMmaSpUnitBytes + v * 16, from + v * 16);
      }
    }
  };
  // Tokens past the last are not fetched: what stands there meets no other token's sum.
  const auto fetch_x = [&](int unit, unsigned stage) {
    const unsigned short* from = p.x + unit * kUnitColumns;
#pragma unroll 1
    for (int i = thread; i < p.t * kXVectors; i += group_threads) {
      const int token = i / kXVectors, v = i % kXVectors;
      cuda::copy16(stage + token * kXStride + v * 16,
                   from + static_cast<std::size_t>(token) * p.k + v * 8);
    }
  };
  const auto group_barrier = [&] { cuda::barrier_of_warps(1 + group, p.row_warps); };

  if (group < p.units) fetch_weights(group, ring);
  cuda::follow();
#pragma unroll
  for (int s = 0; s < kStages - 1; ++s) {
    const int unit = group + s * p.k_warps;
    if (unit < p.units) {
      if (s > 0) fetch_weights(unit, ring + s * bytes);
      fetch_x(unit, ring + s * bytes);
    }
    commit_copies();
  }

  float sums[MT][NT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.f;

  int slot = 0, free_slot = kStages - 1;
#pragma unroll 1
  for (int unit = group; unit < p.units; unit += p.k_warps) {
    await_copies<kStages - 2>();
    group_barrier();
    const int later = unit + (kStages - 1) * p.k_warps;
    if (later < p.units) {
      fetch_weights(later, ring + free_slot * bytes);
      fetch_x(later, ring + free_slot * bytes);
    }
    commit_copies();
    const unsigned stage = ring + slot * bytes, w = stage + own;
    const unsigned x = stage + (lane & 7) * kXStride + (lane >> 3) * 16;
    multiply_unit<Half, NT, MT>(sums, w, kMmaSpUnitBytes, x, kXStride, lane);
    slot = slot + 1 == kStages ? 0 : slot + 1;
    free_slot = free_slot + 1 == kStages ? 0 : free_slot + 1;
  }
  await_copies<0>();
  __syncthreads();  // the rings have been read

  // Fragments as the tensor cores leave them, [group][row warp][m][j][lane][4].
  float* const all = reinterpret_cast<float*>(shared);
  const int fragments = p.row_warps * MT * NT;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const int f = (row_warp * MT + m) * NT + j;
      *reinterpret_cast<float4*>(all + (group * fragments + f) * kFragmentFloats + lane * 4) =
          make_float4(sums[m][j][0], sums[m][j][1], sums[m][j][2], sums[m][j][3]);
    }
  __syncthreads();
  // Four rows of one token a thread: lane 4g+t of a fragment has rows g and g+8 of tokens 2t, 2t+1.
#pragma unroll 1
  for (int i = threadIdx.x; i < fragments * 32; i += blockDim.x) {
    const int f = i / 32, token = i % 32 / 4, quarter = i % 4;
    const int row =
        (static_cast<int>(blockIdx.x) * p.row_warps * MT + f / NT) * kTileRows + quarter * 4;
    const int y_token = f % NT * 8 + token;
    if (y_token >= p.t || row >= p.n) continue;
    const float* from = all + f * kFragmentFloats + (quarter & 1) * 64 + (token >> 1) * 4 +
                        (quarter >> 1) * 2 + (token & 1);
    float v[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
    for (int g = 0; g < p.k_warps; ++g, from += fragments * kFragmentFloats)
#pragma unroll
      for (int r = 0; r < 4; ++r) v[r] += from[r * 16];
    cuda::store_four<Half>(p.y + static_cast<std::size_t>(y_token) * p.n + row, v, p.n - row,
                           p.n % 4 == 0);
  }
}

// ---------- host ----------

using Kernel = void (*)(const Params);

template <class Half>
Kernel find_kernel(const MmaSp80Plan& plan) {
  switch (plan.token_tiles * 16 + plan.tiles_per_warp) {
    case 1 * 16 + 1:
      return sparse_kernel<Half, 1, 1>;
    case 1 * 16 + 2:
      return sparse_kernel<Half, 1, 2>;
    case 2 * 16 + 1:
      return sparse_kernel<Half, 2, 1>;
    case 2 * 16 + 2:
      return sparse_kernel<Half, 2, 2>;
    case 4 * 16 + 1:
      return sparse_kernel<Half, 4, 1>;
    case 4 * 16 + 2:
      return sparse_kernel<Half, 4, 2>;
    case 8 * 16 + 1:
      return sparse_kernel<Half, 8, 1>;
    case 8 * 16 + 2:
      return sparse_kernel<Half, 8, 2>;
    default:
      return nullptr;
  }
}

// Of the current device.
cudaError_t attribute_of(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

}  // namespace

std::size_t mma_sp80_shared_bytes(const MmaSp80Plan& plan) {
  if (find_kernel<Bf16>(plan) == nullptr || plan.row_warps < 1 || plan.k_warps < 1 ||
      plan.row_warps * plan.k_warps > kMaxWarps) {
    return 0;
  }
  const int rings = plan.k_warps * stages_of(plan.token_tiles) *
                    stage_bytes(plan.token_tiles, plan.tiles_per_warp, plan.row_warps);
  const int sums = plan.k_warps * plan.row_warps * plan.tiles_per_warp * plan.token_tiles *
                   kFragmentFloats * static_cast<int>(sizeof(float));
  return static_cast<std::size_t>(std::max(rings, sums));
}

cudaError_t mma_sp80_plan(std::int64_t n, std::int64_t k, int t, MmaSp80Plan* plan) {
  if (mma_sp_shape_refusal(n, k, t) != nullptr || plan == nullptr) return cudaErrorInvalidValue;
  int multiprocessors = 0, most_shared = 0;
  cudaError_t error = cuda::multiprocessors(&multiprocessors);
  if (error == cudaSuccess)
    error = attribute_of(cudaDevAttrMaxSharedMemoryPerBlockOptin, &most_shared);
  if (error != cudaSuccess) return error;
  const int tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kUnitColumns);
  MmaSp80Plan p;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;
  // More tokens want more rows in a block, which read x once; few rows in all want many blocks.
  int rows = p.token_tiles;  // row tiles of a block
  while (rows > 1 && ceil_div(tiles, rows) < multiprocessors) rows /= 2;
  p.tiles_per_warp = rows >= 4 ? 2 : 1;
  p.row_warps = rows / p.tiles_per_warp;
  for (p.k_warps = std::min(units, kMaxWarps / p.row_warps); p.k_warps >= 1; --p.k_warps) {
    if (mma_sp80_shared_bytes(p) > static_cast<std::size_t>(most_shared)) continue;
    *plan = p;
    return cudaSuccess;
  }
  return cudaErrorNotSupported;
}

template <class Half>
cudaError_t mma_sp80_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                         int t, const MmaSp80Plan& plan, bool overlap_previous,
                         cudaStream_t stream) {
  const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  const std::size_t shared = mma_sp80_shared_bytes(plan);
  if (mma_sp_shape_refusal(n, k, t) != nullptr || shared == 0 || t > plan.token_tiles * 8 ||
      packed == nullptr || x == nullptr || y == nullptr || at(packed) % 16 != 0 ||
      at(x) % 16 != 0 || at(y) % (n % 4 == 0 ? 8 : 2) != 0) {
    return cudaErrorInvalidValue;
  }
  const Params p = {.weights = static_cast<const unsigned char*>(packed),
                    .x = static_cast<const unsigned short*>(x),
                    .y = static_cast<unsigned short*>(y),
                    .n = static_cast<int>(n),
                    .k = static_cast<int>(k),
                    .t = t,
                    .row_tiles = ceil_div(n, kTileRows),
                    .units = static_cast<int>(k / kUnitColumns),
                    .row_warps = plan.row_warps,
                    .k_warps = plan.k_warps};
  return cuda::launch_following(
      find_kernel<Half>(plan), p, dim3(ceil_div(p.row_tiles, plan.row_warps * plan.tiles_per_warp)),
      plan.row_warps * plan.k_warps * 32, shared, overlap_previous, stream);
}
template cudaError_t mma_sp80_run<Bf16>(const void*, const void*, void*, std::int64_t, std::int64_t,
                                        int, const MmaSp80Plan&, bool, cudaStream_t);
template cudaError_t mma_sp80_run<Fp16>(const void*, const void*, void*, std::int64_t, std::int64_t,
                                        int, const MmaSp80Plan&, bool, cudaStream_t);

namespace {

struct Call {
  int t;
  MmaSp80Plan plan;
};

template <class Half>
constexpr GpuLinearKernel kernel_of(const char* name) {
  return {
      .operation = "linear_nm",
      .name = name,
      .scratch_bytes = [](int64_t, int64_t) -> size_t { return 0; },
      .measure = mma_sp_layout_measure,
      .pack = mma_sp_layout_pack,
      .unpack = mma_sp_layout_unpack,
      .max_tokens = [](const GpuLayout*) -> int64_t { return kMmaSpMaxTokens; },
      .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
      .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
        const auto [n, k] = held<MmaSpShape>(layout);
        Call call{static_cast<int>(std::min(tokens, kMmaSpMaxTokens + 1)), {}};
        const cudaError_t error = mma_sp80_plan(n, k, call.t, &call.plan);
        if (error == cudaSuccess) hold(plan, call);
        return error;
      },
      .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
      .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                void* y, void*, int overlap_previous, GpuStream stream) -> int {
        const auto [n, k] = held<MmaSpShape>(layout);
        const auto call = held<Call>(plan);
        return mma_sp80_run<Half>(packed, x, y, n, k, call.t, call.plan, overlap_previous != 0,
                                  static_cast<cudaStream_t>(stream));
      },
  };
}

}  // namespace

const GpuLinearKernel kMmaSp80 = kernel_of<Bf16>("cuda_sm80_mma_sp");
const GpuLinearKernel kMmaSp80F16 = kernel_of<Fp16>("cuda_sm80_mma_sp_f16");

}  // namespace lacuna::kernels::linear_nm
