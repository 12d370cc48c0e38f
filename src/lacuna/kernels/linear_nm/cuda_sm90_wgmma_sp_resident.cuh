// The idea: for 17 to 64 tokens a product still costs what its weights cost to read, and x in codes
// is small enough to lie in shared memory: all tokens, and the columns of a block. So W alone
// streams, as in the decode kernels (every warp through a ring of its own), and the tensor cores of
// a warpgroup take x for 64 rows at a time.
//
//   A cluster: 1, 2, 4 or 8 blocks that split K and share rows, as many as every other cluster (to
//   within 16). Its warpgroups take turns at 64 of them:
//
//            x: tokens x columns of the block, swizzled
//           +------+------+------+- ...       unit: 128 columns
//     W     |unit 0|unit 1|
//    +---+  +------+------+
//    | 16 rows of warp 0: ring of units |     sums of 64 rows in registers, then 8 tokens at a time
//    to | 16 rows of warp 1                |     the block they belong to, which adds them up in
//    the | ...                              |     order of the blocks and stores y
//
// What differs between weights is the unit (cuda_sm90_wgmma_sp_tiles.cuh), of one part.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "lacuna/kernels/cuda/sm90_stream.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_resident_plan.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp_tiles.cuh"

namespace lacuna::kernels::linear_nm {

struct ResidentParams {
  const unsigned char* weights;
  const float *scales, *x_scales;  // of rows and tokens
  __nv_bfloat16* y;
  int n, t, row_tiles, units;
  int clusters, cluster_log2, groups, stages, ahead;
  int ring_offset, received_offset, scale_offset, barrier_offset;
};

// Registers for kTokens / 2 sums decide.
template <int kTokens>
inline constexpr int kMostGroups = kTokens <= 32 ? 4 : 3;

template <class Unit, int kTokens>
__global__ void __launch_bounds__(kMostGroups<kTokens> * 128 + 32, 1)
    resident_kernel(const ResidentParams p, const __grid_constant__ CUtensorMap x_map) {
  constexpr int kOctets = kTokens / 8;
  constexpr int kUnitBytes = Unit::kBytes, kStageBytes = 2 * kUnitBytes;
  static_assert(Unit::kElementBytes == 1 && Unit::kScaled);
  extern __shared__ unsigned char memory[];
  const unsigned shared = (cuda::shared_address(memory) + 1023) & ~1023u;
  const unsigned x = kept(shared);  // (for descriptors)
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int warps = p.groups * 4;
  const int cluster = 1 << p.cluster_log2, others = cluster - 1;
  const int rank = static_cast<int>(blockIdx.x) & others;
  const int index = static_cast<int>(blockIdx.x) >> p.cluster_log2;
  const int first_unit = (rank * p.units) >> p.cluster_log2;
  const int part = (((rank + 1) * p.units) >> p.cluster_log2) - first_unit;
  const int first_tile = static_cast<int>(static_cast<long long>(p.row_tiles) * index / p.clusters);
  const int last_tile =
      static_cast<int>(static_cast<long long>(p.row_tiles) * (index + 1) / p.clusters);
  // Barriers: [warp][stage] W has come; [warp] sums of the other blocks have come; [warp] they have
  // read mine; [unit] x has come.
  const unsigned w_full = shared + p.barrier_offset + 8 * warp * p.stages;
  const unsigned received = shared + p.barrier_offset + 8 * (warps * p.stages + warp);
  const unsigned free = received + 8 * warps;
  const unsigned x_full = shared + p.barrier_offset + 8 * warps * (p.stages + 2);
  const unsigned scales = shared + p.scale_offset;

  if (warp == warps) {  // Fetches x.
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < part; ++i) cuda::barrier_init(x_full + 8 * i, 1);
      cuda::barrier_init_fence();
    }
    __syncwarp();
    __syncthreads();
    cuda::cluster_arrive_relaxed();
    cuda::launch_next();
    if (lane == 0) fetch_map(x_map);
    cuda::await_previous();
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < part; ++i) {
        cuda::barrier_expect(x_full + 8 * i, p.t * kSlotBytes);
        tile_copy(shared + i * kTokens * kSlotBytes, x_map, (first_unit + i) * kUnitColumns, 0,
                  x_full + 8 * i);
      }
    }
    __syncwarp();
    cuda::cluster_wait();
  } else {
    const int group = warp >> 2;
    const unsigned ring = shared + p.ring_offset + warp * p.stages * kStageBytes;
    // The rows of the cluster in as many tiles as its warpgroups take turns, all alike (to within
    // 16 rows): else some would have nothing to do at the end.
    const int row_tiles = last_tile - first_tile;
    const int turns = (row_tiles + warps - 1) / warps, tiles = turns * p.groups;
    const auto begin_of = [&](int tile) { return first_tile + row_tiles * tile / tiles; };
    // What this warp reads of W: `part` units of its row of each tile that has one for it.
    int fetch_turn = -1, units_left = 0;
    const unsigned char* from = nullptr;
    const auto fetch = [&](int slot) {  // by one lane
      while (units_left <= 0) {
        if (++fetch_turn >= turns) {
          fetch_turn = turns;
          return;
        }
        const int tile = fetch_turn * p.groups + group;
        const int row_tile = begin_of(tile) + (warp & 3);
        if (row_tile >= begin_of(tile + 1)) continue;
        from = p.weights + (static_cast<std::size_t>(row_tile) * p.units + first_unit) * kUnitBytes;
        units_left = part;
      }
      const int bytes = units_left > 1 ? kStageBytes : kUnitBytes;
      cuda::barrier_expect(w_full + 8 * slot, bytes);
      cuda::bulk_copy_once(ring + slot * kStageBytes, from, bytes, w_full + 8 * slot,
                           cuda::evict_first());
      from += bytes;
      units_left -= 2;
    };
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < p.stages; ++i) cuda::barrier_init(w_full + 8 * i, 1);
      cuda::barrier_init(received, 1);
      if (others > 0) cuda::barrier_init(free, others);
      cuda::barrier_init_fence();
