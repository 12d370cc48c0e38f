// What the kernels that stream packed weights through the tensor cores of sm_90a share: the copies,
// barriers and clusters, and the kernel around a kind of weights (its `Weights`). Only they differ
// in how a unit of 16 rows x 128 columns is fetched and multiplied.
//
// A block: row_warps x k_warps consumers and 1..4 producers of x. One round = stage_units units for
// each consumer:
//
//              k warp 0    k warp 1   |  round 1 ...
//            +-----------+-----------+
//   row warp | own ring  | own ring  |  MT row tiles each, sums in registers over all rounds
//      0     +-----------+-----------+
//      1     |           |           |  x of the round: t tokens, each row 16 bytes longer
//            +-----------+-----------+  (ldmatrix meets no conflict), one ring for the block
//
//   then fragment f (16 rows x 8 tokens) goes to slot f / cluster of block f % cluster: st.shared
//   at home, st.async to the others. Each block adds its slots in a fixed order and stores y.
//
// Blocks of a cluster share rows and split K, so that each reads a part of x only.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "lacuna/kernels/cuda/halves.cuh"
#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_stream_plan.h"

namespace lacuna::kernels::cuda {

inline constexpr int kTileRows = 16;
inline constexpr int kUnitColumns = 128;
inline constexpr int kStepBytes = 512;  // values of 16 rows x 32 columns, 2 of 4
inline constexpr int kSteps = kUnitColumns / 32;
inline constexpr int kMaxSharedBytes = 227 * 1024;
inline constexpr int kMaxCluster = 8;

// A warp's sums of 16 rows and 8 tokens, as the tensor cores leave them: [lane][4].
inline constexpr int kFragmentFloats = kTileRows * 8;

// Not more than 128 bytes: the compiler makes other, longer code of more.
struct StreamParams {
  const unsigned char* weights;
  union {
    const float* scales;  // of the rows, where Weights::kScaled
    // Where Weights::kOrdered: of every four packed rows the four of y that they are, -1: none;
    // null: the same.
    const int* row_fours;
  };
  const unsigned short* x;  // Weights::Half, as y
  unsigned short* y;
  int n, k, t;
  int row_tiles, units;
  int row_warps, k_warps, stage_units, stages, x_stages, x_first, producers;
  int row_warps_inverse;  // 2^16 / row_warps, rounded up
  int at_once;            // stages of weights in flight before the kernel ahead is done
  int cluster_log2;
  int unit_bytes;        // from one unit to the next
  int fours;             // of entries in a unit (cuda_sm90_scatter)
  int tile_stage_bytes;  // of one row tile in a stage of a ring
  int ring_offset, scratch_offset, x_offset, sums_offset;  // bytes from the start of shared memory
  bool sums_apart;                                         // not in the memory of the rings
};
static_assert(sizeof(StreamParams) <= 128);

// The part of the weights that one warp multiplies: rounds r = 0.. of up to stage_units units,
// r * span units after `first`, as long as r * span < own.
struct StreamSlice {
  int warp, lane;
  int first_tile;  // of MT row tiles
  int first;       // unit of its first round
  int own, span;
};

// Says only that this thread came here (the mbarriers it made are published by their own fence).
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
}

// Waits for bytes that other blocks of the cluster store.
__device__ __forceinline__ void barrier_wait_cluster(unsigned barrier, unsigned phase) {
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{\n .reg .pred p;\n"
        " mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        " selp.u32 %0, 1, 0, p;\n}"
        : "=r"(done)
        : "r"(barrier), "r"(phase)
        : "memory");
  }
}

__device__ __forceinline__ void store_shared4(unsigned address, const float (&v)[4]) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v[0]), "f"(v[1]),
               "f"(v[2]), "f"(v[3])
               : "memory");
}

// Stores into another block of the cluster; its barrier counts the bytes when they have come.
__device__ __forceinline__ void store_cluster4(unsigned address, const float (&v)[4],
                                               unsigned barrier) {
  asm volatile(
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, "
      "[%5];" ::"r"(address),
      "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier)
      : "memory");
}

