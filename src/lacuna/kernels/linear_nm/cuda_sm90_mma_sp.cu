// The idea: at few tokens a product costs what its weights cost to read, and 2:4 weights are 9/16
// of the dense bytes, which mma.sp takes as they lie: no instruction is spent on unpacking. Every
// warp streams its own weights through a private ring of bulk copies, x comes through a ring that
// the block shares, and one wave of blocks covers the matrix. Blocks of a cluster share rows and
// split K, so that each reads a part of x only, and push their sums into each other's memory.
//
// Packed weights: units of 16 rows x 128 columns, 2,304 bytes, ordered [row tile][unit along K]:
//
//   0     256              768              1280             1792            2304
//   +------+----------------+----------------+----------------+----------------+
//   | meta | step 0: values | step 1         | step 2         | step 3         |  step: 32 columns
//   +------+----------------+----------------+----------------+----------------+
//   lane 4g+t (g = 0..7, t = 0..3) reads 16 bytes of each step and 8 of the metadata for all four:
//     values    a0: row g, group t | a1: row g+8, group t | a2: row g, group t+4 | a3: row g+8, t+4
//               (a group is 4 columns, of which 2 bf16 are kept)
//     metadata  word w (steps 2w, 2w+1): of step 2w + t/2, columns 16(t%2)..+15, low 16 bits row g,
//               high 16 bits row g+8, 4 bits a group: the places of the two kept values, rising.
//               Steps 2w and 2w+1 differ in the selector of mma.sp.
//
// A block: row_warps x k_warps consumers and 1..4 producers of x. One round = stage_units units for
// each consumer:
//
//              k warp 0    k warp 1   |  round 1 ...
//            +-----------+-----------+
//   row warp | own ring  | own ring  |  mt row tiles each, sums in registers over all rounds
//      0     +-----------+-----------+
//      1     |           |           |  x of the round: t tokens, each row 16 bytes longer
//            +-----------+-----------+  (ldmatrix meets no conflict), one ring for the block
//
//   then fragment f (16 rows x 8 tokens) goes to slot f / cluster of block f % cluster: st.shared
//   at home, st.async to the others. Each block adds its slots in a fixed order and stores y.
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

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstring>

#include "lacuna/kernels/cuda/sm90_async.h"