#pragma unroll 1
      for (int i = 0; i < p.ahead; ++i) fetch(i);
    }
    __syncwarp();
    __syncthreads();
    cuda::cluster_arrive_relaxed();
    cuda::launch_next();
    cuda::await_previous();
    if (lane == 0) {
#pragma unroll 1
      for (int i = p.ahead; i < p.stages; ++i) fetch(i);
    }
    __syncwarp();
#pragma unroll 1
    for (int i = threadIdx.x; i < kTokens; i += warps * 32) {
      store_shared1(scales + 4 * i, i < p.t ? p.x_scales[i] : 0.f);
    }
    cuda::barrier_of_warps(1, warps);
    cuda::cluster_wait();  // All blocks have started: sums may be stored into their memory.

    const typename Unit::Where where = Unit::where(lane);
    int slot = 0;
    unsigned phase = 0;
    using Fragments = typename Unit::Fragments;
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      const int tile = turn * p.groups + group, row_tile = begin_of(tile) + (warp & 3);
      const bool active = row_tile < begin_of(tile + 1);
      float row_scale[2] = {0.f, 0.f};
      if (active) {
        row_scale[0] = __ldg(p.scales + row_tile * kTileRows + (lane >> 2));
        row_scale[1] = __ldg(p.scales + row_tile * kTileRows + (lane >> 2) + 8);
      }
      typename Unit::Sum sums[kTokens / 2];
      Fragments even, odd;
      const auto load = [&](Fragments& f, int second) {
        if (active) {
          Unit::template load<0>(f, ring + slot * kStageBytes + second * kUnitBytes, where);
        } else {
          f = Unit::nothing();
        }
      };
      const auto multiply = [&](const Fragments& f, int unit) {
        if (turn == 0) cuda::barrier_wait(x_full + 8 * unit, 0);
        wgmma_fence();
        Unit::multiply(sums, f, swizzled_descriptor(x + unit * kTokens * kSlotBytes), unit > 0);
        wgmma_commit();
      };
