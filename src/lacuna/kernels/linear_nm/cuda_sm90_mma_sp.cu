// The idea: at few tokens a product costs what its weights cost to read, and 2:4 weights are 9/16
// of the dense bytes, which mma.sp takes as they lie: no instruction is spent on unpacking. Every
// warp streams its own weights through a private ring of bulk copies, x comes through a ring that
// the block shares, and one wave of blocks covers the matrix. Blocks of a cluster share rows and
// split K, so that each reads a part of x only, and push their sums into each other's memory.
//
// Packed weights: cuda_sm80_mma_sp_pack.cu draws them.
//
// How a block is made of consumers of weights and producers of x: kernels/cuda/sm90_stream.cuh; a
// warp's ring: sm90_ring.cuh.
//
// Bytes: 1.125 N K of weights once (evict first), 2 T K / cluster of x for every block, from L2;
// 4 T N of sums for each k warp and block of a cluster, within and between shared memories.
// Shared memory: rings of weights (55 to 130 KB in flight a block), x, sums (apart where they fit).
// Registers: 8 token tiles x 3 row tiles: 168 for 12 warps; 8 x 2: 128 for 16; 4 x 2: 96 for 17;
// 1 x 2: 51.
//
// What counts here, measured (bench/lab/cuda_linear_nm has the tables):
// - Instructions and constants are cold at each launch: unrolled start-up loops, divisions and
//   membars (a cluster arrive with release is one) cost 0.5 to 1.6 us a kernel.
// - The copies of a block are served in turn, and full queues of weights delay x: more bytes in
//   flight are slower. One warp issues a copy in about 40 cycles: 4 producers from 17 tokens on.
// Tried and lost: x by bulk copies for up to 8 tokens (up to 4 %) and by loads above (up to 26 %),
// all weights held back until x is asked for (nothing gained), four row tiles a warp (4 to 18 %),
// longer stages from 9 tokens on (4 to 11 %), K warps where rows fill the block (up to 12 %),
// reading the other blocks' sums instead of pushing them (0.3 to 0.9 us), 8 tokens with all of K in
// a block where rows are few (3 to 5 %: every block then reads all of x).
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <variant>

#include "lacuna/kernels/cuda/sm90_device.h"
#include "lacuna/kernels/cuda/sm90_ring.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_unit.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.h"

namespace lacuna::kernels::linear_nm {
namespace {

using cuda::Bf16;
using cuda::ceil_div;
using cuda::Fp16;
using cuda::kTileRows;

constexpr int kUnitColumns = kMmaSpUnitColumns;
constexpr int kUnitBytes = kMmaSpUnitBytes;
static_assert(kUnitColumns == cuda::kUnitColumns);

// A unit of sm90_ring.cuh.
template <class Half_>
struct TwoOfFour {
  using Half = Half_;
  static constexpr int kBytes = kUnitBytes;
  static constexpr bool kScaled = false;

  // Sums of NT x MT x 4 registers decide how many warps fit beside one producer of x. Registers are
  // given out four warps at a time: 17 warps leave 96 a thread, 16 leave 128, 12 leave 168.
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    const int fragments = token_tiles * tiles_per_warp;
    return fragments > 16 ? 11 : fragments > 8 || token_tiles == 8 ? 15 : 16;
  }

  template <int NT, int MT>
  static __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], unsigned w,
                                                  int tile_stage_bytes, unsigned x,
                                                  unsigned x_stride, int lane) {
    multiply_unit<Half, NT, MT>(sums, w, tile_stage_bytes, x, x_stride, lane);
  }
};

}  // namespace

std::size_t mma_sp_workspace_bytes(std::int64_t, std::int64_t, int) { return 0; }

const char* mma_sp_refusal(std::int64_t n, std::int64_t k, int t, int device) {
  if (const char* reason = mma_sp_shape_refusal(n, k, t)) return reason;
  return cuda::sm90_refusal(device);
}

std::size_t mma_sp_shared_bytes(const MmaSpPlan& plan) {
  return cuda::ring_shared_bytes<TwoOfFour<Bf16>>(plan);
}