namespace lacuna::kernels::linear_nm {
namespace {

using namespace cuda;  // copies and barriers

constexpr int kTileRows = 16;
constexpr int kUnitColumns = kMmaSpUnitColumns;
constexpr int kMetadataBytes = 256;
constexpr int kStepBytes = 512;  // values of 16 rows x 32 columns
constexpr int kSteps = kUnitColumns / 32;
constexpr int kUnitBytes = kMetadataBytes + kSteps * kStepBytes;  // 2,304
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kMaxCluster = 8;
// Stages of weights in flight while the kernel ahead still runs, whose own loads wait behind them
// (all of them at once cost 2 to 3 % of a decode step).
constexpr int kAhead = 1;

// A warp's sums of 16 rows and 8 tokens, as the tensor cores leave them: [lane][4].
constexpr int kFragmentFloats = kTileRows * 8;

// Sums of NT x MT x 4 registers decide how many warps fit beside one producer of x. Registers are
// given out four warps at a time: 17 warps leave 96 a thread, 16 leave 128, 12 leave 168.
constexpr int max_warps(int token_tiles, int tiles_per_warp) {
  const int fragments = token_tiles * tiles_per_warp;
  return fragments > 16 ? 11 : fragments > 8 || token_tiles == 8 ? 15 : 16;
}

struct Params {
  const unsigned char* weights;
  const __nv_bfloat16* x;
  __nv_bfloat16* y;
  int n, k, t;
  int row_tiles, units;
  int row_warps, k_warps, stage_units, stages, x_stages, x_first, producers;
  int row_warps_inverse;  // 2^16 / row_warps, rounded up
  int at_once;            // stages of weights in flight before the kernel ahead is done
  int cluster_log2;
  int ring_offset, x_offset, sums_offset;  // bytes from the start of shared memory
  bool sums_apart;                         // not in the memory of the rings
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

template <int kSelector>
__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, const uint4& b,
                                         unsigned metadata) {
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
        "r"(metadata), "n"(kSelector));
}

// Instructions are cold at every launch: what runs once is kept short (no unrolling, no division)
// and away from the first copies.
template <int NT, int MT>
__global__ void __launch_bounds__((max_warps(NT, MT) + 1) * 32, 1)
    linear_nm_mma_sp_kernel(const Params p) {
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
      const __nv_bfloat16* from = p.x + (first_unit + unit) * kUnitColumns;
      const int units = min(span, part - unit);
      if constexpr (kLoads) {
        const int pieces = units * (2 * kUnitColumns / 16);  // of one token
        const int shift = pieces < 32 ? 4 : 5;               // 16 or 32 lanes side by side on it
        const int column = lane & ((1 << shift) - 1);
#pragma unroll 2
        for (int token = producer * (32 >> shift) + (lane >> shift); token < p.t;
             token += p.producers * (32 >> shift)) {
          const __nv_bfloat16* row = from + static_cast<std::size_t>(token) * p.k;
#pragma unroll 1
          for (int i = column; i < pieces; i += 1 << shift) {
            copy16(to + token * x_stride + i * 16, row + i * 8);
          }
        }
        barrier_arrive_after_copies(x_full + 8 * stage);
      } else {
        const unsigned bytes = units * (2 * kUnitColumns);
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
    const int stage_bytes = p.stage_units * kUnitBytes;
    const unsigned full = shared_base + 8 * warp * p.stages;
    const unsigned ring = shared_base + p.ring_offset + warp * p.stages * MT * stage_bytes;
    const int own = part - k_warp * p.stage_units;  // of a round that starts at u, own - u are mine

    // Fetches the round that starts at `unit` into ring slot `slot`; for one lane.
    auto fill = [&](int unit, int slot) {
      const unsigned bytes = min(p.stage_units, own - unit) * kUnitBytes;
      barrier_expect(full + 8 * slot, MT * bytes);
      const std::uint64_t policy = evict_first();
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        // A tile past the end repeats the last one: its sums are never stored.
        const std::size_t tile = min(first_tile + m, p.row_tiles - 1);
        bulk_copy_once(ring + (slot * MT + m) * stage_bytes,
                       p.weights + (tile * p.units + first_unit + part - own + unit) * kUnitBytes,
                       bytes, full + 8 * slot, policy);
      }
    };
    if (lane == 0) {
#pragma unroll 1
      for (int s = 0; s < p.stages; ++s) barrier_init(full + 8 * s, 1);
      barrier_init_fence();
#pragma unroll 1
      for (int s = 0, unit = 0; s < p.at_once && unit < own; ++s, unit += span) fill(unit, s);
    }
    __syncwarp();
    if (p.cluster_log2 > 0) cluster_arrive_relaxed();
    barrier_of_warps(2, warps + p.producers);
    launch_next();
    if (lane == 0) {
#pragma unroll 1
      for (int s = p.at_once, unit = s * span; s < p.stages && unit < own; ++s, unit += span) {
        barrier_wait(full + 8 * (s - p.at_once), 0);
        fill(unit, s);
      }
    }
    __syncwarp();

    float sums[MT][NT][4];
#pragma unroll
    for (int m = 0; m < MT; ++m)
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.f;

    int slot = 0, x_stage = 0;
    unsigned phase = 0, x_phase = 0;
    const unsigned x_lane = shared_base + p.x_offset + (lane & 7) * x_stride + (lane >> 3) * 16 +
                            k_warp * p.stage_units * (2 * kUnitColumns);
#pragma unroll 1
    for (int unit = 0; unit < part; unit += span) {
      barrier_wait(x_full + 8 * x_stage, x_phase);
      if (unit < own) {
        barrier_wait(full + 8 * slot, phase);
        const int units = min(p.stage_units, own - unit);
#pragma unroll 1
        for (int u = 0; u < units; ++u) {
          const unsigned w = ring + slot * MT * stage_bytes + u * kUnitBytes;
          const unsigned b = x_lane + x_stage * x_stage_bytes + u * (2 * kUnitColumns);
          uint2 metadata[MT];
#pragma unroll
          for (int m = 0; m < MT; ++m) metadata[m] = load_shared2(w + m * stage_bytes + lane * 8);
#pragma unroll
          for (int s = 0; s < kSteps; ++s) {
            uint4 a[MT];
#pragma unroll
            for (int m = 0; m < MT; ++m) {
              a[m] =
                  load_shared4(w + m * stage_bytes + kMetadataBytes + s * kStepBytes + lane * 16);
            }
#pragma unroll
            for (int j = 0; j < NT; ++j) {
              const uint4 fragment = load_matrices(b + j * 8 * x_stride + s * 64);
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                const unsigned e = s < 2 ? metadata[m].x : metadata[m].y;
                if (s % 2 == 0) {
                  multiply<0>(sums[m][j], a[m], fragment, e);
                } else {
                  multiply<1>(sums[m][j], a[m], fragment, e);
                }
              }
            }
          }
        }
      }
      __syncwarp();
      if (lane == 0) {
        barrier_arrive(x_empty + 8 * x_stage);
        const int next = unit + p.stages * span;
        if (next < own) fill(next, slot);
      }
      if (++slot == p.stages) {
        slot = 0;
        phase ^= 1;
      }
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
    const int row = (row_group * p.row_warps * MT + f / NT) * kTileRows + quarter * 4;
    const int token = (f % NT) * 8 + token_lane;
    if (token >= p.t) continue;
    __nv_bfloat16* y = p.y + static_cast<std::size_t>(token) * p.n + row;
    if (p.n % 4 == 0) {
      const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]);
      const __nv_bfloat162 high = __floats2bfloat162_rn(v[2], v[3]);
      uint2 word;
      word.x = *reinterpret_cast<const unsigned*>(&low);
      word.y = *reinterpret_cast<const unsigned*>(&high);
      if (row < p.n) *reinterpret_cast<uint2*>(y) = word;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < p.n) y[i] = __float2bfloat16_rn(v[i]);
      }
    }
  }
}

