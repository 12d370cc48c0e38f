// The idea: at few tokens a product costs what its weights cost to read, and for a kept value its
// distance to the one before, 3 or 4 bits, is cheaper than any index and needs neither a popcount
// nor a shuffle: a lane owns a row and walks along it, prefix sums of 8 gaps at a time giving the
// addresses of x in shared memory. A bf16 needs 13 bits: the exponents of a matrix lie within 30 of
// each other, so value and gap of 3 bits are 16 together, and what doesn't fit (mostly nothing) is
// kept apart. Rows are sorted by length before 32 of them share a warp, so that little is filled
// up, and its lanes stay near the same columns, so that few banks collide. A block takes whole
// groups of rows and divides their weights evenly among its warps, wherever that cuts a row: one
// wave, no sums between blocks.
//
//   group: 32 rows (16, 8, 4 with 2, 4, 8 lanes a row: where whole groups would leave blocks idle)
//   chunk: 8 places of each of 32 lanes       unit: 4 chunks, as they lie in memory
//   (cuda_sm90_gap_units.cuh has the bits of a place.)
//
//   Gap: columns between a place and the one before. A run of 2^bits zeros or more keeps a zero for
//   each 2^bits of it, and a row shorter than its group keeps zeros spread evenly over the others.
//
//   packed W:  [block: first chunk of each group, warps of each group, rows, scales or strays]
//              [warp: start columns of its lanes][group: the same, if lanes share rows]
//              [block, warp: units, to the longest][strays: column, bf16; by block and row]
//
//   block b:   |--- group 0 ---|-- group 1 --|--- group 2 ---|   chunks
//              |  warp 0  |  warp 1  |  warp 2  |  warp 3    |   equal parts
//              a warp leaves 32 sums for each group it meets; four lanes a row add them up last,
//              and the strays of the row
//
// Bytes: 2 for each place (17 bits with gaps of 4; codes 11 or 12), once, evict first; 2 T K of x
// for every block, from L2.
// Shared memory: 2 T K of x (pairs or fours of tokens side by side), then tables and sums.
// A warp has 4 chunks in flight in registers, each asked for again as soon as it is used: 2,048
// bytes, 33 (16 warps) or 49 KB (24) a multiprocessor.
// A chunk costs some 50 instructions for one token (15 of them to decode), 2.0 to 2.9 bank cycles a
// gather of 32 x (3.5 if columns were random).
//
// What counts here, measured (bench/lab/cuda_linear_bitmap has the tables):
// - Bytes: 16 and 17 bits a place in place of 19 and 20 (bf16 as it is) took 8 to 15 % off.
// - Cold instructions: start-up loops that the compiler unrolled cost 0.1 us a kernel, 8 chunks in
//   registers (twice the code) 0.3 to 0.5 us on the small matrices, 6 chunks up to 0.4.
// - More bytes in flight than 61 KB are slower in nearly every case, whatever brings them.
// Tried and lost: bulk copies into a ring in shared memory (0 to 30 %), prefetch into L2 (up to
// 12 %), x as float (equal), 8, 12 or 32 warps, more lanes a row than keep the blocks busy (2 to
// 4 %), x before the first weights (1 to 2 %), the length of a block as a launch parameter instead
// of in the table (2 to 4 %), L2 sectors of 256 bytes (1 to 7 %).
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <numeric>
#include <queue>
#include <utility>
#include <vector>

#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_device.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_units.cuh"

namespace lacuna::kernels::linear_bitmap {
namespace {

constexpr int kTableRows = 64;        // words of a table before its rows
constexpr int kStartBytes = 64;       // one 16-bit column a lane
constexpr int kMaxGroups = 31;        // of a block: its table has 32 entries
constexpr unsigned kNoSpan = 0xffff;  // first warp 65535, last warp 0
constexpr int kMaxSharedBytes = 227 * 1024;
constexpr int kMaxTokens = static_cast<int>(kGapMaxTokens);

int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

std::size_t round_up(std::size_t a, std::size_t b) { return (a + b - 1) / b * b; }

// Where the parts of a packed W begin.
struct Parts {
  // Of one block: 32 words of first chunks, 32 of spans, the rows, then their scales, or where
  // there are strays, the first of each row and the end.
  std::size_t table_stride;
  std::size_t warp_starts, group_starts, streams;
  std::size_t pitch;  // of one warp's stream
  std::size_t strays;
  std::size_t bytes;
};

bool has_second_column(const GapLayout& l) { return l.values != GapValues::kBf16 || l.strays > 0; }

Parts parts_of(const GapLayout& l) {
  Parts p;
  const std::size_t rows = static_cast<std::size_t>(l.groups_per_block) * (32 / l.lanes_per_row);
  p.table_stride = round_up(4 * (kTableRows + rows + (has_second_column(l) ? rows + 1 : 0)), 128);
  p.warp_starts = l.blocks * p.table_stride;
  p.group_starts = p.warp_starts + static_cast<std::size_t>(l.blocks) * l.warps * kStartBytes;
  const std::size_t groups =
      l.lanes_per_row > 1 ? static_cast<std::size_t>(l.blocks) * l.groups_per_block : 0;
  p.streams = round_up(p.group_starts + groups * kStartBytes, 128);
  const int units = l.most_chunks / kUnitChunks, rest = l.most_chunks % kUnitChunks;
  p.pitch = static_cast<std::size_t>(units) * unit_bytes(l.values, l.bits) +
            (rest > 0 ? head_bytes(l.values, l.bits) + value_bytes(l.values, rest) : 0);
  p.strays = p.streams + static_cast<std::size_t>(l.blocks) * l.warps * p.pitch;
  p.bytes = p.strays + 4 * static_cast<std::size_t>(l.strays);
  return p;
}

// Of one row, found by counting.
struct RowCount {
  unsigned kept;       // without strays
  unsigned places[2];  // with gaps of 3 and 4 bits
  unsigned strays;
};

// Where a row goes.
struct RowHome {
  unsigned block;
  unsigned first_chunk;  // of its group, in its block
  unsigned chunks;       // of each lane of its group
  unsigned lane;         // first lane | group of the block << 8
  unsigned stray;        // its first
};

struct Scratch {
  std::size_t top, counts, homes, totals, tables, bytes;
};

constexpr int kMostSms = 1024;

Scratch scratch_parts(std::int64_t n) {
  Scratch s;
  const std::size_t rows = static_cast<std::size_t>(n);
  s.top = 0;
  s.counts = 128;
  s.homes = s.counts + rows * sizeof(RowCount);
  s.totals = s.homes + rows * sizeof(RowHome);  // chunks of each block
  s.tables = round_up(s.totals + 4 * (rows + kMostSms), 128);
  s.bytes = s.tables + 4 * (4 * rows + 65 * kMostSms) + 512 * (rows / 4 + kMostSms);
  return s;
}

// ---------- counting and packing ----------

// The places of 32 columns: kept values and, in runs of zeros, every 2^bits-th zero.
struct Window {
  unsigned kept, places;
};

// `run`: zeros directly before the window, updated.
template <int kBits>
__device__ __forceinline__ Window window_of(unsigned kept, unsigned valid, int lane, int& run) {
  const unsigned before = kept & ((1u << lane) - 1);
  const int zeros = before ? lane - 32 + __clz(before) : run + lane;  // before this column
  const bool bridge = !(kept >> lane & 1) && (valid >> lane & 1) &&
                      (zeros & ((1 << kBits) - 1)) == (1 << kBits) - 1;
  Window w;
  w.kept = kept;
  w.places = kept | __ballot_sync(~0u, bridge);
  run = kept ? __clz(kept) : run + 32;
  return w;
}

__device__ __forceinline__ unsigned short load_weight(const unsigned short* row, int column,
                                                      int k) {
  const unsigned short v = column < k ? row[column] : 0;
  return (v & 0x7fff) ? v : 0;
}

// The largest exponent of W that may be `top`.
__global__ void __launch_bounds__(256)
    gap_top_kernel(const unsigned short* dense, std::size_t size, int* top) {
  int most = 1;
  const std::size_t all = static_cast<std::size_t>(gridDim.x) * blockDim.x;
#pragma unroll 8
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; i < size;
       i += all) {
    const int e = exponent_of(dense[i]);
    if (e <= kMostTop) most = max(most, e);
  }
  most = __reduce_max_sync(~0u, most);
  if ((threadIdx.x & 31) == 0) atomicMax(top, most);
}

__global__ void __launch_bounds__(256)
    gap_count_kernel(const unsigned short* dense, int n, int k, int k_padded, const int* top_of_all,
                     RowCount* counts) {
  const int lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= n) return;
  const unsigned short* from = dense + static_cast<std::size_t>(row) * k;
  const int top = *top_of_all;
  int run3 = 0, run4 = 0;
  unsigned kept_count = 0, places3 = 0, places4 = 0, strays = 0;
#pragma unroll 4
  for (int column = 0; column < k_padded; column += 32) {
    const unsigned short value = load_weight(from, column + lane, k);
    const bool fit = fits(value, top);
    const unsigned kept = __ballot_sync(~0u, value != 0 && fit);
    strays += __popc(__ballot_sync(~0u, value != 0 && !fit));
    const unsigned valid = k_padded - column >= 32 ? ~0u : (1u << (k_padded - column)) - 1;
    kept_count += __popc(kept);
    places3 += __popc(window_of<3>(kept, valid, lane, run3).places);
    places4 += __popc(window_of<4>(kept, valid, lane, run4).places);
  }
  if (lane == 0) counts[row] = {kept_count, {places3, places4}, strays};
}

