// Weights in units of one size whose every warp streams its own through a private ring of bulk
// copies: the `Weights` of sm90_stream.cuh that the kernels share which multiply a unit as it lies.
// What a unit is, they say in a class of their own:
//
//   struct Unit {
//     using Half;                         // what x and y are (halves.cuh)
//     static constexpr int kBytes;        // of 16 rows x 128 columns
//     static constexpr bool kScaled;      // each row has a factor (StreamParams::scales)
//     // Most warps of a block beside one producer of x: they decide how many registers there are.
//     static constexpr int max_warps(int token_tiles, int tiles_per_warp);
//     // Adds the product of unit w of MT row tiles, `tile_stage_bytes` apart in shared memory,
//     with
//     // the x of this lane (an address for ldmatrix) to the sums.
//     template <int NT, int MT>
//     static __device__ void multiply(float (&sums)[MT][NT][4], unsigned w, int tile_stage_bytes,
//                                     unsigned x, unsigned x_stride, int lane);
//   };
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "lacuna/kernels/cuda/sm90_stream.cuh"

namespace lacuna::kernels::cuda {

inline constexpr int kRingMaxTokens = 64;

// Stages of weights in flight while the kernel ahead still runs, whose own loads wait behind them
// (all of them at once cost 2 to 3 % of a decode step).
inline constexpr int kRingAhead = 1;

// More than half of a multiprocessor's shared memory: it holds one block, also of kernels that are
// launched before the one ahead is done. Else their blocks crowd where one ends early, and others
// find nothing to do (up to twice the time).
inline constexpr int kAloneBytes = 116 * 1024;

template <class Unit>
struct Ring {
  using Half = typename Unit::Half;
  static constexpr bool kAnyColumns = false;
  static constexpr bool kOrdered = false;
  static constexpr bool kScaled = Unit::kScaled;

  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    return Unit::max_warps(token_tiles, tiles_per_warp);
  }

  template <int MT>
  struct Reader {
    const StreamParams& p;
    const StreamSlice s;
    const unsigned full, ring;  // barriers and stages of this warp
    const int stage_bytes;
    int slot = 0;
    unsigned phase = 0;

    __device__ __forceinline__ Reader(const StreamParams& params, const StreamSlice& slice,
                                      unsigned shared_base)
        : p(params),
          s(slice),
          full(shared_base + 8 * slice.warp * params.stages),
          ring(shared_base + params.ring_offset +
               slice.warp * params.stages * MT * params.tile_stage_bytes),
          stage_bytes(params.tile_stage_bytes) {}

    // Fetches the round that starts at `unit` into ring slot `to`; for one lane.
    __device__ __forceinline__ void fill(int unit, int to) {
      const unsigned bytes = min(p.stage_units, s.own - unit) * Unit::kBytes;
      barrier_expect(full + 8 * to, MT * bytes);
      const std::uint64_t policy = evict_first();
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        // A tile past the end repeats the last one: its sums are never stored.
        const std::size_t tile = min(s.first_tile + m, p.row_tiles - 1);
        bulk_copy_once(ring + (to * MT + m) * stage_bytes,
                       p.weights + (tile * p.units + s.first + unit) * Unit::kBytes, bytes,
                       full + 8 * to, policy);
      }
    }

    __device__ __forceinline__ void start() {
      if (s.lane != 0) return;
#pragma unroll 1
      for (int i = 0; i < p.stages; ++i) barrier_init(full + 8 * i, 1);
      barrier_init_fence();
#pragma unroll 1
      for (int i = 0, unit = 0; i < p.at_once && unit < s.own; ++i, unit += s.span) fill(unit, i);
    }

    // What start() has left, once the next kernel may be launched.
    __device__ __forceinline__ void start_rest() {
      if (s.lane != 0) return;
#pragma unroll 1
      for (int i = p.at_once, unit = i * s.span; i < p.stages && unit < s.own;
           ++i, unit += s.span) {
        barrier_wait(full + 8 * (i - p.at_once), 0);
        fill(unit, i);
      }
    }