// Among some warps of the block, each at a bar.sync of its own code path.
__device__ __forceinline__ void barrier_of_warps(int name, int warps) {
  asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(warps * 32) : "memory");
}

__device__ __forceinline__ uint2 load_shared2(unsigned address) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ uint4 load_matrices(unsigned address) {
  uint4 v;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}

// Instructions are cold at every launch: what runs once is kept short (no unrolling, no division)
// and away from the first copies.
template <class Weights, int NT, int MT>
__global__ void __launch_bounds__((Weights::max_warps(NT, MT) + 1) * 32, 1)
    stream_kernel(const StreamParams p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned shared_base = shared_address(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int warps = p.row_warps * p.k_warps;
  const int cluster = 1 << p.cluster_log2;
  const int rank = static_cast<int>(blockIdx.x) & (cluster - 1);
  const int row_group = static_cast<int>(blockIdx.x) >> p.cluster_log2;
  const int first_unit = (rank * p.units) >> p.cluster_log2;
  const int part = (((rank + 1) * p.units) >> p.cluster_log2) - first_unit;  // units of this block
  const int span = p.stage_units * p.k_warps;                                // units of one round
  const unsigned x_stride = span * (2 * kUnitColumns) + 16;  // 16 more: ldmatrix meets no conflict
  const unsigned x_stage_bytes = NT * 8 * x_stride;
  const int block_fragments = p.row_warps * MT * NT;
  const int slots = (block_fragments + cluster - 1) >> p.cluster_log2;  // fragments summed here

  // Barriers: [warp][stage] weights have come; [x stage] x has come; [x stage] x has been read; the
  // sums of the cluster's other blocks have come.
  const unsigned x_full = shared_base + 8 * warps * p.stages;
  const unsigned x_empty = x_full + 8 * p.x_stages;
  const unsigned sums_full = x_empty + 8 * p.x_stages;

  if (warp >= warps) {                // A producer of x.
    constexpr bool kLoads = NT == 1;  // by loads of 16 bytes; else by bulk copies, one a token
    const int producer = warp - warps;
    auto fetch = [&](int unit, int stage) {
      const unsigned to = shared_base + p.x_offset + stage * x_stage_bytes;
      const unsigned short* from = p.x + (first_unit + unit) * kUnitColumns;
      const int units = min(span, part - unit);
      int bytes = units * (2 * kUnitColumns);  // of one token
      if constexpr (Weights::kAnyColumns) {    // Beyond the last column x is zero.
        const int left = 2 * (p.k - (first_unit + unit) * kUnitColumns);
        if (left < bytes) {
#pragma unroll 1
          for (int token = producer; token < p.t; token += p.producers) {
#pragma unroll 1
            for (int i = left + 16 * lane; i < bytes; i += 512) {
              store_shared4(to + token * x_stride + i, {0.f, 0.f, 0.f, 0.f});
            }
          }
          bytes = left;
          __threadfence_block();
          __syncwarp();
        }
      }
      if constexpr (kLoads) {
        const int pieces = bytes / 16;
        const int shift = pieces < 32 ? 4 : 5;  // 16 or 32 lanes side by side on it
        const int column = lane & ((1 << shift) - 1);
#pragma unroll 2
        for (int token = producer * (32 >> shift) + (lane >> shift); token < p.t;
             token += p.producers * (32 >> shift)) {
          const unsigned short* row = from + static_cast<std::size_t>(token) * p.k;
#pragma unroll 1
          for (int i = column; i < pieces; i += 1 << shift) {
            copy16(to + token * x_stride + i * 16, row + i * 8);
          }
        }
        barrier_arrive_after_copies(x_full + 8 * stage);
      } else {
        if (lane == 0) {
          const int tokens = (p.t - producer + p.producers - 1) / p.producers;
          barrier_expect(x_full + 8 * stage, max(tokens, 0) * bytes);
        }
        __syncwarp();
#pragma unroll 1
        for (int token = producer + lane * p.producers; token < p.t; token += 32 * p.producers) {
          bulk_copy(to + token * x_stride, from + static_cast<std::size_t>(token) * p.k, bytes,
                    x_full + 8 * stage);
        }
      }
    };
    if (warp == warps && lane == 0) {
#pragma unroll 1
      for (int s = 0; s < p.x_stages; ++s) {
        barrier_init(x_full + 8 * s, kLoads ? 32 * p.producers : p.producers);
        barrier_init(x_empty + 8 * s, warps);
      }
      barrier_init(sums_full, 1);
      barrier_init_fence();
    }
    barrier_of_warps(1, p.producers);
    // Copies are served in turn, and an x that comes late waits for every weight in flight. So the
    // first stages of x are asked for at once, unless the previous kernel may still write x.
    int unit = 0, stage = 0;
    unsigned phase = 1;
#pragma unroll 1
    for (; stage < p.x_first && unit < part; ++stage, unit += span) fetch(unit, stage);
    if (p.cluster_log2 > 0) {
      if (warp == warps && lane == 0) {
        const int fragments = (block_fragments - rank + cluster - 1) >> p.cluster_log2;
        barrier_expect(sums_full, (cluster - 1) * p.k_warps * fragments * (kFragmentFloats * 4));
      }
      __syncwarp();
      cluster_arrive_relaxed();  // I have started: others may store into my memory.
    }
    barrier_of_warps(2, warps + p.producers);
    launch_next();
    await_previous();
    bool full = false;  // all stages of x are in use
#pragma unroll 1
    for (; unit < part; unit += span) {
      if (stage == p.x_stages) {
        stage = 0;
        phase ^= 1;
        full = true;
      }
      if (full) barrier_wait(x_empty + 8 * stage, phase);
      fetch(unit, stage);
      ++stage;
    }
    if (p.cluster_log2 > 0) cluster_wait();
    if (!p.sums_apart) {
      if (p.cluster_log2 > 0) {
        cluster_arrive();
        cluster_wait();
      } else {
        barrier_of_warps(2, warps + p.producers);
      }
    }
  } else {  // A consumer: fetches its own weights and multiplies.
    const int k_warp = (warp * p.row_warps_inverse) >> 16, row_warp = warp - k_warp * p.row_warps;
    const int first_tile = (row_group * p.row_warps + row_warp) * MT;
    const int own = part - k_warp * p.stage_units;  // of a round that starts at u, own - u are mine
    typename Weights::template Reader<MT> reader(
        p, {warp, lane, first_tile, first_unit + part - own, own, span}, shared_base);
    reader.start();
    __syncwarp();
    if (p.cluster_log2 > 0) cluster_arrive_relaxed();
    barrier_of_warps(2, warps + p.producers);
    launch_next();
    reader.start_rest();
    __syncwarp();
    // A fragment has rows g and g + 8 of its tile in lanes 4g..4g+3.
    [[maybe_unused]] float scale[MT][2];
    if constexpr (Weights::kScaled) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const float* of = p.scales + min(first_tile + m, p.row_tiles - 1) * kTileRows + (lane >> 2);
        scale[m][0] = __ldg(of);
        scale[m][1] = __ldg(of + 8);
      }
    }

    float sums[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.f;

    int x_stage = 0;
    unsigned x_phase = 0;
    const unsigned x_lane = shared_base + p.x_offset + (lane & 7) * x_stride + (lane >> 3) * 16 +
                            k_warp * p.stage_units * (2 * kUnitColumns);
#pragma unroll 1
    for (int unit = 0; unit < part; unit += span) {
      const unsigned x = x_lane + x_stage * x_stage_bytes;
      const auto wait_for_x = [&] { barrier_wait(x_full + 8 * x_stage, x_phase); };
      if (unit < own) {
        reader.template multiply<NT>(sums, unit, x, x_stride, wait_for_x);
      } else {
        wait_for_x();
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(x_empty + 8 * x_stage);
      if (unit < own) reader.next(unit);
      if (++x_stage == p.x_stages) {
        x_stage = 0;
        x_phase ^= 1;
      }
    }

    if (p.cluster_log2 > 0) cluster_wait();  // All blocks of the cluster have started.
    if (!p.sums_apart) {                     // All their rings must have been read.
      if (p.cluster_log2 > 0) {
        cluster_arrive();
        cluster_wait();
      } else {
        barrier_of_warps(2, warps + p.producers);
      }
    }
    // Fragment f of the block goes to slot f / cluster of block f % cluster.
    const unsigned out = shared_base + p.sums_offset + lane * 16 +
                         (rank * p.k_warps + k_warp) * slots * (kFragmentFloats * 4);
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const int f = (row_warp * MT + m) * NT + j;
        if constexpr (Weights::kScaled) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[m][j][i] *= scale[m][i >> 1];
        }
        const unsigned q = out + (f >> p.cluster_log2) * (kFragmentFloats * 4);
        const int owner = f & (cluster - 1);
        if (owner == rank) {
          store_shared4(q, sums[m][j]);
        } else {
          store_cluster4(cluster_address(q, owner), sums[m][j], cluster_address(sums_full, owner));
        }
      }
  }
  __syncthreads();
  if (p.cluster_log2 > 0) barrier_wait_cluster(sums_full, 0);

  // All warps: add up the parts of K in their order, four rows of one token a lane, and store. A
  // fragment lies as the tensor cores leave it: lane 4g+t has rows g and g+8 of tokens 2t and 2t+1.
  // Neighbours take the four rows in different turns, else they would meet in one bank.
  const int parts = p.k_warps << p.cluster_log2;
  const int part_floats = slots * kFragmentFloats;
  const int quarter = lane & 3, token_lane = lane >> 2, odd = quarter & 1;