struct PackParams {
  const unsigned short* dense;
  const RowCount* counts;
  const RowHome* homes;
  const unsigned* totals;
  unsigned char* packed;
  int n, k, k_padded, top;
  int lanes_per_row, warps, groups_per_block;
  std::size_t warp_starts, group_starts, streams, pitch, strays;
};

// One warp packs one row. Beside the places that gaps need, zeros spread evenly over the row fill
// its lanes up to the length of its group.
template <GapValues kValues, int kBits>
__global__ void __launch_bounds__(256) gap_pack_kernel(const PackParams p) {
  const int lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= p.n) return;
  const unsigned short* from = p.dense + static_cast<std::size_t>(row) * p.k;
  const RowHome home = p.homes[row];
  const unsigned places = p.counts[row].places[kBits - 3];
  const unsigned lane_places = home.chunks * kChunkValues;
  const unsigned extra = lane_places * p.lanes_per_row - places;  // zeros to add
  const unsigned free_places = p.k_padded - places;
  const unsigned total = p.totals[home.block];
  const unsigned rows = 32 / p.lanes_per_row;
  int run = 0;
  unsigned done = 0, passed = 0;  // places taken and free columns passed
  int last = -1;                  // column of the last place
  unsigned* stray = reinterpret_cast<unsigned*>(p.packed + p.strays) + home.stray;
  for (int column0 = 0; column0 < p.k_padded; column0 += 32) {
    const int column = column0 + lane;
    unsigned value = load_weight(from, column, p.k);
    const bool strays = value != 0 && !fits(value, p.top);
    const unsigned all_strays = __ballot_sync(~0u, strays);
    if (strays) {
      stray[__popc(all_strays & ((1u << lane) - 1))] = value << 16 | column;
      value = 0;
    }
    stray += __popc(all_strays);
    const unsigned kept = __ballot_sync(~0u, value != 0);
    const unsigned valid = p.k_padded - column0 >= 32 ? ~0u : (1u << (p.k_padded - column0)) - 1;
    const Window w = window_of<kBits>(kept, valid, lane, run);
    const unsigned below = (1u << lane) - 1;
    const unsigned open = valid & ~w.places;
    bool take = w.places >> lane & 1;
    if (open >> lane & 1) {
      const unsigned j = passed + __popc(open & below);
      take = (j + 1) * extra / free_places > j * extra / free_places;
    }
    passed += __popc(open);
    const unsigned taken = __ballot_sync(~0u, take);
    if (take) {
      const unsigned before = taken & below;
      const int previous = before ? column0 + 31 - __clz(before) : last;
      const unsigned place = done + __popc(before);
      const unsigned piece = place / lane_places, in_piece = place % lane_places;
      const unsigned to_lane = (home.lane & 255) + piece * rows;
      const unsigned i = in_piece % kChunkValues;
      const unsigned chunk = home.first_chunk + in_piece / kChunkValues;
      const unsigned warp = (p.warps * (chunk + 1) - 1) / total;
      const unsigned own = chunk - warp * total / p.warps;
      const std::size_t stream = static_cast<std::size_t>(home.block) * p.warps + warp;
      unsigned char* unit =
          p.packed + p.streams + stream * p.pitch +
          static_cast<std::size_t>(own / kUnitChunks) * unit_bytes(kValues, kBits);
      GapUnit<kValues, kBits>::put(unit, own % kUnitChunks, i, to_lane, value,
                                   column - previous - 1, p.top);
      if (i == 0) {
        if (own == 0) {
          reinterpret_cast<unsigned short*>(p.packed + p.warp_starts +
                                            stream * kStartBytes)[to_lane] =
              static_cast<unsigned short>(previous + 1);
        }
        if (chunk == home.first_chunk && p.lanes_per_row > 1) {
          const std::size_t group =
              static_cast<std::size_t>(home.block) * p.groups_per_block + (home.lane >> 8);
          reinterpret_cast<unsigned short*>(p.packed + p.group_starts +
                                            group * kStartBytes)[to_lane] =
              static_cast<unsigned short>(previous + 1);
        }
      }
    }
    done += __popc(taken);
    if (taken) last = column0 + 31 - __clz(taken);
  }
}

// ---------- multiplying ----------

struct Params {
  const unsigned char *packed, *weights;
  const unsigned short* starts;  // of warps
  const unsigned short* x;
  __nv_bfloat16* y;
  int n, k, t;
  int k_padded;
  int blocks, groups_per_block, rows_log2;  // rows of a group
  int least_chunks;
  unsigned table_stride;
  unsigned group_starts;
  unsigned pitch;
  float scale;             // of sums: 2^(top - 142), where rows have none
  const unsigned* strays;  // null: none
  bool overlap, x_vectors;
};

using cuda::shared_address;

__device__ __forceinline__ void copy16(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}

__device__ __forceinline__ void copy4(unsigned to, const void* from) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(from) : "memory");
}

template <int kTokens>
__device__ __forceinline__ void multiply(float (&sum)[4], unsigned address, float w, int i) {
  if constexpr (kTokens == 1) {
    unsigned short x;
    asm volatile("ld.shared.u16 %0, [%1];" : "=h"(x) : "r"(address));
    sum[i & 3] = fmaf(w, __uint_as_float(static_cast<unsigned>(x) << 16), sum[i & 3]);
  } else if constexpr (kTokens == 2) {
    unsigned x;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(address));
    sum[2 * (i & 1)] = fmaf(w, __uint_as_float(x << 16), sum[2 * (i & 1)]);
    sum[2 * (i & 1) + 1] = fmaf(w, __uint_as_float(x & 0xffff0000u), sum[2 * (i & 1) + 1]);
  } else {
    unsigned x, z;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x), "=r"(z) : "r"(address));
    sum[0] = fmaf(w, __uint_as_float(x << 16), sum[0]);
    sum[1] = fmaf(w, __uint_as_float(x & 0xffff0000u), sum[1]);
    sum[2] = fmaf(w, __uint_as_float(z << 16), sum[2]);
    sum[3] = fmaf(w, __uint_as_float(z & 0xffff0000u), sum[3]);
  }
}