#pragma unroll 1
      for (int unit = 0; unit < part; unit += 2) {
        if (active) cuda::barrier_wait(w_full + 8 * slot, phase);
        if (unit > 0) wgmma_wait<1>();  // `even` may be written, then `odd`
        load(even, 0);
        multiply(even, unit);
        if (unit + 1 < part) {
          if (unit > 0) wgmma_wait<1>();
          load(odd, 1);
          multiply(odd, unit + 1);
        }
        // wgmma has what was loaded: the slot may be filled again.
        if (active) {
          if (lane == 0) fetch(slot);
          if (++slot == p.stages) {
            slot = 0;
            phase ^= 1;
          }
        }
      }
      wgmma_wait<0>();
      hold_sums(sums);

      // Tokens 8j .. 8j + 7 belong to block j % cluster.
      if (others > 0) {
        if (turn > 0) cuda::barrier_wait(free, (turn - 1) & 1);
        const int most = (kOctets + others) >> p.cluster_log2;  // of a block
        if (lane == 0) {
          const int own = (kOctets - rank + others) >> p.cluster_log2;
          cuda::barrier_expect(received, others * own * 512);
        }
        __syncwarp();
#pragma unroll
        for (int j = 0; j < kOctets; ++j) {
          const int owner = j & others;
          if (owner == rank) continue;
          const int sender = rank - (rank > owner);
          const unsigned to = shared + p.received_offset + lane * 16 +
                              ((warp * others + sender) * most + (j >> p.cluster_log2)) * 512;
          const float v[4] = {static_cast<float>(sums[4 * j]), static_cast<float>(sums[4 * j + 1]),
                              static_cast<float>(sums[4 * j + 2]),
                              static_cast<float>(sums[4 * j + 3])};
          cuda::store_cluster4(cuda::cluster_address(to, owner), v,
                               cuda::cluster_address(received, owner));
        }
        cuda::barrier_wait_cluster(received, turn & 1);
      }
#pragma unroll
      for (int j = 0; j < kOctets; ++j) {
        if ((j & others) != rank) continue;
        float v[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) v[i] = static_cast<float>(sums[4 * j + i]);
        const int most = (kOctets + others) >> p.cluster_log2;
        const unsigned at = shared + p.received_offset + lane * 16 +
                            (warp * others * most + (j >> p.cluster_log2)) * 512;
#pragma unroll 1
        for (int sender = 0; sender < others; ++sender) {
          const uint4 other = cuda::load_shared4(at + sender * most * 512);
          v[0] += __uint_as_float(other.x);
          v[1] += __uint_as_float(other.y);
          v[2] += __uint_as_float(other.z);
          v[3] += __uint_as_float(other.w);
        }
        if (8 * j >= p.t) continue;
        const float2 token_scale = load_shared_floats(scales + (8 * j + (lane & 3) * 2) * 4);
        // Turned, a lane has two rows of one token.
        const unsigned low = turn_matrix(scaled_pack(v[0], v[1], row_scale[0], token_scale));
        const unsigned high = turn_matrix(scaled_pack(v[2], v[3], row_scale[1], token_scale));
        const int token = 8 * j + (lane >> 2), row = row_tile * kTileRows + (lane & 3) * 2;
        if (token >= p.t || !active) continue;
        unsigned short* const y =
            reinterpret_cast<unsigned short*>(p.y) + static_cast<std::size_t>(token) * p.n + row;
        if (p.n % 2 == 0) {
          if (row < p.n) *reinterpret_cast<unsigned*>(y) = low;
          if (row + 8 < p.n) *reinterpret_cast<unsigned*>(y + 8) = high;
        } else {
          if (row < p.n) y[0] = low & 0xffff;
          if (row + 1 < p.n) y[1] = low >> 16;
          if (row + 8 < p.n) y[8] = high & 0xffff;
          if (row + 9 < p.n) y[9] = high >> 16;
        }
      }
      if (others > 0) {  // What I was sent has been read (and has gone into y).
        __syncwarp();
        if (lane < others) {
          barrier_arrive_in_cluster(cuda::cluster_address(free, lane + (lane >= rank)));
        }
      }
    }
  }
  // No block leaves while another may still write into its memory.
  cuda::cluster_arrive();
  cuda::cluster_wait();
}

// ---------- host ----------

using ResidentKernel = void (*)(const ResidentParams, const CUtensorMap);

template <class Unit>
ResidentKernel resident_kernel_of(int tokens) {
  return tokens == 32 ? resident_kernel<Unit, 32> : resident_kernel<Unit, 64>;
}

struct ResidentShared {
  int ring_offset, received_offset, scale_offset, barrier_offset, bytes;
};