#pragma unroll 1
  for (int s = warp; s < slots; s += warps + p.producers) {
    const int f = (s << p.cluster_log2) + rank;
    if (f >= block_fragments) break;
    const float* q = reinterpret_cast<const float*>(shared + p.sums_offset) + s * kFragmentFloats +
                     odd * 64 + (quarter >> 1) * 2 + (token_lane >> 1) * 4 + (token_lane & 1);
    float turn[4] = {};
#pragma unroll 2
    for (int i = 0; i < parts; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) turn[j] += q[(j ^ odd) * 16];
      q += part_floats;
    }
    const float v[4] = {odd ? turn[1] : turn[0], odd ? turn[0] : turn[1], odd ? turn[3] : turn[2],
                        odd ? turn[2] : turn[3]};
    int row = (row_group * p.row_warps * MT + f / NT) * kTileRows + quarter * 4;
    const int token = (f % NT) * 8 + token_lane;
    if (token >= p.t) continue;
    if constexpr (Weights::kOrdered) {
      if (p.row_fours != nullptr) {
        const int four = row < p.row_tiles * kTileRows ? __ldg(p.row_fours + row / 4) : -1;
        row = four < 0 ? p.n : 4 * four;
      }
    }
    store_four<typename Weights::Half>(p.y + static_cast<std::size_t>(token) * p.n + row, v,
                                       p.n - row, p.n % 4 == 0);
  }
}