// One warp packs one unit. A lane writes its own fragments (see the picture) and its metadata.
__global__ void linear_nm_pack_kernel(const unsigned short* dense, int n, int k, int row_tiles,
                                      int units, unsigned char* packed, PackReport* report) {
  const int lane = threadIdx.x & 31;
  const std::int64_t unit_index =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (unit_index >= static_cast<std::int64_t>(row_tiles) * units) return;
  const int tile = static_cast<int>(unit_index / units);
  const int column0 = static_cast<int>(unit_index % units) * kUnitColumns;
  unsigned char* unit = packed + unit_index * kUnitBytes;
  const int g = lane >> 2, t = lane & 3;

  // The two kept values of a group (low half first) and their 4 bits of positions.
  auto group = [&](int row, int column, unsigned* values) -> unsigned {
    row += tile * kTileRows;
    uint2 word = make_uint2(0, 0);
    if (row < n) {
      word = *reinterpret_cast<const uint2*>(dense + static_cast<std::size_t>(row) * k + column0 +
                                             column);
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
    if (values != nullptr) {
      unsigned kept[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        kept[i] = position[i] == 0   ? v[0]
                  : position[i] == 1 ? v[1]
                  : position[i] == 2 ? v[2]
                                     : v[3];
        if ((kept[i] & 0x7fff) == 0) kept[i] = 0;
      }
      *values = kept[0] | kept[1] << 16;
      if (count > 2 && report != nullptr) {
        atomicAdd(&report->violations, 1ull);
        atomicMin(&report->first_group,
                  static_cast<unsigned long long>(row) * (k / 4) + (column0 + column) / 4);
      }
    }
    return position[0] | position[1] << 2;
  };

#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    unsigned a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) group(g + 8 * (i & 1), 32 * s + 4 * (t + 4 * (i >> 1)), &a[i]);
    *reinterpret_cast<uint4*>(unit + kMetadataBytes + s * kStepBytes + lane * 16) =
        make_uint4(a[0], a[1], a[2], a[3]);
  }
  unsigned metadata[2];
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    metadata[word] = 0;
    const int column = 32 * (2 * word + t / 2) + 16 * (t % 2);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      metadata[word] |= group(g + 8 * (i / 4), column + 4 * (i % 4), nullptr) << (4 * i);
    }
  }
  *reinterpret_cast<uint2*>(unit + lane * 8) = make_uint2(metadata[0], metadata[1]);
}