// 8 places of a lane. `at`: address of the x of the column after the last place; moved on.
template <int kTokens, class Unit>
__device__ __forceinline__ void multiply_chunk(float (&sum)[4], unsigned& at, const Unit& unit,
                                               int c) {
  constexpr int kBytes = 2 * kTokens;  // of x of one column
  const Gaps gaps = unit.gaps(c);
  const unsigned odd_sums = (gaps.even + gaps.odd) * 0x01010101u;  // byte j: of places 0 .. 2j + 1
  const unsigned even_sums = odd_sums - gaps.odd;                  // byte j: of places 0 .. 2j
  const unsigned base = at;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const float2 v = unit.pair(c, j);
    const unsigned a0 = __dp4a(even_sums, static_cast<unsigned>(kBytes) << (8 * j), base);
    const unsigned a1 = __dp4a(odd_sums, static_cast<unsigned>(kBytes) << (8 * j), base);
    multiply<kTokens>(sum, a0 + kBytes * (2 * j), v.x, 2 * j);
    multiply<kTokens>(sum, a1 + kBytes * (2 * j + 1), v.y, 2 * j + 1);
    if (j == 3) at = a1 + kBytes * 8;
  }
}

template <GapValues kValues, int kBits, int kTokens, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) linear_gap_kernel(const Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr bool kCodes = kValues != GapValues::kBf16;
  constexpr int kThreads = kWarps * 32;
  constexpr int kBytes = 2 * kTokens;  // of x of one column
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const unsigned x_at = shared_address(shared);
  // After x: first and last warp of each group, its rows, their scales if W has some, then the sums
  // [segment][token][lane].
  const unsigned spans_at = x_at + (p.k_padded * kBytes + 15) / 16 * 16;
  const int block_rows = p.groups_per_block << p.rows_log2;
  const unsigned rows_at = spans_at + 4 * 32;
  const int columns = kCodes ? 2 * block_rows : block_rows;  // words
  float* const sums = reinterpret_cast<float*>(shared + (rows_at - x_at) + 4 * columns);

  const unsigned char* table = p.packed + blockIdx.x * p.table_stride;
  const unsigned stream = blockIdx.x * kWarps + warp;
  const unsigned char* weights = p.weights + static_cast<std::size_t>(stream) * p.pitch;

  auto fetch_x = [&] {
    if (p.x_vectors) {
      if constexpr (kTokens == 1) {
#pragma unroll 1
        for (int i = threadIdx.x; i < p.k / 8; i += kThreads) copy16(x_at + i * 16, p.x + i * 8);
      } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < p.k / 8; i += kThreads) {
          uint4 q[kTokens];
#pragma unroll
          for (int t = 0; t < kTokens; ++t) {
            q[t] = t < p.t ? *reinterpret_cast<const uint4*>(
                                 p.x + static_cast<std::size_t>(t) * p.k + i * 8)
                           : make_uint4(0, 0, 0, 0);
          }
          unsigned* to = reinterpret_cast<unsigned*>(shared) + i * (8 * kBytes / 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            unsigned w[kTokens];
#pragma unroll
            for (int t = 0; t < kTokens; ++t) {
              w[t] = j == 0 ? q[t].x : j == 1 ? q[t].y : j == 2 ? q[t].z : q[t].w;
            }
            if constexpr (kTokens == 2) {
              *reinterpret_cast<uint2*>(to + 2 * j) =
                  make_uint2(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[0], w[1], 0x7632));
            } else {
              *reinterpret_cast<uint4*>(to + 4 * j) =
                  make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410),
                             __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
            }
          }
        }
      }
      if (p.k < p.k_padded) {
#pragma unroll 1
        for (int i = p.k * kBytes / 4 + threadIdx.x; i < p.k_padded * kBytes / 4; i += kThreads) {
          reinterpret_cast<unsigned*>(shared)[i] = 0;
        }
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.k_padded * kTokens; i += kThreads) {
        const int column = i / kTokens, t = i % kTokens;
        const unsigned short x =
            column < p.k && t < p.t ? p.x[static_cast<std::size_t>(t) * p.k + column] : 0;
        reinterpret_cast<unsigned short*>(shared)[i] = x;
      }
    }
  };
  // At once the weights that every warp has; where some have less, all wait for the table.
  GapUnit<kValues, kBits> unit(weights, lane);
  const unsigned first_chunk = reinterpret_cast<const unsigned*>(table)[lane];
  unsigned start = p.starts[stream * 32 + lane];
  if (p.least_chunks >= kUnitChunks) {
#pragma unroll
    for (int c = 0; c < kUnitChunks; ++c) unit.load(c, 0, kUnitChunks);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < 32 + columns; i += kThreads) {
    copy4(spans_at + i * 4, table + 128 + i * 4);
  }
  if (p.overlap) cuda::await_previous();
  fetch_x();
  cuda::launch_next();

  // The warp's chunks are [begin, begin + count) of the block's.
  const unsigned total = __shfl_sync(~0u, first_chunk, 31);
  const unsigned begin = warp * total / kWarps;
  const int count = static_cast<int>((warp + 1) * total / kWarps - begin);
  if (p.least_chunks < kUnitChunks) {
#pragma unroll
    for (int c = 0; c < kUnitChunks; ++c) unit.load(c, 0, count);
  }
  int group = __popc(__ballot_sync(~0u, first_chunk <= begin)) - 1;
  // End of the current group among the warp's chunks.
  auto group_end = [&] {
    return min(static_cast<int>(__shfl_sync(~0u, first_chunk, group + 1) - begin), count);
  };
  int end = count > 0 ? group_end() : 0;
  unsigned at = x_at + start * kBytes;
  auto next_start = [&]() -> unsigned {
    if (p.rows_log2 == 5) return 0;
    return reinterpret_cast<const unsigned short*>(
        p.packed + p.group_starts)[(blockIdx.x * p.groups_per_block + group + 1) * 32 + lane];
  };
  if (end < count) start = next_start();
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  float sum[4] = {0.f, 0.f, 0.f, 0.f};
  auto store_sums = [&] {
    float* to = sums + (warp + group) * (32 * kTokens) + lane;
    if constexpr (kTokens == 1) {
      to[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    } else if constexpr (kTokens == 2) {
      to[0] = sum[0] + sum[2];
      to[32] = sum[1] + sum[3];
    } else {
#pragma unroll
      for (int t = 0; t < 4; ++t) to[32 * t] = sum[t];
    }
  };
  auto next_group = [&](int chunk) {
    store_sums();
#pragma unroll
    for (int t = 0; t < 4; ++t) sum[t] = 0.f;
    at = x_at + start * kBytes;
    do {
      ++group;
      end = group_end();
    } while (end == chunk);
    if (end < count) start = next_start();
  };
  if (count > 0) {
    for (int chunk = 0;; chunk += kUnitChunks) {
      unit.begin();
#pragma unroll
      for (int c = 0; c < kUnitChunks; ++c) {
        multiply_chunk<kTokens>(sum, at, unit, c);
        unit.load(c, 1, count - chunk - kUnitChunks);
        if (__builtin_expect(chunk + c + 1 == end, 0)) {
          if (end == count) goto done;
          next_group(chunk + c + 1);
        }
      }
      unit.next(1);
    }
  }
done:
  // A warp without chunks between others that share a group counts as well.
  if (count > 0 || begin < total) store_sums();
  __syncthreads();
  // Four lanes add the segments of one row and token.
  const int rows = 1 << p.rows_log2, part = lane & 3;
  for (int slot = threadIdx.x >> 2; slot < ((block_rows + 7) & ~7); slot += kThreads / 4) {
    const int g = slot >> p.rows_log2, r = slot & (rows - 1);
    unsigned span;
    int row;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(span) : "r"(spans_at + g * 4));
    asm volatile("ld.shared.s32 %0, [%1];" : "=r"(row) : "r"(rows_at + slot * 4));
    const int last = static_cast<int>(span >> 16);
    float total_sum[kTokens];
#pragma unroll
    for (int t = 0; t < kTokens; ++t) total_sum[t] = 0.f;
    const int first = static_cast<int>(span & 0xffff) + part;
    const float* from = sums + (first + g) * (32 * kTokens) + r;
#pragma unroll 1
    for (int l = 0; l < 32; l += rows, from += rows) {
#pragma unroll
      for (int w = 0; w < kWarps; w += 4) {
        if (first + w <= last) {
#pragma unroll
          for (int t = 0; t < kTokens; ++t) total_sum[t] += from[w * (32 * kTokens) + 32 * t];
        }
      }
    }
    float scale = p.scale;
    if constexpr (kCodes) {
      asm volatile("ld.shared.f32 %0, [%1];"
                   : "=f"(scale)
                   : "r"(rows_at + (block_rows + slot) * 4));
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) total_sum[t] *= scale;
    if (!kCodes && p.strays != nullptr && slot < block_rows) {
      const unsigned* begin = reinterpret_cast<const unsigned*>(table) + kTableRows + block_rows;
      float stray_sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 1
      for (unsigned i = begin[slot] + part; i < begin[slot + 1]; i += 4) {
        const unsigned stray = p.strays[i];
        multiply<kTokens>(stray_sum, x_at + (stray & 0xffff) * kBytes,
                          __uint_as_float(stray & 0xffff0000u), 0);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) total_sum[t] += stray_sum[t];
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      total_sum[t] += __shfl_xor_sync(~0u, total_sum[t], 1);
      total_sum[t] += __shfl_xor_sync(~0u, total_sum[t], 2);
    }
    if (part < p.t && slot < block_rows && row >= 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t == part) {
          p.y[static_cast<std::size_t>(t) * p.n + row] = __float2bfloat16_rn(total_sum[t]);
        }
      }
    }
  }
}