// ---------- host ----------

inline int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

using StreamKernel = void (*)(const StreamParams);

struct StreamShared {
  int tile_stage_bytes, ring_offset, scratch_offset, x_offset, sums_offset, bytes;
  bool sums_apart;
};

// `tile_stage_bytes`: of one row tile in a stage of a warp's ring, 0 without a ring;
// `scratch_bytes`: of one row tile of a warp.
inline StreamShared stream_shared(const StreamPlan& plan, int tile_stage_bytes, int scratch_bytes) {
  const int warps = plan.row_warps * plan.k_warps;
  StreamShared s;
  s.tile_stage_bytes = tile_stage_bytes;
  s.ring_offset = (8 * (warps * plan.stages + 2 * plan.x_stages + 1) + 127) / 128 * 128;
  s.scratch_offset = s.ring_offset + warps * plan.stages * plan.tiles_per_warp * tile_stage_bytes;
  s.x_offset = s.scratch_offset + warps * plan.tiles_per_warp * scratch_bytes;
  const int x_stride = plan.stage_units * plan.k_warps * 2 * kUnitColumns + 16;
  const int x_end = s.x_offset + plan.x_stages * plan.token_tiles * 8 * x_stride;
  const int fragments = plan.row_warps * plan.tiles_per_warp * plan.token_tiles;
  const int sums = plan.cluster * plan.k_warps * ((fragments + plan.cluster - 1) / plan.cluster) *
                   (kFragmentFloats * 4);
  s.sums_apart = x_end + sums <= kMaxSharedBytes;
  s.sums_offset = s.sums_apart ? x_end : s.ring_offset;
  s.bytes = std::max(x_end, s.sums_offset + sums);
  return s;
}