constexpr int kUnpackWarps = 8;
constexpr int kUnpackStride =
    2 * kUnitColumns + 32;  // of a row in shared memory: no bank conflicts

// The way back: one warp unpacks one unit, each lane the groups whose values it reads. The places
// of a group lie in the metadata of the lane that mma.sp takes them from. Rows go through shared
// memory, so that the warp stores 256 bytes of each.
__global__ void __launch_bounds__(kUnpackWarps * 32)
    linear_nm_unpack_kernel(const unsigned char* packed, int n, int k, int row_tiles, int units,
                            unsigned short* dense, bool vectors) {
  __shared__ __align__(16) unsigned char tiles[kUnpackWarps][kTileRows * kUnpackStride];
  const int lane = threadIdx.x & 31;
  const std::int64_t unit_index =
      static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + (threadIdx.x >> 5);
  if (unit_index >= static_cast<std::int64_t>(row_tiles) * units) return;
  unsigned char* const own = tiles[threadIdx.x >> 5];
  const int tile = static_cast<int>(unit_index / units);
  const int column0 = static_cast<int>(unit_index % units) * kUnitColumns;
  const unsigned char* unit = packed + unit_index * kUnitBytes;
  const int g = lane >> 2, t = lane & 3;
  const uint2 metadata = *reinterpret_cast<const uint2*>(unit + lane * 8);
  uint4 word[kSteps];
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    word[s] = *reinterpret_cast<const uint4*>(unit + kMetadataBytes + s * kStepBytes + lane * 16);
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const unsigned values[4] = {word[s].x, word[s].y, word[s].z, word[s].w};
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // columns 0..15 and 16..31 of the step
      const unsigned places =
          __shfl_sync(~0u, s < 2 ? metadata.x : metadata.y, 4 * g + 2 * (s % 2) + half);
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
  __syncwarp();
  const int row0 = tile * kTileRows;
  unsigned short* const to = dense + static_cast<std::size_t>(row0) * k + column0;
  if (vectors) {
    const int half = lane >> 4, part = lane & 15;
#pragma unroll
    for (int r = half; r < kTileRows; r += 2) {
      const uint4 v = *reinterpret_cast<const uint4*>(own + r * kUnpackStride + part * 16);
      if (row0 + r < n) {
        *reinterpret_cast<uint4*>(to + static_cast<std::size_t>(r) * k + part * 8) = v;
      }
    }
  } else {  // dense is aligned to 8 bytes alone
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const uint2 v = *reinterpret_cast<const uint2*>(own + r * kUnpackStride + lane * 8);
      if (row0 + r < n) {
        *reinterpret_cast<uint2*>(to + static_cast<std::size_t>(r) * k + lane * 4) = v;
      }
    }
  }
}

int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

using Kernel = void (*)(const Params);

Kernel find_kernel(int token_tiles, int tiles_per_warp) {
  switch (token_tiles * 16 + tiles_per_warp) {
    case 1 * 16 + 1:
      return linear_nm_mma_sp_kernel<1, 1>;
    case 1 * 16 + 2:
      return linear_nm_mma_sp_kernel<1, 2>;
    case 2 * 16 + 1:
      return linear_nm_mma_sp_kernel<2, 1>;
    case 2 * 16 + 2:
      return linear_nm_mma_sp_kernel<2, 2>;
    case 4 * 16 + 1:
      return linear_nm_mma_sp_kernel<4, 1>;
    case 4 * 16 + 2:
      return linear_nm_mma_sp_kernel<4, 2>;
    case 4 * 16 + 3:
      return linear_nm_mma_sp_kernel<4, 3>;
    case 8 * 16 + 1:
      return linear_nm_mma_sp_kernel<8, 1>;
    case 8 * 16 + 2:
      return linear_nm_mma_sp_kernel<8, 2>;
    case 8 * 16 + 3:
      return linear_nm_mma_sp_kernel<8, 3>;
    default:
      return nullptr;
  }
}