// ---------- unpacking ----------

constexpr int kUnpackWarps = 12;
constexpr int kUnpackUnits = 2;  // of a stream on their way to a lane
constexpr int kRingColumns = 256;
constexpr int kRingBytes = 2 * kRingColumns;
constexpr int kWriteColumns = 128;
constexpr int kUnpackSharedBytes = kUnpackWarps * 32 * kRingBytes;

struct UnpackParams {
  Params packed;
  int warps;        // streams of a block
  int most_chunks;  // of a stream
  unsigned short* dense;
  float factor;  // 2^(top - 30)
  bool vectors;  // rows begin at 16 bytes, and a vector's number takes 32 bits
};

__device__ __forceinline__ void store_shared_half(unsigned address, unsigned value) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<unsigned short>(value))
               : "memory");
}

__device__ __forceinline__ unsigned short take_shared_half(unsigned address) {
  unsigned short value;
  asm volatile("ld.shared.u16 %0, [%1];" : "=h"(value) : "r"(address) : "memory");
  store_shared_half(address, 0);
  return value;
}

__device__ __forceinline__ void clear_shared4(unsigned address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// 32 rows on their way from a stream to W, a row a lane: values are put into a ring of 256 columns
// a row, and when one row lacks room, all that have enough columns up to a multiple of 128 write
// them, zeros included. The ring of lane l begins 16 l bytes later, so that lanes at one column
// meet few of each other's banks.
struct UnpackRows {
  int row;        // -1: none
  int start;      // its first column in this stream
  int base;       // the first that isn't written, down to a multiple of 8
  int column;     // of the next place
  float factor;   // of its values
  unsigned ring;  // of the warp, in shared memory
};

// Where a column of row r stands.
__device__ __forceinline__ unsigned held_at(unsigned ring, int r, int column) {
  return ring + r * kRingBytes + ((2 * column + 16 * r) & (kRingBytes - 1));
}

// Writes `first` .. `end` - 1 of the 8 columns at `base`, one a lane.
__device__ __forceinline__ void write_some(const UnpackRows& rows, int first, int end,
                                           unsigned short* dense, int k) {
  const int lane = threadIdx.x & 31, e = lane & 7;
  const int packed = rows.base << 8 | first << 4 | max(min(end, k - rows.base), 0);
#pragma unroll 2
  for (int q = 0; q < 8; ++q) {
    const int r = q * 4 + lane / 8;
    const int row = __shfl_sync(~0u, rows.row, r), own = __shfl_sync(~0u, packed, r);
    if (e < (own >> 4 & 15) || e >= (own & 15)) continue;
    const int column = (own >> 8) + e;
    const unsigned short value = take_shared_half(held_at(rows.ring, r, column));
    if (row >= 0) dense[static_cast<std::size_t>(row) * k + column] = value;
  }
  __syncwarp();
}

// Writes up to 128 columns of each row, those up to a multiple of 128 or none, with `rest` whatever
// vectors there are. Returns the new base.
__device__ __noinline__ int write_vectors(UnpackRows rows, unsigned short* dense, int k,
                                          bool rest) {
  constexpr int kParts = kWriteColumns / 8, kAtOnce = 32 / kParts;  // rows
  const int lane = threadIdx.x & 31, part = lane % kParts;
  __syncwarp();
  const int before = rows.start - rows.base;  // these 8 are only in part of this stream
  if (__any_sync(~0u, before > 0)) {
    write_some(rows, before > 0 ? before : 8, 8, dense, k);
    if (before > 0) rows.base += 8;
  }
  const int ready = (min(rows.column, k) - rows.base) / 8;
  const int line = rest ? kParts : kParts - rows.base / 8 % kParts;
  const int count = ready >= line ? line : rest ? max(ready, 0) : 0;
  // Of the row of this lane: its place in the ring and its vectors, and where they go.
  const unsigned from = (rows.base / 8 + lane) % (kRingBytes / 16) |
                        static_cast<unsigned>(rows.row < 0 ? 0 : count) << 8;
  const unsigned to = max(rows.row, 0) * static_cast<unsigned>(k / 8) + rows.base / 8;
  const unsigned ring = rows.ring + lane / kParts * kRingBytes;
#pragma unroll 1
  for (int first = 0; first < 32; first += 8 * kAtOnce) {
    uint4 v[8];
    unsigned at[8];
    bool some[8];
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      const int r = first + q * kAtOnce + lane / kParts;
      const unsigned r_from = __shfl_sync(~0u, from, r);
      at[q] = __shfl_sync(~0u, to, r) + part;
      some[q] = r_from >= static_cast<unsigned>(part + 1) << 8;
      const unsigned address =
          ring + (first + q * kAtOnce) * kRingBytes + (r_from + part) % (kRingBytes / 16) * 16;
      if (some[q]) {
        v[q] = cuda::load_shared4(address);
        clear_shared4(address);
      }
    }
#pragma unroll
    for (int q = 0; q < 8; ++q) {
      if (some[q]) reinterpret_cast<uint4*>(dense)[at[q]] = v[q];
    }
  }
  __syncwarp();
  return rows.base + 8 * count;
}