cudaError_t mma_sp_plan(std::int64_t n, std::int64_t k, int t, MmaSpPlan* plan) {
  if (mma_sp_shape_refusal(n, k, t) != nullptr || plan == nullptr) return cudaErrorInvalidValue;
  const int tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kUnitColumns);
  MmaSpPlan p;
  p.least_shared = cuda::kAloneBytes;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;

  // How many blocks share K. Each reads its part of x, so blocks of many rows and a short K read
  // little of x, but exchange more sums. Up to 2 tokens x is nothing; beyond, a block should have
  // 13 or more row tiles (below 9 tokens: or share with one other block).
  int at_once = 0, row_tiles = 0;
  for (p.cluster = t <= 32 ? 1 : 2;; p.cluster *= 2) {
    const cudaError_t error =
        cuda::ring_clusters_at_once<TwoOfFour<Bf16>>(p.token_tiles, p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
    const bool idle = tiles * 4 < at_once * 3;
    const bool enough = t <= 2 || row_tiles >= 13 || (t <= 8 && p.cluster >= 2);
    if ((enough && !idle) || p.cluster == cuda::kMaxCluster || units < 4 * p.cluster) break;
  }
  while (p.cluster > 1 && units < 2 * p.cluster) {
    p.cluster /= 2;
    const cudaError_t error =
        cuda::ring_clusters_at_once<TwoOfFour<Bf16>>(p.token_tiles, p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
  }
  const int part = ceil_div(units, p.cluster);

  // Two row tiles a warp halve the reads of x from shared memory; 6 to 9 warps are enough.
  p.tiles_per_warp = row_tiles == 1 ? 1 : p.token_tiles >= 4 && row_tiles > 16 ? 3 : 2;
  const int max_warps = TwoOfFour<Bf16>::max_warps(p.token_tiles, p.tiles_per_warp);
  const int most = max_warps - 1;
  const int waves = ceil_div(row_tiles, most * p.tiles_per_warp);
  if (waves > 1) row_tiles = ceil_div(tiles, static_cast<std::int64_t>(at_once) * waves);
  p.row_warps = ceil_div(row_tiles, p.tiles_per_warp);
  const int wanted_x_warps = t <= 2 ? 2 : t <= 8 ? 3 : t <= 16 ? 2 : 4;
  for (; p.row_warps >= 1; p.row_warps /= 2) {
    for (p.k_warps = std::clamp(8 / p.row_warps, 1, std::min(6, part)); p.k_warps >= 1;
         --p.k_warps) {
      const int warps = p.row_warps * p.k_warps;
      p.x_warps = std::min(wanted_x_warps, max_warps + 1 - warps);
      // Two or three copies in flight a warp and tile: more of them only make x wait.
      const bool long_stages = t <= 8 && part > 4 * p.k_warps;
      for (p.stage_units = long_stages ? 2 : 1; p.stage_units >= 1; --p.stage_units) {
        const int rounds = ceil_div(part, p.stage_units * p.k_warps);
        for (p.stages = std::min(t <= 8 && !long_stages ? 3 : 2, rounds); p.stages >= 1;
             --p.stages) {
          for (p.x_stages = std::min(3, rounds); p.x_stages >= std::min(2, rounds); --p.x_stages) {
            const std::size_t bytes = mma_sp_shared_bytes(p);
            if (bytes > 0 && bytes <= cuda::kMaxSharedBytes) {
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

template <class Half>
cudaError_t mma_sp_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                       int t, const MmaSpPlan& plan, bool overlap_previous, cudaStream_t stream) {
  if (mma_sp_shape_refusal(n, k, t) != nullptr) return cudaErrorInvalidValue;
  return cuda::ring_run<TwoOfFour<Half>>(packed, nullptr, x, y, n, k, t, plan, overlap_previous,
                                         stream);
}
template cudaError_t mma_sp_run<Bf16>(const void*, const void*, void*, std::int64_t, std::int64_t,
                                      int, const MmaSpPlan&, bool, cudaStream_t);
template cudaError_t mma_sp_run<Fp16>(const void*, const void*, void*, std::int64_t, std::int64_t,
                                      int, const MmaSpPlan&, bool, cudaStream_t);

namespace {

struct Call {
  std::int64_t t;
  std::variant<MmaSpPlan, WgmmaSpPlan> plan;  // few tokens or many
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
      .many_tokens = [](const GpuLayout* layout) -> int64_t {
        const auto [n, k] = held<MmaSpShape>(layout);
        return wgmma_sp_from_tokens(n, k);
      },
      .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
        const auto [n, k] = held<MmaSpShape>(layout);
        Call call{tokens, {}};
        const cudaError_t error =
            tokens <= kMmaSpMaxTokens
                ? mma_sp_plan(n, k, static_cast<int>(tokens), &std::get<MmaSpPlan>(call.plan))
                : wgmma_sp_plan(n, k, tokens, &call.plan.emplace<WgmmaSpPlan>());
        if (error == cudaSuccess) hold(plan, call);
        return error;
      },
      .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
      .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                void* y, void*, int overlap_previous, GpuStream stream) -> int {
        const auto [n, k] = held<MmaSpShape>(layout);
        const auto call = held<Call>(plan);
        if (const auto* many = std::get_if<WgmmaSpPlan>(&call.plan)) {
          return wgmma_sp_run<Half>(packed, x, y, n, k, call.t, *many,
                                    static_cast<cudaStream_t>(stream));
        }
        return mma_sp_run<Half>(packed, x, y, n, k, static_cast<int>(call.t),
                                std::get<MmaSpPlan>(call.plan), overlap_previous != 0,
                                static_cast<cudaStream_t>(stream));
      },
  };
}

}  // namespace

const GpuLinearKernel kMmaSp = kernel_of<Bf16>("cuda_sm90_mma_sp");
const GpuLinearKernel kMmaSpF16 = kernel_of<Fp16>("cuda_sm90_mma_sp_f16");

}  // namespace lacuna::kernels::linear_nm