template <class Unit>
ResidentShared resident_shared(const ResidentPlan& plan, std::int64_t units) {
  const int warps = plan.groups * 4, octets = plan.tokens / 8;
  const int part = static_cast<int>(ceil_div(units, plan.cluster));
  ResidentShared s;
  s.ring_offset = part * plan.tokens * kSlotBytes;
  s.received_offset = s.ring_offset + warps * plan.stages * 2 * Unit::kBytes;
  s.scale_offset = s.received_offset + warps * (plan.cluster - 1) *
                                           static_cast<int>(ceil_div(octets, plan.cluster)) * 512;
  s.barrier_offset = s.scale_offset + plan.tokens * 4;
  s.bytes = s.barrier_offset + 8 * (warps * (plan.stages + 2) + part) + 1024;
  return s;
}

template <class Unit>
bool resident_plan_ok(const ResidentPlan& p, std::int64_t units) {
  const bool shape =
      (p.tokens == 32 || p.tokens == 64) && p.groups >= 1 &&
      p.groups <= (p.tokens == 32 ? kMostGroups<32> : kMostGroups<64>)&&p.cluster >= 1 &&
      p.cluster <= 8 && (p.cluster & (p.cluster - 1)) == 0 && p.stages >= 1 && p.stages <= 32 &&
      p.ahead >= 0 && p.ahead <= p.stages;
  // (Many units would overflow the offsets.)
  return shape && units >= p.cluster &&
         units / p.cluster * p.tokens * kSlotBytes < kMaxSharedBytes &&
         resident_shared<Unit>(p, units).bytes <= kMaxSharedBytes;
}

// Clusters of blocks with all the shared memory that this device can hold at one time.
template <class Unit>
cudaError_t resident_clusters_at_once(int tokens, int cluster, int* count) {
  static std::atomic<int> known[2][16][9];
  return cuda::clusters_at_once(resident_kernel_of<Unit>(tokens), cluster,
                                known[tokens == 32 ? 0 : 1], count);
}

// y = x W^T, x and x_scales being written by the kernel ahead in the stream.
template <class Unit>
cudaError_t resident_run(const void* packed, const float* scales, const void* x,
                         const float* x_scales, void* y, std::int64_t n, std::int64_t k, int t,
                         const ResidentPlan& plan, cudaStream_t stream) {
  const std::int64_t units = k / kUnitColumns;
  if (t < 1 || t > plan.tokens || !resident_plan_ok<Unit>(plan, units) || !aligned(packed) ||
      !aligned(x) || y == nullptr ||
      reinterpret_cast<std::uintptr_t>(y) % (n % 2 == 0 ? 4 : 2) != 0) {
    return cudaErrorInvalidValue;
  }
  const auto kernel = resident_kernel_of<Unit>(plan.tokens);
  int clusters = 0;
  cudaError_t error = resident_clusters_at_once<Unit>(plan.tokens, plan.cluster, &clusters);
  if (error != cudaSuccess) return error;
  const ResidentShared shared = resident_shared<Unit>(plan, units);
  ResidentParams p = {};
  p.weights = static_cast<const unsigned char*>(packed);
  p.scales = scales;
  p.x_scales = x_scales;
  p.y = static_cast<__nv_bfloat16*>(y);
  p.n = static_cast<int>(n);
  p.t = t;
  p.row_tiles = static_cast<int>(ceil_div(n, kTileRows));
  p.units = static_cast<int>(units);
  p.clusters = std::min(clusters, p.row_tiles);
  p.cluster_log2 = plan.cluster == 1 ? 0 : plan.cluster == 2 ? 1 : plan.cluster == 4 ? 2 : 3;
  p.groups = plan.groups;
  p.stages = plan.stages;
  p.ahead = plan.ahead;
  p.ring_offset = shared.ring_offset;
  p.received_offset = shared.received_offset;
  p.scale_offset = shared.scale_offset;
  p.barrier_offset = shared.barrier_offset;
  CUtensorMap x_map;
  error = make_map(x, t, k, Unit::kElementBytes, t, &x_map);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[0].val.programmaticStreamSerializationAllowed = 1;
  attributes[1].id = cudaLaunchAttributeClusterDimension;
  attributes[1].val.clusterDim = {static_cast<unsigned>(plan.cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = static_cast<unsigned>(p.clusters * plan.cluster);
  config.blockDim = static_cast<unsigned>(plan.groups * 128 + 32);
  config.dynamicSmemBytes = static_cast<std::size_t>(shared.bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return cudaLaunchKernelEx(&config, kernel, p, x_map);
}

}  // namespace lacuna::kernels::linear_nm