// Writes all that is left, where rows begin at any address. Returns the new base, any column.
__device__ __noinline__ int write_elements(UnpackRows rows, unsigned short* dense, int k) {
  const int from = max(rows.base, rows.start);
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < 32; ++r) {
    const int row = __shfl_sync(~0u, rows.row, r);
    const int end = min(__shfl_sync(~0u, rows.column, r), k);
    for (int c = __shfl_sync(~0u, from, r) + static_cast<int>(threadIdx.x & 31); c < end; c += 32) {
      const unsigned short value = take_shared_half(held_at(rows.ring, r, c));
      if (row >= 0) dense[static_cast<std::size_t>(row) * k + c] = value;
    }
  }
  __syncwarp();
  return rows.column;
}

// Writes all that is left of vectors, and of elements.
__device__ __noinline__ void write_rest(UnpackRows rows, unsigned short* dense, int k) {
  do {
    rows.base = write_vectors(rows, dense, k, true);
  } while (__any_sync(~0u, min(rows.column, k) - rows.base >= 8));
  write_some(rows, 0, min(rows.column - rows.base, 8), dense, k);
}

// Puts 8 places of each row.
template <class Unit>
__device__ __forceinline__ void put_chunk(UnpackRows& rows, const UnpackParams& u, const Unit& unit,
                                          int c) {
  const int lane = threadIdx.x & 31;
  // Columns that places take, gaps included.
  Gaps gaps = unit.gaps(c);
  gaps.even += 0x01010101u;
  gaps.odd += 0x01010101u;
  const unsigned odd_sums = (gaps.even + gaps.odd) * 0x01010101u;  // byte j: of places 0 .. 2j + 1
  const unsigned even_sums = odd_sums - gaps.odd;
  const int columns = static_cast<int>(odd_sums >> 24);
  while (__any_sync(~0u, rows.column + columns - rows.base > kRingColumns)) {
    rows.base = u.vectors ? write_vectors(rows, u.dense, u.packed.k, false)
                          : write_elements(rows, u.dense, u.packed.k);
  }
  const unsigned at = 2 * rows.column + 16 * lane - 2, own = rows.ring + lane * kRingBytes;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    const unsigned v = unit.bf16_pair(c, j, rows.factor);
    const unsigned a0 = __dp4a(even_sums, 2u << (8 * j), at);
    const unsigned a1 = __dp4a(odd_sums, 2u << (8 * j), at);
    store_shared_half((a0 & (kRingBytes - 1)) | own, v);
    store_shared_half((a1 & (kRingBytes - 1)) | own, v >> 16);
  }
  rows.column += columns;
}