struct SharedLayout {
  int ring_offset, x_offset, sums_offset, bytes;
  bool sums_apart;
};

SharedLayout shared_layout(const MmaSpPlan& plan) {
  const int warps = plan.row_warps * plan.k_warps;
  SharedLayout layout;
  layout.ring_offset = (8 * (warps * plan.stages + 2 * plan.x_stages + 1) + 127) / 128 * 128;
  layout.x_offset = layout.ring_offset +
                    warps * plan.stages * plan.tiles_per_warp * plan.stage_units * kUnitBytes;
  const int x_stride = plan.stage_units * plan.k_warps * 2 * kUnitColumns + 16;
  const int x_end = layout.x_offset + plan.x_stages * plan.token_tiles * 8 * x_stride;
  const int fragments = plan.row_warps * plan.tiles_per_warp * plan.token_tiles;
  const int sums = plan.cluster * plan.k_warps * ((fragments + plan.cluster - 1) / plan.cluster) *
                   (kFragmentFloats * 4);
  layout.sums_apart = x_end + sums <= kMaxSharedBytes;
  layout.sums_offset = layout.sums_apart ? x_end : layout.ring_offset;
  layout.bytes = std::max(x_end, layout.sums_offset + sums);
  return layout;
}

bool plan_ok(const MmaSpPlan& p) {
  const int warps = p.row_warps * p.k_warps;
  return find_kernel(p.token_tiles, p.tiles_per_warp) != nullptr && p.row_warps >= 1 &&
         p.k_warps >= 1 && p.x_warps >= 1 && p.x_warps <= 4 &&
         warps + p.x_warps <= max_warps(p.token_tiles, p.tiles_per_warp) + 1 &&
         p.stage_units >= 1 && p.stage_units <= 8 && p.stages >= 1 && p.stages <= 16 &&
         p.x_stages >= 1 && p.x_stages <= 16 && p.x_first >= 0 && p.cluster >= 1 &&
         p.cluster <= kMaxCluster && (p.cluster & (p.cluster - 1)) == 0;
}

// Clusters of blocks with all the shared memory that this device can hold at one time. The driver
// is asked once: plans are made by the thousand.
cudaError_t clusters_at_once(int token_tiles, int cluster, int* count) {
  static std::atomic<int> known[16][9][9];  // [device][token tiles][cluster], 0: not asked yet
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>* answer = device < 16 ? &known[device][token_tiles][cluster] : nullptr;
  if (answer != nullptr && (*count = answer->load()) > 0) return cudaSuccess;
  const Kernel kernel = find_kernel(token_tiles, 2);
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

}  // namespace

std::size_t mma_sp_packed_bytes(std::int64_t n, std::int64_t k) {
  return static_cast<std::size_t>((n + kTileRows - 1) / kTileRows) * (k / kUnitColumns) *
         kUnitBytes;
}

std::size_t mma_sp_workspace_bytes(std::int64_t, std::int64_t, int) { return 0; }

const char* mma_sp_refusal(std::int64_t n, std::int64_t k, int t, int device) {
  if (const char* reason = mma_sp_shape_refusal(n, k, t)) return reason;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "no such device";
  }
  if (major != 9 || minor != 0) return "needs compute capability 9.0";
  return nullptr;
}