inline bool stream_plan_ok(const StreamPlan& p, int max_warps) {
  const int warps = p.row_warps * p.k_warps;
  return p.row_warps >= 1 && p.k_warps >= 1 && p.x_warps >= 1 && p.x_warps <= 4 &&
         warps + p.x_warps <= max_warps + 1 && p.stage_units >= 1 && p.stage_units <= 8 &&
         p.x_stages >= 1 && p.x_stages <= 16 && p.x_first >= 0 && p.cluster >= 1 &&
         p.cluster <= kMaxCluster && (p.cluster & (p.cluster - 1)) == 0;
}

// Clusters of blocks with all the shared memory that this device can hold at one time. The driver
// is asked once: plans are made by the thousand.
template <class Kernel>
cudaError_t clusters_at_once(Kernel kernel, int cluster, std::atomic<int> (&known)[16][9],
                             int* count) {
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>* answer = device < 16 ? &known[device][cluster] : nullptr;
  if (answer != nullptr && (*count = answer->load()) > 0) return cudaSuccess;
  error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kMaxSharedBytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = 1;
  attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(256);
  config.dynamicSmemBytes = kMaxSharedBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  error = cudaOccupancyMaxActiveClusters(count, kernel, &config);
  if (error == cudaSuccess && *count < 1) error = cudaErrorNotSupported;
  if (error == cudaSuccess && answer != nullptr) answer->store(*count);
  return error;
}

// Sets what the plan and the shared memory decide, and launches. The caller has set the operands
// and the shape.
inline cudaError_t stream_launch(StreamKernel kernel, StreamParams p, const StreamPlan& plan,
                                 const StreamShared& shared, bool overlap_previous,
                                 cudaStream_t stream) {
  p.row_tiles = ceil_div(p.n, kTileRows);
  p.units = ceil_div(p.k, kUnitColumns);
  p.row_warps = plan.row_warps;
  p.k_warps = plan.k_warps;
  p.stage_units = plan.stage_units;
  p.stages = plan.stages;
  p.x_stages = plan.x_stages;
  p.cluster_log2 = plan.cluster == 1 ? 0 : plan.cluster == 2 ? 1 : plan.cluster == 4 ? 2 : 3;
  p.tile_stage_bytes = shared.tile_stage_bytes;
  p.ring_offset = shared.ring_offset;
  p.scratch_offset = shared.scratch_offset;
  p.x_offset = shared.x_offset;
  p.sums_offset = shared.sums_offset;
  p.sums_apart = shared.sums_apart;
  p.x_first = overlap_previous ? 0 : std::min(plan.x_first, plan.x_stages);
  p.producers = plan.x_warps;
  p.row_warps_inverse = 65536 / plan.row_warps + 1;
  const int bytes = std::max(shared.bytes, plan.least_shared);
  if (p.units < plan.cluster || bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ceil_div(p.row_tiles, plan.row_warps * plan.tiles_per_warp) * plan.cluster);
  config.blockDim = dim3((plan.row_warps * plan.k_warps + plan.x_warps) * 32);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attributes[2];
  config.attrs = attributes;
  if (plan.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = plan.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs].val.clusterDim.z = 1;
    ++config.numAttrs;
  }
  if (overlap_previous) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
    ++config.numAttrs;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace lacuna::kernels::cuda