// One warp unpacks one stream after the other, without a word to the others: 12 of them leave each
// other room for their rings. All lanes take the same chunk at once, so that loads lie side by side
// as they do for products.
template <GapValues kValues, int kBits>
__global__ void __launch_bounds__(kUnpackWarps * 32, 1) gap_unpack_kernel(const UnpackParams u) {
  extern __shared__ __align__(1024) unsigned char rings[];
  const Params& p = u.packed;
  const int lane = threadIdx.x & 31, own = __shfl_sync(~0u, threadIdx.x >> 5, 0);
  unsigned char* const ring = rings + own * (32 * kRingBytes);
  for (int i = lane; i < 32 * kRingBytes / 16; i += 32) {
    reinterpret_cast<uint4*>(ring)[i] = make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
  UnpackRows to = {-1, 0, 0, 0, u.factor, shared_address(ring)};
  const int rows = 1 << p.rows_log2, block_rows = p.groups_per_block << p.rows_log2;
  const unsigned long long streams = static_cast<unsigned>(p.blocks * u.warps);
  const unsigned last = streams * (blockIdx.x + 1) / gridDim.x;
  for (unsigned s = streams * blockIdx.x / gridDim.x + own; s < last; s += kUnpackWarps) {
    const unsigned char* const weights = p.weights + static_cast<std::size_t>(s) * p.pitch;
    using Unit = GapUnit<kValues, kBits>;
    static_assert(kUnpackUnits == 2);
    Unit units[] = {{weights, lane}, {weights + unit_bytes(kValues, kBits), lane}};
#pragma unroll
    for (int q = 0; q < kUnpackUnits; ++q) {
#pragma unroll
      for (int c = 0; c < kUnitChunks; ++c) {
        units[q].load(c, 0, u.most_chunks - q * kUnitChunks);
      }
    }
    const unsigned block = s / u.warps, warp = s % u.warps;
    const unsigned* const table = reinterpret_cast<const unsigned*>(
        p.packed + static_cast<std::size_t>(block) * p.table_stride);
    const unsigned first_chunk = table[lane];
    int start = p.starts[s * 32 + lane];
    const unsigned total = __shfl_sync(~0u, first_chunk, 31);
    const unsigned begin = warp * total / u.warps;
    const int count = static_cast<int>((warp + 1) * total / u.warps - begin);
    int group = __popc(__ballot_sync(~0u, first_chunk <= begin)) - 1;
    int group_end = 0, end = 0;
    const auto enter = [&] {  // the next group that the stream meets
      const int chunk = end;
      for (;; ++group) {
        group_end = static_cast<int>(__shfl_sync(~0u, first_chunk, group + 1) - begin);
        end = min(group_end, count);
        if (end > chunk) break;
      }
      if (chunk > 0) {
        start =
            rows == 32
                ? 0
                : reinterpret_cast<const unsigned short*>(
                      p.packed + p.group_starts)[(block * p.groups_per_block + group) * 32 + lane];
      }
      const int slot = kTableRows + group * rows + (lane & (rows - 1));
      to.row = static_cast<int>(table[slot]);
      if (kValues != GapValues::kBf16) to.factor = __uint_as_float(table[slot + block_rows]);
      to.start = to.column = start;
      to.base = start & ~7;
    };
    if (count > 0) enter();
    for (int chunk = 0; chunk < count; chunk += kUnpackUnits * kUnitChunks) {
      // Long reads next to each other: of the next units, from memory into L2.
      const int next = chunk / kUnitChunks + kUnpackUnits;
      const int ahead = u.most_chunks / kUnitChunks - next;
      if (lane == 0 && ahead > 0) {
        cuda::prefetch(weights + static_cast<std::size_t>(next) * unit_bytes(kValues, kBits),
                       min(ahead, kUnpackUnits) * unit_bytes(kValues, kBits));
      }
#pragma unroll
      for (int q = 0; q < kUnpackUnits; ++q) {
        units[q].begin();
#pragma unroll
        for (int c = 0; c < kUnitChunks; ++c) {
          const int at = chunk + q * kUnitChunks + c;
          if (at >= count) continue;
          put_chunk(to, u, units[q], c);
          if (at + 1 != end) continue;
          // The last lane of a row writes up to its end, the others up to their last place.
          if (end == group_end && lane >= 32 - rows && to.row >= 0) {
            to.column = max(to.column, p.k);
          }
          if (u.vectors) {
            write_rest(to, u.dense, p.k);
          } else {
            write_elements(to, u.dense, p.k);
          }
          if (end < count) enter();
        }
      }
      // All at once: asked for chunk by chunk, as products do, they took a fifth longer.
#pragma unroll
      for (int q = 0; q < kUnpackUnits; ++q) {
#pragma unroll
        for (int c = 0; c < kUnitChunks; ++c) {
          units[q].load(c, kUnpackUnits, u.most_chunks - chunk - (kUnpackUnits + q) * kUnitChunks);
        }
        units[q].next(kUnpackUnits);
      }
    }
  }
}

__global__ void __launch_bounds__(128)
    gap_scales_kernel(const Params p, const __nv_bfloat16* scales) {
  const int block_rows = p.groups_per_block << p.rows_log2;
  unsigned* const rows = const_cast<unsigned*>(reinterpret_cast<const unsigned*>(
                             p.packed + static_cast<std::size_t>(blockIdx.x) * p.table_stride)) +
                         kTableRows;
  for (int slot = threadIdx.x; slot < block_rows; slot += blockDim.x) {
    const unsigned row = rows[slot];
    if (row < static_cast<unsigned>(p.n)) {
      rows[block_rows + slot] = __float_as_uint(__bfloat162float(scales[row]));
    }
  }
}

__global__ void __launch_bounds__(128)
    gap_unpack_strays_kernel(const Params p, unsigned short* dense) {
  const int block_rows = p.groups_per_block << p.rows_log2;
  const unsigned* const rows =
      reinterpret_cast<const unsigned*>(p.packed +
                                        static_cast<std::size_t>(blockIdx.x) * p.table_stride) +
      kTableRows;
  const unsigned* const begin = rows + block_rows;
  for (int slot = threadIdx.x; slot < block_rows; slot += blockDim.x) {
    for (unsigned i = begin[slot]; i < begin[slot + 1]; ++i) {
      const unsigned stray = p.strays[i];
      dense[static_cast<std::size_t>(rows[slot]) * p.k + (stray & 0xffff)] =
          static_cast<unsigned short>(stray >> 16);
    }
  }
}

// ---------- host ----------

using Kernel = void (*)(const Params);

template <GapValues kValues, int kBits, int kTokens>
Kernel find_warps(int warps) {
  return warps == 16   ? linear_gap_kernel<kValues, kBits, kTokens, 16>
         : warps == 24 ? linear_gap_kernel<kValues, kBits, kTokens, 24>
                       : nullptr;
}

template <GapValues kValues, int kBits>
Kernel find_tokens(const GapPlan& plan, int warps) {
  if (plan.tokens == 1) return find_warps<kValues, kBits, 1>(warps);
  if (plan.tokens == 2) return find_warps<kValues, kBits, 2>(warps);
  if constexpr (kValues == GapValues::kBf16) {
    if (plan.tokens == 4) return find_warps<kValues, kBits, 4>(warps);
  }
  return nullptr;
}

// f.operator()<kValues, kBits>() of a layout.
template <class F>
auto with_format(const GapLayout& l, F&& f) {
  const auto with_bits = [&]<GapValues kValues>() {
    return l.bits == 3 ? f.template operator()<kValues, 3>() : f.template operator()<kValues, 4>();
  };
  return l.values == GapValues::kBf16   ? with_bits.template operator()<GapValues::kBf16>()
         : l.values == GapValues::kInt8 ? with_bits.template operator()<GapValues::kInt8>()
                                        : with_bits.template operator()<GapValues::kFp8>();
}

Kernel find_kernel(const GapLayout& layout, const GapPlan& plan) {
  return with_format(layout, [&]<GapValues kValues, int kBits>() {
    return find_tokens<kValues, kBits>(plan, layout.warps);
  });
}

// Rows are filled up with zeros of the free columns, up to 8 x 8 at the end of a row.
int padded(std::int64_t k) { return static_cast<int>((k + 63) / 64 * 64); }

// x, tables and sums.
std::size_t shared_bytes(const GapLayout& l, const GapPlan& plan) {
  const int block_rows = l.groups_per_block * (32 / l.lanes_per_row);
  return round_up(static_cast<std::size_t>(padded(l.k)) * plan.tokens * 2, 16) + 4 * 32 +
         4 * static_cast<std::size_t>(l.values == GapValues::kBf16 ? block_rows : 2 * block_rows) +
         static_cast<std::size_t>(l.warps + l.groups_per_block) * 128 * plan.tokens;
}

bool layout_ok(const GapLayout& l) {
  return gap_shape_refusal(l.n, l.k, 1) == nullptr && (l.bits == 3 || l.bits == 4) &&
         (l.lanes_per_row == 1 || l.lanes_per_row == 2 || l.lanes_per_row == 4 ||
          l.lanes_per_row == 8) &&
         (l.values == GapValues::kBf16 ? l.top >= 1 && l.top <= kMostTop : l.top == 0) &&
         l.strays >= 0 && l.strays <= UINT32_MAX && l.warps > 0 && l.blocks > 0 &&
         l.groups_per_block > 0 && l.groups_per_block <= kMaxGroups &&
         parts_of(l).bytes == l.packed_bytes;
}

cudaError_t usable_multiprocessors(int* count) {
  const cudaError_t error = cuda::multiprocessors(count);
  if (error == cudaSuccess) *count = std::min(*count, kMostSms);
  return error;
}

Params params_of(const void* packed, const GapLayout& layout) {
  const Parts parts = parts_of(layout);
  Params p = {};
  p.packed = static_cast<const unsigned char*>(packed);
  p.n = static_cast<int>(layout.n);
  p.k = static_cast<int>(layout.k);
  p.k_padded = padded(layout.k);
  p.blocks = layout.blocks;
  p.groups_per_block = layout.groups_per_block;
  p.rows_log2 = layout.lanes_per_row == 1   ? 5
                : layout.lanes_per_row == 2 ? 4
                : layout.lanes_per_row == 4 ? 3
                                            : 2;
  p.least_chunks = layout.least_chunks;
  p.table_stride = static_cast<unsigned>(parts.table_stride);
  p.weights = p.packed + parts.streams;
  p.starts = reinterpret_cast<const unsigned short*>(p.packed + parts.warp_starts);
  p.group_starts = static_cast<unsigned>(parts.group_starts);
  p.pitch = static_cast<unsigned>(parts.pitch);
  p.scale = std::ldexp(1.0f, layout.top - 142);
  p.strays =
      layout.strays > 0 ? reinterpret_cast<const unsigned*>(p.packed + parts.strays) : nullptr;
  return p;
}

}  // namespace

const char* gap_refusal(std::int64_t n, std::int64_t k, int t, int device) {
  if (const char* reason = gap_shape_refusal(n, k, t)) return reason;
  return cuda::sm90_refusal(device);
}

std::size_t gap_scratch_bytes(std::int64_t n) { return scratch_parts(n).bytes; }