std::size_t mma_sp_shared_bytes(const MmaSpPlan& plan) {
  return plan_ok(plan) ? shared_layout(plan).bytes : 0;
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
  const int row_tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kUnitColumns);
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
  const int row_tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kUnitColumns);
  const std::int64_t warps = static_cast<std::int64_t>(row_tiles) * units;
  linear_nm_unpack_kernel<<<ceil_div(warps, kUnpackWarps), kUnpackWarps * 32, 0, stream>>>(
      static_cast<const unsigned char*>(packed), static_cast<int>(n), static_cast<int>(k),
      row_tiles, units, static_cast<unsigned short*>(dense),
      reinterpret_cast<std::uintptr_t>(dense) % 16 == 0);
  return cudaGetLastError();
}

cudaError_t mma_sp_plan(std::int64_t n, std::int64_t k, int t, MmaSpPlan* plan) {
  if (mma_sp_shape_refusal(n, k, t) != nullptr || plan == nullptr) return cudaErrorInvalidValue;
  const int tiles = ceil_div(n, kTileRows), units = static_cast<int>(k / kUnitColumns);
  MmaSpPlan p;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;

  // How many blocks share K. Each reads its part of x, so blocks of many rows and a short K read
  // little of x, but exchange more sums. Up to 2 tokens x is nothing; beyond, a block should have
  // 13 or more row tiles (below 9 tokens: or share with one other block).
  int at_once = 0, row_tiles = 0;
  for (p.cluster = t <= 32 ? 1 : 2;; p.cluster *= 2) {
    const cudaError_t error = clusters_at_once(p.token_tiles, p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
    const bool idle = tiles * 4 < at_once * 3;
    const bool enough = t <= 2 || row_tiles >= 13 || (t <= 8 && p.cluster >= 2);
    if ((enough && !idle) || p.cluster == kMaxCluster || units < 4 * p.cluster) break;
  }
  while (p.cluster > 1 && units < 2 * p.cluster) {
    p.cluster /= 2;
    const cudaError_t error = clusters_at_once(p.token_tiles, p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
  }
  const int part = ceil_div(units, p.cluster);

  // Two row tiles a warp halve the reads of x from shared memory; 6 to 9 warps are enough.
  p.tiles_per_warp = row_tiles == 1 ? 1 : p.token_tiles >= 4 && row_tiles > 16 ? 3 : 2;
  const int most = max_warps(p.token_tiles, p.tiles_per_warp) - 1;
  const int waves = ceil_div(row_tiles, most * p.tiles_per_warp);
  if (waves > 1) row_tiles = ceil_div(tiles, static_cast<std::int64_t>(at_once) * waves);
  p.row_warps = ceil_div(row_tiles, p.tiles_per_warp);
  const int wanted_x_warps = t <= 2 ? 2 : t <= 8 ? 3 : t <= 16 ? 2 : 4;
  for (; p.row_warps >= 1; p.row_warps /= 2) {
    for (p.k_warps = std::clamp(8 / p.row_warps, 1, std::min(6, part)); p.k_warps >= 1;
         --p.k_warps) {
      const int warps = p.row_warps * p.k_warps;
      p.x_warps = std::min(wanted_x_warps, max_warps(p.token_tiles, p.tiles_per_warp) + 1 - warps);
      // Two or three copies in flight a warp and tile: more of them only make x wait.
      const bool long_stages = t <= 8 && part > 4 * p.k_warps;
      for (p.stage_units = long_stages ? 2 : 1; p.stage_units >= 1; --p.stage_units) {
        const int rounds = ceil_div(part, p.stage_units * p.k_warps);
        for (p.stages = std::min(t <= 8 && !long_stages ? 3 : 2, rounds); p.stages >= 1;
             --p.stages) {
          for (p.x_stages = std::min(3, rounds); p.x_stages >= std::min(2, rounds); --p.x_stages) {
            const std::size_t bytes = mma_sp_shared_bytes(p);
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

cudaError_t mma_sp_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                       int t, const MmaSpPlan& plan, bool overlap_previous, cudaStream_t stream) {
  if (mma_sp_shape_refusal(n, k, t) != nullptr || !plan_ok(plan) || t > plan.token_tiles * 8 ||
      packed == nullptr || x == nullptr || y == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(x) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(y) % (n % 4 == 0 ? 8 : 2) != 0) {
    return cudaErrorInvalidValue;
  }
  const SharedLayout layout = shared_layout(plan);
  if (layout.bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  Params p;
  p.weights = static_cast<const unsigned char*>(packed);
  p.x = static_cast<const __nv_bfloat16*>(x);
  p.y = static_cast<__nv_bfloat16*>(y);
  p.n = static_cast<int>(n);
  p.k = static_cast<int>(k);
  p.t = t;
  p.row_tiles = ceil_div(n, kTileRows);
  p.units = static_cast<int>(k / kUnitColumns);
  p.row_warps = plan.row_warps;
  p.k_warps = plan.k_warps;
  p.stage_units = plan.stage_units;
  p.stages = plan.stages;
  p.x_stages = plan.x_stages;
  p.cluster_log2 = plan.cluster == 1 ? 0 : plan.cluster == 2 ? 1 : plan.cluster == 4 ? 2 : 3;
  p.ring_offset = layout.ring_offset;
  p.x_offset = layout.x_offset;
  p.sums_offset = layout.sums_offset;
  p.sums_apart = layout.sums_apart;
  p.at_once = overlap_previous ? std::min(kAhead, plan.stages) : plan.stages;
  p.x_first = overlap_previous ? 0 : std::min(plan.x_first, plan.x_stages);
  p.producers = plan.x_warps;
  p.row_warps_inverse = 65536 / plan.row_warps + 1;
  if (p.units < plan.cluster) return cudaErrorInvalidValue;

  const Kernel kernel = find_kernel(plan.token_tiles, plan.tiles_per_warp);
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, layout.bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(ceil_div(p.row_tiles, plan.row_warps * plan.tiles_per_warp) * plan.cluster);
  config.blockDim = dim3((plan.row_warps * plan.k_warps + plan.x_warps) * 32);
  config.dynamicSmemBytes = layout.bytes;
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

namespace {

// What the library's layout and plan hold.
struct Shape {
  std::int64_t n, k;
};
struct Call {
  int t;
  MmaSpPlan plan;
};

}  // namespace

const GpuLinearKernel kMmaSp = {
    .operation = "linear_nm",
    .name = "cuda_sm90_mma_sp",
    .scratch_bytes = [](int64_t, int64_t) -> size_t { return 0; },
    .measure = [](const void*, int64_t n, int64_t k, void*, GpuLayout* layout, GpuStream) -> int {
      const Shape shape{n, k};
      layout->packed_bytes = mma_sp_packed_bytes(n, k);
      hold(layout, shape);
      return cudaSuccess;
    },
    .pack = [](const GpuLayout* layout, const void* dense, const void*, void* packed,
               GpuPackReport* report, GpuStream stream) -> int {
      const auto [n, k] = held<Shape>(layout);
      return mma_sp_pack(dense, n, k, packed, report, static_cast<cudaStream_t>(stream));
    },
    .unpack = [](const GpuLayout* layout, const void* packed, void* dense,
                 GpuStream stream) -> int {
      const auto [n, k] = held<Shape>(layout);
      return mma_sp_unpack(packed, n, k, dense, static_cast<cudaStream_t>(stream));
    },
    .max_tokens = [](const GpuLayout*) -> int64_t { return kMmaSpMaxTokens; },
    .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
      const auto [n, k] = held<Shape>(layout);
      Call call{static_cast<int>(std::min(tokens, kMmaSpMaxTokens + 1)), {}};
      const cudaError_t error = mma_sp_plan(n, k, call.t, &call.plan);
      if (error == cudaSuccess) hold(plan, call);
      return error;
    },
    .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
    .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
              void* y, void*, int overlap_previous, GpuStream stream) -> int {
      const auto [n, k] = held<Shape>(layout);
      const auto call = held<Call>(plan);
      return mma_sp_run(packed, x, y, n, k, call.t, call.plan, overlap_previous != 0,
                        static_cast<cudaStream_t>(stream));
    },
};

}  // namespace lacuna::kernels::linear_nm