    template <int NT, class Wait>
    __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], int unit, unsigned x,
                                             unsigned x_stride, const Wait& wait_for_x) {
      wait_for_x();
      barrier_wait(full + 8 * slot, phase);
      const int units = min(p.stage_units, s.own - unit);
#pragma unroll 1
      for (int u = 0; u < units; ++u) {
        Unit::template multiply<NT, MT>(sums, ring + slot * MT * stage_bytes + u * Unit::kBytes,
                                        stage_bytes, x + u * (2 * kUnitColumns), x_stride, s.lane);
      }
    }

    // The round that starts at `unit` has been read.
    __device__ __forceinline__ void next(int unit) {
      const int later = unit + p.stages * s.span;
      if (s.lane == 0 && later < s.own) fill(later, slot);
      if (++slot == p.stages) {
        slot = 0;
        phase ^= 1;
      }
    }
  };
};

// ---------- host ----------

template <class Unit>
StreamKernel ring_kernel(int token_tiles, int tiles_per_warp) {
  using W = Ring<Unit>;
  switch (token_tiles * 16 + tiles_per_warp) {
    case 1 * 16 + 1:
      return stream_kernel<W, 1, 1>;
    case 1 * 16 + 2:
      return stream_kernel<W, 1, 2>;
    case 2 * 16 + 1:
      return stream_kernel<W, 2, 1>;
    case 2 * 16 + 2:
      return stream_kernel<W, 2, 2>;
    case 4 * 16 + 1:
      return stream_kernel<W, 4, 1>;
    case 4 * 16 + 2:
      return stream_kernel<W, 4, 2>;
    case 4 * 16 + 3:
      return stream_kernel<W, 4, 3>;
    case 8 * 16 + 1:
      return stream_kernel<W, 8, 1>;
    case 8 * 16 + 2:
      return stream_kernel<W, 8, 2>;
    case 8 * 16 + 3:
      return stream_kernel<W, 8, 3>;
    default:
      return nullptr;
  }
}

template <class Unit>
StreamShared ring_shared(const StreamPlan& plan) {
  return stream_shared(plan, plan.stage_units * Unit::kBytes, 0);
}

template <class Unit>
bool ring_plan_ok(const StreamPlan& p) {
  return ring_kernel<Unit>(p.token_tiles, p.tiles_per_warp) != nullptr &&
         stream_plan_ok(p, Ring<Unit>::max_warps(p.token_tiles, p.tiles_per_warp)) &&
         p.stages >= 1 && p.stages <= 16;
}

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
template <class Unit>
std::size_t ring_shared_bytes(const StreamPlan& plan) {
  return ring_plan_ok<Unit>(plan) ? ring_shared<Unit>(plan).bytes : 0;
}

// Clusters of blocks that this device can hold at one time, asked for once.
template <class Unit>
cudaError_t ring_clusters_at_once(int token_tiles, int cluster, int* count) {
  static std::atomic<int> known[9][16][9];  // [token tiles]
  return clusters_at_once(ring_kernel<Unit>(token_tiles, 2), cluster, known[token_tiles], count);
}

// y = x W^T. @param scales  of the rows, up to a multiple of 16 of them, where Unit::kScaled
template <class Unit>
cudaError_t ring_run(const void* packed, const float* scales, const void* x, void* y,
                     std::int64_t n, std::int64_t k, int t, const StreamPlan& plan,
                     bool overlap_previous, cudaStream_t stream) {
  const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
  if (!ring_plan_ok<Unit>(plan) || t > plan.token_tiles * 8 || packed == nullptr || x == nullptr ||
      y == nullptr || at(packed) % 16 != 0 || at(x) % 16 != 0 ||
      at(y) % (n % 4 == 0 ? 8 : 2) != 0) {
    return cudaErrorInvalidValue;
  }
  StreamParams p = {};
  p.weights = static_cast<const unsigned char*>(packed);
  p.scales = scales;
  p.x = static_cast<const unsigned short*>(x);
  p.y = static_cast<unsigned short*>(y);
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.t = t;
  p.at_once = overlap_previous ? std::min(kRingAhead, plan.stages) : plan.stages;
  return stream_launch(ring_kernel<Unit>(plan.token_tiles, plan.tiles_per_warp), p, plan,
                       ring_shared<Unit>(plan), overlap_previous, stream);
}

}  // namespace lacuna::kernels::cuda