cudaError_t gap_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                        GapLayout* layout, cudaStream_t stream) {
  if (gap_shape_refusal(n, k, 1) != nullptr || dense == nullptr || scratch == nullptr ||
      layout == nullptr || reinterpret_cast<std::uintptr_t>(dense) % 2 != 0 ||
      reinterpret_cast<std::uintptr_t>(scratch) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  const Scratch at = scratch_parts(n);
  unsigned char* const base = static_cast<unsigned char*>(scratch);
  int sms = 0, top = 0;
  cudaError_t error = usable_multiprocessors(&sms);
  if (error == cudaSuccess) error = cudaMemsetAsync(base + at.top, 0, sizeof top, stream);
  if (error != cudaSuccess) return error;
  const auto* const weights = static_cast<const unsigned short*>(dense);
  int* const top_of_all = reinterpret_cast<int*>(base + at.top);
  if (layout->values == GapValues::kBf16) {
    gap_top_kernel<<<8 * sms, 256, 0, stream>>>(weights, static_cast<std::size_t>(n) * k,
                                                top_of_all);
  }
  gap_count_kernel<<<ceil_div(n, 8), 256, 0, stream>>>(
      weights, static_cast<int>(n), static_cast<int>(k), padded(k), top_of_all,
      reinterpret_cast<RowCount*>(base + at.counts));
  error = cudaGetLastError();
  if (error != cudaSuccess) return error;
  std::vector<RowCount> counts(n);
  error = cudaMemcpyAsync(counts.data(), base + at.counts, n * sizeof(RowCount),
                          cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(&top, top_of_all, sizeof top, cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return error;

  GapLayout l;
  l.n = n;
  l.k = k;
  l.bits = layout->bits;
  l.lanes_per_row = layout->lanes_per_row;
  l.warps = layout->warps;
  l.values = layout->values;
  l.top = top;
  std::int64_t places[2] = {0, 0};
  for (const RowCount& c : counts) {
    l.kept += c.kept + c.strays;
    l.strays += c.strays;
    for (int b = 0; b < 2; ++b) places[b] += c.places[b];
  }
  if (l.bits == 0) {
    const int bits = l.values == GapValues::kBf16 ? 16 : 11;  // a place with a gap of 3
    l.bits = places[0] * bits <= places[1] * (bits + 1) ? 3 : 4;
  }

  // Fewest lanes a row that leave the multiprocessors evenly busy.
  auto blocks_for = [&](int lanes) {
    const int groups = ceil_div(n * lanes, 32);
    const int waves = ceil_div(groups, static_cast<std::int64_t>(sms) * kMaxGroups);
    return std::min(groups, sms * waves);
  };
  auto evenness = [&](int lanes) {
    const int groups = ceil_div(n * lanes, 32), blocks = blocks_for(lanes);
    const double in_turn = ceil_div(blocks, sms) * ceil_div(groups, blocks);
    return groups / (in_turn * sms);
  };
  if (l.lanes_per_row == 0) {
    double best = 0;
    for (int lanes = 1; lanes <= 8; lanes *= 2) best = std::max(best, evenness(lanes));
    for (l.lanes_per_row = 1; evenness(l.lanes_per_row) < 0.93 * best; l.lanes_per_row *= 2) {
    }
  }
  l.blocks = blocks_for(l.lanes_per_row);
  if (l.warps == 0) {  // few warps start sooner, more of them have more weights in flight
    const std::int64_t chunks = places[l.bits - 3] / (32 * kChunkValues * l.blocks);
    l.warps = chunks < 140 ? 16 : 24;
  }

  // Rows of like length share a group; the longest groups go first, each to the block with the
  // fewest chunks so far.
  const int rows = 32 / l.lanes_per_row, groups = ceil_div(n, rows), b = l.bits - 3;
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int c) { return counts[a].places[b] > counts[c].places[b]; });
  std::vector<int> group_chunks(groups);
  for (int g = 0; g < groups; ++g) {
    const int longest = counts[order[static_cast<std::size_t>(g) * rows]].places[b];
    group_chunks[g] = ceil_div(longest, kChunkValues * l.lanes_per_row);
  }
  std::vector<std::vector<int>> members(l.blocks);
  std::vector<unsigned> totals(l.blocks, 0);
  using Load = std::pair<unsigned, int>;
  std::priority_queue<Load, std::vector<Load>, std::greater<Load>> loads;
  for (int i = 0; i < l.blocks; ++i) loads.push({0, i});
  for (int g = 0; g < groups; ++g) {
    const int block = loads.top().second;
    loads.pop();
    members[block].push_back(g);
    totals[block] += group_chunks[g];
    if (members[block].size() < kMaxGroups) loads.push({totals[block], block});
  }
  l.least_chunks = 1 << 30;
  for (int i = 0; i < l.blocks; ++i) {
    l.groups_per_block = std::max(l.groups_per_block, static_cast<int>(members[i].size()));
    l.least_chunks = std::min(l.least_chunks, static_cast<int>(totals[i] / l.warps));
    l.most_chunks = std::max(l.most_chunks, ceil_div(totals[i], l.warps));
    l.places += static_cast<std::int64_t>(totals[i]) * 32 * kChunkValues;
  }
  const Parts parts = parts_of(l);
  l.packed_bytes = parts.bytes;

  std::vector<RowHome> homes(n);
  std::vector<unsigned> tables(l.blocks * parts.table_stride / 4, ~0u);
  unsigned strays = 0;
  for (int i = 0; i < l.blocks; ++i) {
    unsigned* table = tables.data() + i * parts.table_stride / 4;
    unsigned* first_stray = table + kTableRows + l.groups_per_block * rows;
    unsigned chunk = 0;
    for (int j = 0; j < 32; ++j) table[32 + j] = kNoSpan;
    for (int j = 0; j < 32; ++j) {
      const bool some = j < static_cast<int>(members[i].size());
      table[j] = chunk;
      if (!some) continue;
      const int g = members[i][j];
      for (int r = 0; r < rows; ++r) {
        const std::int64_t index = static_cast<std::int64_t>(g) * rows + r;
        if (index >= n) break;
        const int row = order[index];
        table[kTableRows + j * rows + r] = row;
        homes[row] = {static_cast<unsigned>(i), chunk, static_cast<unsigned>(group_chunks[g]),
                      static_cast<unsigned>(r | j << 8), strays};
        if (l.strays > 0) first_stray[j * rows + r] = strays;
        strays += counts[row].strays;
      }
      if (group_chunks[g] > 0) {
        const auto warp_of = [&](unsigned c) { return (l.warps * (c + 1) - 1) / totals[i]; };
        table[32 + j] = warp_of(chunk) | warp_of(chunk + group_chunks[g] - 1) << 16;
      }
      chunk += group_chunks[g];
    }
    // Where a block has no row, and behind the last.
    if (l.strays > 0) {
      for (int r = 0; r <= l.groups_per_block * rows; ++r) {
        if (first_stray[r] == ~0u) first_stray[r] = strays;
      }
    }
  }
  if (at.tables + tables.size() * 4 > at.bytes ||
      static_cast<std::size_t>(l.blocks) > static_cast<std::size_t>(n) + kMostSms) {
    return cudaErrorInvalidValue;
  }
  error = cudaMemcpyAsync(base + at.homes, homes.data(), n * sizeof(RowHome),
                          cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(base + at.totals, totals.data(), totals.size() * 4,
                            cudaMemcpyHostToDevice, stream);
  }
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(base + at.tables, tables.data(), tables.size() * 4,
                            cudaMemcpyHostToDevice, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) *layout = l;
  return error;
}

cudaError_t gap_pack(const void* dense, const void* scratch, const GapLayout& layout, void* packed,
                     cudaStream_t stream) {
  if (!layout_ok(layout) || dense == nullptr || scratch == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  const Scratch at = scratch_parts(layout.n);
  const Parts parts = parts_of(layout);
  const unsigned char* const base = static_cast<const unsigned char*>(scratch);
  unsigned char* const to = static_cast<unsigned char*>(packed);
  cudaError_t error = cudaMemcpyAsync(to, base + at.tables, layout.blocks * parts.table_stride,
                                      cudaMemcpyDeviceToDevice, stream);
  if (error == cudaSuccess) {
    error = cudaMemsetAsync(to + parts.warp_starts, 0, parts.bytes - parts.warp_starts, stream);
  }
  if (error != cudaSuccess) return error;
  PackParams p;
  p.dense = static_cast<const unsigned short*>(dense);
  p.counts = reinterpret_cast<const RowCount*>(base + at.counts);
  p.homes = reinterpret_cast<const RowHome*>(base + at.homes);
  p.totals = reinterpret_cast<const unsigned*>(base + at.totals);
  p.packed = to;
  p.n = static_cast<int>(layout.n);
  p.k = static_cast<int>(layout.k);
  p.k_padded = padded(layout.k);
  p.top = layout.top;
  p.lanes_per_row = layout.lanes_per_row;
  p.warps = layout.warps;
  p.groups_per_block = layout.groups_per_block;
  p.warp_starts = parts.warp_starts;
  p.group_starts = parts.group_starts;
  p.streams = parts.streams;
  p.pitch = parts.pitch;
  p.strays = parts.strays;
  const auto kernel = with_format(
      layout, [&]<GapValues kValues, int kBits>() { return gap_pack_kernel<kValues, kBits>; });
  kernel<<<ceil_div(layout.n, 8), 256, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t gap_pack_scales(const void* scales, const GapLayout& layout, void* packed,
                            cudaStream_t stream) {
  if (!layout_ok(layout) || layout.values == GapValues::kBf16 || scales == nullptr ||
      packed == nullptr || reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  gap_scales_kernel<<<layout.blocks, 128, 0, stream>>>(params_of(packed, layout),
                                                       static_cast<const __nv_bfloat16*>(scales));
  return cudaGetLastError();
}

cudaError_t gap_unpack(const void* packed, const GapLayout& layout, void* dense,
                       cudaStream_t stream) {
  if (!layout_ok(layout) || dense == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  const Params p = params_of(packed, layout);
  const bool vectors = layout.k % 8 == 0 && reinterpret_cast<std::uintptr_t>(dense) % 16 == 0 &&
                       layout.n * layout.k / 8 <= UINT32_MAX;
  const auto kernel = with_format(
      layout, [&]<GapValues kValues, int kBits>() { return gap_unpack_kernel<kValues, kBits>; });
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kUnpackSharedBytes);
  int sms = 0;
  if (error == cudaSuccess) error = usable_multiprocessors(&sms);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(sms, layout.blocks * layout.warps);
  kernel<<<blocks, kUnpackWarps * 32, kUnpackSharedBytes, stream>>>(
      {p, layout.warps, layout.most_chunks, static_cast<unsigned short*>(dense),
       std::ldexp(1.0f, layout.top - kExponents), vectors});
  if (layout.strays > 0) {
    gap_unpack_strays_kernel<<<layout.blocks, 128, 0, stream>>>(
        p, static_cast<unsigned short*>(dense));
  }
  return cudaGetLastError();
}

std::size_t gap_shared_bytes(const GapLayout& layout, const GapPlan& plan) {
  return find_kernel(layout, plan) != nullptr ? shared_bytes(layout, plan) : 0;
}

cudaError_t gap_plan(const GapLayout& layout, int t, GapPlan* plan) {
  if (!layout_ok(layout) || t < 1 || t > kMaxTokens || plan == nullptr) {
    return cudaErrorInvalidValue;
  }
  GapPlan p;
  p.tokens = t <= 2 ? t : layout.values == GapValues::kBf16 ? 4 : 2;
  while (p.tokens > 1 && shared_bytes(layout, p) > kMaxSharedBytes) p.tokens /= 2;
  if (gap_shared_bytes(layout, p) == 0 || shared_bytes(layout, p) > kMaxSharedBytes) {
    return cudaErrorNotSupported;
  }
  *plan = p;
  return cudaSuccess;
}

cudaError_t gap_run(const void* packed, const GapLayout& layout, const void* x, void* y, int t,
                    const GapPlan& plan, bool overlap_previous, cudaStream_t stream) {
  const Kernel kernel = find_kernel(layout, plan);
  if (!layout_ok(layout) || kernel == nullptr || t < 1 || t > kMaxTokens || packed == nullptr ||
      x == nullptr || y == nullptr || reinterpret_cast<std::uintptr_t>(packed) % 128 != 0 ||
      reinterpret_cast<std::uintptr_t>(x) % 2 != 0 ||
      reinterpret_cast<std::uintptr_t>(y) % 2 != 0) {
    return cudaErrorInvalidValue;
  }
  const std::size_t bytes = shared_bytes(layout, plan);
  if (bytes > kMaxSharedBytes) return cudaErrorInvalidValue;
  cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                           static_cast<int>(bytes));
  if (error != cudaSuccess) return error;
  Params p = params_of(packed, layout);
  p.overlap = overlap_previous;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(layout.blocks);
  config.blockDim = dim3(layout.warps * 32);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  cudaLaunchAttribute attribute;
  config.attrs = &attribute;
  if (overlap_previous) {
    attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attribute.val.programmaticStreamSerializationAllowed = 1;
    config.numAttrs = 1;
  }
  for (int token = 0; token < t && error == cudaSuccess; token += plan.tokens) {
    p.t = std::min(plan.tokens, t - token);
    p.x = static_cast<const unsigned short*>(x) + token * layout.k;
    p.y = static_cast<__nv_bfloat16*>(y) + token * layout.n;
    p.x_vectors = layout.k % 8 == 0 && reinterpret_cast<std::uintptr_t>(p.x) % 16 == 0;
    error = cudaLaunchKernelEx(&config, kernel, p);
  }
  return error;
}

namespace {

struct Call {
  int t;
  GapPlan plan;
};

}  // namespace

namespace {

int pack_scales(const GpuLayout* layout, const void* scales, void* packed, GpuStream stream) {
  return gap_pack_scales(scales, held<GapLayout>(layout), packed,
                         static_cast<cudaStream_t>(stream));
}

template <GapValues kValues>
constexpr GpuLinearKernel shown_as(const char* name) {
  constexpr int64_t kMost = kValues == GapValues::kBf16 ? kGapMaxTokens : kGapCodesMaxTokens;
  return {
      .operation = "linear_bitmap",
      .name = name,
      .scratch_bytes = [](int64_t n, int64_t) -> size_t { return gap_scratch_bytes(n); },
      .measure = [](const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
                    GpuStream stream) -> int {
        GapLayout gaps;
        gaps.values = kValues;
        const cudaError_t error =
            gap_measure(dense, n, k, scratch, &gaps, static_cast<cudaStream_t>(stream));
        layout->packed_bytes = gaps.packed_bytes;
        hold(layout, gaps);
        return error;
      },
      .pack = [](const GpuLayout* layout, const void* dense, const void* scratch, void* packed,
                 GpuPackReport*, GpuStream stream) -> int {
        return gap_pack(dense, scratch, held<GapLayout>(layout), packed,
                        static_cast<cudaStream_t>(stream));
      },
      .unpack = [](const GpuLayout* layout, const void* packed, void* dense,
                   GpuStream stream) -> int {
        return gap_unpack(packed, held<GapLayout>(layout), dense,
                          static_cast<cudaStream_t>(stream));
      },
      .max_tokens = [](const GpuLayout* layout) -> int64_t {
        return held<GapLayout>(layout).k > kGapMaxInputsOfTokens ? 1 : kMost;
      },
      .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
      .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
        Call call{static_cast<int>(std::min(tokens, kMost + 1)), {}};
        const cudaError_t error = gap_plan(held<GapLayout>(layout), call.t, &call.plan);
        if (error == cudaSuccess) hold(plan, call);
        return error;
      },
      .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
      .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                void* y, void*, int overlap_previous, GpuStream stream) -> int {
        const auto call = held<Call>(plan);
        return gap_run(packed, held<GapLayout>(layout), x, y, call.t, call.plan,
                       overlap_previous != 0, static_cast<cudaStream_t>(stream));
      },
      .pack_scales = kValues == GapValues::kBf16 ? nullptr : &pack_scales,
  };
}

}  // namespace

const GpuLinearKernel kGap = shown_as<GapValues::kBf16>("cuda_sm90_gap");
const GpuLinearKernel kGapInt8 = shown_as<GapValues::kInt8>("cuda_sm90_gap_int8");
const GpuLinearKernel kGapFp8 = shown_as<GapValues::kFp8>("cuda_sm90_gap_fp8");

}  // namespace lacuna::kernels::linear_bitmap
