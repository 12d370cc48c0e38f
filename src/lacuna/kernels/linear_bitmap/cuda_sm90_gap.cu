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
//   group: 32 rows (16, 8, 4 with 2, 4, 8 lanes a row: where whole groups would leave blocks
//   idle, or the longest rows in one)
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
// 3 to 8 tokens: the x of a column is 8 bytes (and 8 more behind those of all columns), and 16
// lanes meet in few banks only if packing sees to it. So places stand in windows, in the order that
// it chose (cuda_sm90_gap_windows.cuh); all else is the same.
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
#include <numeric>
#include <type_traits>
#include <utility>
#include <vector>

#include "lacuna/kernels/cuda/own_layout.h"
#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_device.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_pack.cuh"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_units.cuh"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_windows.cuh"
#include "lacuna/kernels/linear_bitmap/deal.h"

namespace lacuna::kernels::linear_bitmap {
namespace {

constexpr int kTableRows = 64;        // words of a table before its rows
constexpr int kMaxGroups = 31;        // of a block: its table has 32 entries
constexpr unsigned kNoSpan = 0xffff;  // first warp 65535, last warp 0
constexpr int kMaxSharedBytes = 227 * 1024;

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
  const int units = l.most_chunks / unit_chunks(l.bits), rest = l.most_chunks % unit_chunks(l.bits);
  p.pitch = static_cast<std::size_t>(units) * unit_bytes(l.values, l.bits) +
            (rest > 0 ? head_bytes(l.values, l.bits) + value_bytes(l.values, l.bits, rest) : 0);
  p.strays = p.streams + static_cast<std::size_t>(l.blocks) * l.warps * p.pitch;
  p.bytes = p.strays + 4 * static_cast<std::size_t>(l.strays);
  return p;
}

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

// Tokens whose x stand side by side: 1, 2, 4, or 4 and behind all of them 4 more.
__host__ __device__ constexpr int slab_tokens(int tokens) { return tokens < 4 ? tokens : 4; }
__host__ __device__ constexpr int sum_count(int tokens) { return tokens < 4 ? 4 : tokens; }
// Ahead of each slab of windows: zeros, the last 2 * slab_tokens() bytes of which are the column
// before the first.
__host__ __device__ constexpr int guard_bytes(int bits) { return bits == kWindowBits ? 16 : 0; }
__host__ __device__ constexpr int slab_bytes(int bits, int tokens, int k_padded) {
  return (2 * slab_tokens(tokens) * k_padded + 15) / 16 * 16 + guard_bytes(bits);
}

// Four tokens.
__device__ __forceinline__ void multiply_four(float* sum, unsigned address, float w) {
  unsigned x, z;
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x), "=r"(z) : "r"(address));
  sum[0] = fmaf(w, __uint_as_float(x << 16), sum[0]);
  sum[1] = fmaf(w, __uint_as_float(x & 0xffff0000u), sum[1]);
  sum[2] = fmaf(w, __uint_as_float(z << 16), sum[2]);
  sum[3] = fmaf(w, __uint_as_float(z & 0xffff0000u), sum[3]);
}

template <int kTokens>
__device__ __forceinline__ void multiply(float (&sum)[sum_count(kTokens)], unsigned address,
                                         float w, int i, unsigned slab) {
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
    multiply_four(sum, address, w);
    if constexpr (kTokens == 8) multiply_four(sum + 4, address + slab, w);
  }
}

// A chunk of places of a lane. `at`: address of the x of the column after the last place (of
// windows: of the last place itself); moved on.
template <int kBits, int kTokens, class Unit>
__device__ __forceinline__ void multiply_chunk(float (&sum)[sum_count(kTokens)], unsigned& at,
                                               const Unit& unit, int c, unsigned slab) {
  constexpr unsigned kBytes = 2 * slab_tokens(kTokens);  // of x of one column
  const unsigned base = at;
  if constexpr (kBits == kWindowBits) {
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const unsigned offsets = unit.offsets(c, q);
      unsigned a[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) a[j] = __dp4a(offsets, kBytes << (8 * j), base);
      const float2 v0 = unit.pair(c, 2 * q), v1 = unit.pair(c, 2 * q + 1);
      multiply<kTokens>(sum, a[0], v0.x, 0, slab);
      multiply<kTokens>(sum, a[2], v0.y, 1, slab);
      multiply<kTokens>(sum, a[1], v1.x, 2, slab);
      multiply<kTokens>(sum, a[3], v1.y, 3, slab);
      if (q == 3) at = max(max(a[0], a[1]), max(a[2], a[3]));
    }
  } else {
    const Gaps gaps = unit.gaps(c);
    const unsigned odd_sums = (gaps.even + gaps.odd) * 0x01010101u;  // byte j: places 0 .. 2j + 1
    const unsigned even_sums = odd_sums - gaps.odd;                  // byte j: places 0 .. 2j
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 v = unit.pair(c, j);
      const unsigned a0 = __dp4a(even_sums, kBytes << (8 * j), base);
      const unsigned a1 = __dp4a(odd_sums, kBytes << (8 * j), base);
      multiply<kTokens>(sum, a0 + kBytes * (2 * j), v.x, 2 * j, slab);
      multiply<kTokens>(sum, a1 + kBytes * (2 * j + 1), v.y, 2 * j + 1, slab);
      if (j == 3) at = a1 + kBytes * 8;
    }
  }
}

template <GapValues kValues, int kBits, int kTokens, int kWarps>
__global__ void __launch_bounds__(kWarps * 32, 1) linear_gap_kernel(const Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  constexpr bool kCodes = kValues != GapValues::kBf16;
  using Unit = GapUnit<kValues, kBits>;
  constexpr int kThreads = kWarps * 32;
  constexpr int kSlabTokens = slab_tokens(kTokens), kBytes = 2 * kSlabTokens;  // of x of one column
  constexpr int kGuard = guard_bytes(kBits);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const unsigned slab = slab_bytes(kBits, kTokens, p.k_padded);
  const unsigned x_at = shared_address(shared) + kGuard;  // column 0
  // Column before the first place of a stream: windows count from the column of their last place.
  constexpr int kBefore = kBits == kWindowBits ? kBytes : 0;
  // After x: first and last warp of each group, its rows, their scales if W has some, then the sums
  // [segment][token][lane].
  const unsigned spans_at = x_at - kGuard + kTokens / kSlabTokens * slab;
  const int block_rows = p.groups_per_block << p.rows_log2;
  const unsigned rows_at = spans_at + 4 * 32;
  const int columns = kCodes ? 2 * block_rows : block_rows;  // words
  float* const sums = reinterpret_cast<float*>(shared + (rows_at + kGuard - x_at) + 4 * columns);

  const unsigned char* table = p.packed + blockIdx.x * p.table_stride;
  const unsigned stream = blockIdx.x * kWarps + warp;
  const unsigned char* weights = p.weights + static_cast<std::size_t>(stream) * p.pitch;

  // x of kSlabTokens tokens from `first` on.
  auto fetch_slab = [&](int first) {
    unsigned* const slab_words = reinterpret_cast<unsigned*>(shared + first / kSlabTokens * slab);
    unsigned* const words = slab_words + kGuard / 4;
    const unsigned short* const from = p.x + static_cast<std::size_t>(first) * p.k;
    const int tokens = p.t - first;
    if constexpr (kGuard > 0) {
      if (threadIdx.x < kGuard / 4) slab_words[threadIdx.x] = 0;
    }
    if (p.x_vectors) {
      if constexpr (kTokens == 1) {
#pragma unroll 1
        for (int i = threadIdx.x; i < p.k / 8; i += kThreads) copy16(x_at + i * 16, from + i * 8);
      } else {
#pragma unroll 1
        for (int i = threadIdx.x; i < p.k / 8; i += kThreads) {
          uint4 q[kSlabTokens];
#pragma unroll
          for (int t = 0; t < kSlabTokens; ++t) {
            q[t] = t < tokens ? *reinterpret_cast<const uint4*>(
                                    from + static_cast<std::size_t>(t) * p.k + i * 8)
                              : make_uint4(0, 0, 0, 0);
          }
          unsigned* to = words + i * (8 * kBytes / 4);
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            unsigned w[kSlabTokens];
#pragma unroll
            for (int t = 0; t < kSlabTokens; ++t) {
              w[t] = j == 0 ? q[t].x : j == 1 ? q[t].y : j == 2 ? q[t].z : q[t].w;
            }
            if constexpr (kSlabTokens == 2) {
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
          words[i] = 0;
        }
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < p.k_padded * kSlabTokens; i += kThreads) {
        const int column = i / kSlabTokens, t = i % kSlabTokens;
        const unsigned short x =
            column < p.k && t < tokens ? from[static_cast<std::size_t>(t) * p.k + column] : 0;
        reinterpret_cast<unsigned short*>(words)[i] = x;
      }
    }
  };
  // At once the weights that every warp has; where some have less, all wait for the table.
  Unit unit(weights, lane);
  const unsigned first_chunk = reinterpret_cast<const unsigned*>(table)[lane];
  unsigned start = p.starts[stream * 32 + lane];
  if (p.least_chunks >= Unit::kChunks) {
#pragma unroll
    for (int c = 0; c < Unit::kChunks; ++c) unit.load(c, 0, Unit::kChunks);
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < 32 + columns; i += kThreads) {
    copy4(spans_at + i * 4, table + 128 + i * 4);
  }
  if (p.overlap) cuda::await_previous();
  fetch_slab(0);
  if constexpr (kTokens > kSlabTokens) fetch_slab(kSlabTokens);
  cuda::launch_next();

  // The warp's chunks are [begin, begin + count) of the block's.
  const unsigned total = __shfl_sync(~0u, first_chunk, 31);
  const unsigned begin = warp * total / kWarps;
  const int count = static_cast<int>((warp + 1) * total / kWarps - begin);
  if (p.least_chunks < Unit::kChunks) {
#pragma unroll
    for (int c = 0; c < Unit::kChunks; ++c) unit.load(c, 0, count);
  }
  int group = __popc(__ballot_sync(~0u, first_chunk <= begin)) - 1;
  // End of the current group among the warp's chunks.
  auto group_end = [&] {
    return min(static_cast<int>(__shfl_sync(~0u, first_chunk, group + 1) - begin), count);
  };
  int end = count > 0 ? group_end() : 0;
  unsigned at = x_at + start * kBytes - kBefore;
  auto next_start = [&]() -> unsigned {
    if (p.rows_log2 == 5) return 0;
    return reinterpret_cast<const unsigned short*>(
        p.packed + p.group_starts)[(blockIdx.x * p.groups_per_block + group + 1) * 32 + lane];
  };
  if (end < count) start = next_start();
  asm volatile("cp.async.wait_all;" ::: "memory");
  __syncthreads();

  float sum[sum_count(kTokens)] = {};
  auto store_sums = [&] {
    float* to = sums + (warp + group) * (32 * kTokens) + lane;
    if constexpr (kTokens == 1) {
      to[0] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    } else if constexpr (kTokens == 2) {
      to[0] = sum[0] + sum[2];
      to[32] = sum[1] + sum[3];
    } else {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) to[32 * t] = sum[t];
    }
  };
  auto next_group = [&](int chunk) {
    store_sums();
#pragma unroll
    for (float& s : sum) s = 0.f;
    at = x_at + start * kBytes - kBefore;
    do {
      ++group;
      end = group_end();
    } while (end == chunk);
    if (end < count) start = next_start();
  };
  if (count > 0) {
    for (int chunk = 0;; chunk += Unit::kChunks) {
      unit.begin();
#pragma unroll
      for (int c = 0; c < Unit::kChunks; ++c) {
        multiply_chunk<kBits, kTokens>(sum, at, unit, c, slab);
        unit.load(c, 1, count - chunk - Unit::kChunks);
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
      float stray_sum[sum_count(kTokens)] = {};
#pragma unroll 1
      for (unsigned i = begin[slot] + part; i < begin[slot + 1]; i += 4) {
        const unsigned stray = p.strays[i];
        multiply<kTokens>(stray_sum, x_at + (stray & 0xffff) * kBytes,
                          __uint_as_float(stray & 0xffff0000u), 0, slab);
      }
#pragma unroll
      for (int t = 0; t < kTokens; ++t) total_sum[t] += stray_sum[t];
    }
#pragma unroll
    for (int t = 0; t < kTokens; ++t) {
      total_sum[t] += __shfl_xor_sync(~0u, total_sum[t], 1);
      total_sum[t] += __shfl_xor_sync(~0u, total_sum[t], 2);
    }
    if (slot < block_rows && row >= 0) {
#pragma unroll
      for (int t = 0; t < kTokens; ++t) {
        if (t % 4 == part && t < p.t) {
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
  void* dense;      // of As::Element
  float factor;     // 2^(top - 30), 1 for codes
  bool vectors;     // rows begin where a vector of 8 may, and its number takes 32 bits
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

// What the dense matrix is written in: bf16, or the codes that the bf16 numbers are.
struct AsBf16 {
  using Element = unsigned short;
  static __device__ __forceinline__ Element element(unsigned short v) { return v; }
  static __device__ __forceinline__ void store8(Element* dense, unsigned at, const uint4& v) {
    reinterpret_cast<uint4*>(dense)[at] = v;
  }
};

template <class Code>
struct AsCodes {
  using Element = unsigned char;
  static __device__ __forceinline__ Element element(unsigned short v) {
    return static_cast<Element>(Code::encode(v));
  }
  static __device__ __forceinline__ void store8(Element* dense, unsigned at, const uint4& v) {
    reinterpret_cast<uint2*>(dense)[at] = {four(v.x, v.y), four(v.z, v.w)};
  }

 private:
  static __device__ __forceinline__ unsigned four(unsigned first, unsigned second) {
    const float numbers[] = {__uint_as_float(first << 16), __uint_as_float(first & 0xffff0000),
                             __uint_as_float(second << 16), __uint_as_float(second & 0xffff0000)};
    return Code::four_codes(numbers);
  }
};

// Writes `first` .. `end` - 1 of the 8 columns at `base`, one a lane.
template <class As>
__device__ __forceinline__ void write_some(const UnpackRows& rows, int first, int end,
                                           typename As::Element* dense, int k) {
  const int lane = threadIdx.x & 31, e = lane & 7;
  const int packed = rows.base << 8 | first << 4 | max(min(end, k - rows.base), 0);
#pragma unroll 2
  for (int q = 0; q < 8; ++q) {
    const int r = q * 4 + lane / 8;
    const int row = __shfl_sync(~0u, rows.row, r), own = __shfl_sync(~0u, packed, r);
    if (e < (own >> 4 & 15) || e >= (own & 15)) continue;
    const int column = (own >> 8) + e;
    const unsigned short value = take_shared_half(held_at(rows.ring, r, column));
    if (row >= 0) dense[static_cast<std::size_t>(row) * k + column] = As::element(value);
  }
  __syncwarp();
}

// Writes up to 128 columns of each row, those up to a multiple of 128 or none, with `rest` whatever
// vectors there are. Returns the new base.
template <class As>
__device__ __noinline__ int write_vectors(UnpackRows rows, typename As::Element* dense, int k,
                                          bool rest) {
  constexpr int kParts = kWriteColumns / 8, kAtOnce = 32 / kParts;  // rows
  const int lane = threadIdx.x & 31, part = lane % kParts;
  __syncwarp();
  const int before = rows.start - rows.base;  // these 8 are only in part of this stream
  if (__any_sync(~0u, before > 0)) {
    write_some<As>(rows, before > 0 ? before : 8, 8, dense, k);
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
      if (some[q]) As::store8(dense, at[q], v[q]);
    }
  }
  __syncwarp();
  return rows.base + 8 * count;
}

// Writes all that is left, where rows begin at any address. Returns the new base, any column.
template <class As>
__device__ __noinline__ int write_elements(UnpackRows rows, typename As::Element* dense, int k) {
  const int from = max(rows.base, rows.start);
  __syncwarp();
#pragma unroll 1
  for (int r = 0; r < 32; ++r) {
    const int row = __shfl_sync(~0u, rows.row, r);
    const int end = min(__shfl_sync(~0u, rows.column, r), k);
    for (int c = __shfl_sync(~0u, from, r) + static_cast<int>(threadIdx.x & 31); c < end; c += 32) {
      const unsigned short value = take_shared_half(held_at(rows.ring, r, c));
      if (row >= 0) dense[static_cast<std::size_t>(row) * k + c] = As::element(value);
    }
  }
  __syncwarp();
  return rows.column;
}

// Writes all that is left of vectors, and of elements.
template <class As>
__device__ __noinline__ void write_rest(UnpackRows rows, typename As::Element* dense, int k) {
  do {
    rows.base = write_vectors<As>(rows, dense, k, true);
  } while (__any_sync(~0u, min(rows.column, k) - rows.base >= 8));
  write_some<As>(rows, 0, min(rows.column - rows.base, 8), dense, k);
}

// Leaves room for so many columns more of each row.
template <class As>
__device__ __forceinline__ void make_room(UnpackRows& rows, const UnpackParams& u, int columns) {
  auto* const dense = static_cast<typename As::Element*>(u.dense);
  while (__any_sync(~0u, rows.column + columns - rows.base > kRingColumns)) {
    rows.base = u.vectors ? write_vectors<As>(rows, dense, u.packed.k, false)
                          : write_elements<As>(rows, dense, u.packed.k);
  }
}

// Puts a chunk of each row.
template <class As, int kBits, class Unit>
__device__ __forceinline__ void put_chunk(UnpackRows& rows, const UnpackParams& u, const Unit& unit,
                                          int c) {
  const int lane = threadIdx.x & 31;
  const unsigned own = rows.ring + lane * kRingBytes;
  const auto put = [&](unsigned at, unsigned v) {
    store_shared_half((at & (kRingBytes - 1)) | own, v);
  };
  if constexpr (kBits == kWindowBits) {
    make_room<As>(rows, u, 1 << kBits);
    const unsigned at = 2 * rows.column + 16 * lane - 2;  // of the last place
    unsigned most = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
      const unsigned offsets = unit.offsets(c, q);
      const unsigned v0 = unit.bf16_pair(c, 2 * q, rows.factor);
      const unsigned v1 = unit.bf16_pair(c, 2 * q + 1, rows.factor);
      const unsigned values[4] = {v0 & 0xffff, v1 & 0xffff, v0 >> 16, v1 >> 16};
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const unsigned offset = offsets >> (8 * j) & 0x7f;
        most = max(most, offset);
        if ((values[j] & 0x7fff) != 0) put(at + 2 * offset, values[j]);
      }
    }
    rows.column += static_cast<int>(most);
  } else {
    // Columns that places take, gaps included.
    Gaps gaps = unit.gaps(c);
    gaps.even += 0x01010101u;
    gaps.odd += 0x01010101u;
    const unsigned odd_sums = (gaps.even + gaps.odd) * 0x01010101u;  // byte j: places 0 .. 2j + 1
    const unsigned even_sums = odd_sums - gaps.odd;
    const int columns = static_cast<int>(odd_sums >> 24);
    make_room<As>(rows, u, columns);
    const unsigned at = 2 * rows.column + 16 * lane - 2;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const unsigned v = unit.bf16_pair(c, j, rows.factor);
      put(__dp4a(even_sums, 2u << (8 * j), at), v);
      put(__dp4a(odd_sums, 2u << (8 * j), at), v >> 16);
    }
    rows.column += columns;
  }
}

// One warp unpacks one stream after the other, without a word to the others: 12 of them leave each
// other room for their rings. All lanes take the same chunk at once, so that loads lie side by side
// as they do for products.
template <class As, GapValues kValues, int kBits>
__global__ void __launch_bounds__(kUnpackWarps * 32, 1) gap_unpack_kernel(const UnpackParams u) {
  constexpr bool kScales = kValues != GapValues::kBf16 && std::is_same_v<As, AsBf16>;
  extern __shared__ __align__(1024) unsigned char rings[];
  using Unit = GapUnit<kValues, kBits>;
  constexpr int kChunks = Unit::kChunks;
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
    static_assert(kUnpackUnits == 2);
    Unit units[] = {{weights, lane}, {weights + unit_bytes(kValues, kBits), lane}};
#pragma unroll
    for (int q = 0; q < kUnpackUnits; ++q) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        units[q].load(c, 0, u.most_chunks - q * kChunks);
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
      if (kScales) to.factor = __uint_as_float(table[slot + block_rows]);
      to.start = to.column = start;
      to.base = start & ~7;
    };
    if (count > 0) enter();
    for (int chunk = 0; chunk < count; chunk += kUnpackUnits * kChunks) {
      // Long reads next to each other: of the next units, from memory into L2.
      const int next = chunk / kChunks + kUnpackUnits;
      const int ahead = u.most_chunks / kChunks - next;
      if (lane == 0 && ahead > 0) {
        cuda::prefetch(weights + static_cast<std::size_t>(next) * unit_bytes(kValues, kBits),
                       min(ahead, kUnpackUnits) * unit_bytes(kValues, kBits));
      }
#pragma unroll
      for (int q = 0; q < kUnpackUnits; ++q) {
        units[q].begin();
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          const int at = chunk + q * kChunks + c;
          if (at >= count) continue;
          put_chunk<As, kBits>(to, u, units[q], c);
          if (at + 1 != end) continue;
          // The last lane of a row writes up to its end, the others up to their last place.
          if (end == group_end && lane >= 32 - rows && to.row >= 0) {
            to.column = max(to.column, p.k);
          }
          auto* const dense = static_cast<typename As::Element*>(u.dense);
          if (u.vectors) {
            write_rest<As>(to, dense, p.k);
          } else {
            write_elements<As>(to, dense, p.k);
          }
          if (end < count) enter();
        }
      }
      // All at once: asked for chunk by chunk, as products do, they took a fifth longer.
#pragma unroll
      for (int q = 0; q < kUnpackUnits; ++q) {
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          units[q].load(c, kUnpackUnits, u.most_chunks - chunk - (kUnpackUnits + q) * kChunks);
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
  if constexpr (kBits == kWindowBits) {
    if (plan.tokens == 8) return find_warps<kValues, kBits, 8>(warps);
  } else {
    if (plan.tokens == 1) return find_warps<kValues, kBits, 1>(warps);
    if (plan.tokens == 2) return find_warps<kValues, kBits, 2>(warps);
  }
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
  if (l.bits == kWindowBits) return f.template operator()<GapValues::kBf16, kWindowBits>();
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
  return static_cast<std::size_t>(slab_bytes(l.bits, plan.tokens, padded(l.k))) *
             (plan.tokens / slab_tokens(plan.tokens)) +
         4 * 32 +
         4 * static_cast<std::size_t>(l.values == GapValues::kBf16 ? block_rows : 2 * block_rows) +
         static_cast<std::size_t>(l.warps + l.groups_per_block) * 128 * plan.tokens;
}

bool layout_ok(const GapLayout& l) {
  return gap_shape_refusal(l.n, l.k, 1) == nullptr &&
         (l.bits == 3 || l.bits == 4 || (l.bits == kWindowBits && l.values == GapValues::kBf16)) &&
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

int most_tokens(int bits) {
  return static_cast<int>(bits == kWindowBits ? kWindowMaxTokens : kGapMaxTokens);
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

namespace {

// Groups of rows, dealt to blocks.
struct Deal {
  int lanes;  // of a row
  int blocks;
  std::vector<int> group_chunks;          // of each group, the longest first
  std::vector<std::vector<int>> members;  // groups of each block
  std::vector<unsigned> totals;           // chunks of each block
  std::int64_t longest;                   // chunks of the multiprocessor that has most
};

// Rows of like length share a group; the longest groups go first, each to the block with the fewest
// chunks so far. @param chunks  of the row at an index, the longest row first
template <class Chunks>
Deal dealt(std::int64_t n, int sms, int lanes, const Chunks& chunks) {
  Deal d;
  const int rows = 32 / lanes, groups = ceil_div(n, rows);
  const int waves = ceil_div(groups, static_cast<std::int64_t>(sms) * kMaxGroups);
  d.lanes = lanes;
  d.blocks = std::min(groups, sms * waves);
  d.group_chunks.resize(groups);
  for (int g = 0; g < groups; ++g) d.group_chunks[g] = chunks(static_cast<std::int64_t>(g) * rows);
  d.members = deal(groups, d.blocks, kMaxGroups, [&](int g) { return d.group_chunks[g]; });
  d.totals.assign(d.blocks, 0);
  for (int i = 0; i < d.blocks; ++i)
    for (const int g : d.members[i]) d.totals[i] += d.group_chunks[g];
  d.longest = static_cast<std::int64_t>(*std::max_element(d.totals.begin(), d.totals.end())) *
              ceil_div(d.blocks, sms);
  return d;
}

}  // namespace

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
  const auto count = layout->bits == kWindowBits ? window_count_kernel : gap_count_kernel;
  count<<<ceil_div(n, 8), 256, 0, stream>>>(weights, static_cast<int>(n), static_cast<int>(k),
                                            padded(k), top_of_all,
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
  int b = 0;  // which places count: of windows both are the same
  if (l.bits == 0) {
    const int bits = l.values == GapValues::kBf16 ? 16 : 11;  // a place with a gap of 3
    l.bits = places[0] * bits <= places[1] * (bits + 1) ? 3 : 4;
  }

  if (l.bits == 4) b = 1;
  const int per_chunk = chunk_values(l.bits);

  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int a, int c) { return counts[a].places[b] > counts[c].places[b]; });
  const auto deal = [&](int lanes) {
    return dealt(n, sms, lanes, [&](std::int64_t index) {
      return ceil_div(counts[order[index]].places[b], per_chunk * lanes);
    });
  };
  // Fewest lanes a row that leave the multiprocessors evenly busy.
  Deal best = deal(l.lanes_per_row > 0 ? l.lanes_per_row : 1);
  if (l.lanes_per_row == 0) {
    std::vector<Deal> all = {std::move(best)};
    for (int lanes = 2; lanes <= 8; lanes *= 2) all.push_back(deal(lanes));
    std::int64_t least = all.front().longest;
    for (const Deal& d : all) least = std::min(least, d.longest);
    const auto even = std::find_if(all.begin(), all.end(), [&](const Deal& d) {
      return 0.93 * static_cast<double>(d.longest) <= static_cast<double>(least);
    });
    best = std::move(*even);
  }
  l.lanes_per_row = best.lanes;
  l.blocks = best.blocks;
  const std::vector<int>& group_chunks = best.group_chunks;
  const std::vector<std::vector<int>>& members = best.members;
  const std::vector<unsigned>& totals = best.totals;
  const int rows = 32 / l.lanes_per_row;
  if (l.warps == 0) {  // few warps start sooner, more of them have more weights in flight
    const std::int64_t lane_places = places[b] / (32 * l.blocks);
    l.warps = lane_places < (l.bits == kWindowBits ? 12000 : 140 * 8) ? 16 : 24;
  }
  l.least_chunks = 1 << 30;
  for (int i = 0; i < l.blocks; ++i) {
    l.groups_per_block = std::max(l.groups_per_block, static_cast<int>(members[i].size()));
    l.least_chunks = std::min(l.least_chunks, static_cast<int>(totals[i] / l.warps));
    l.most_chunks = std::max(l.most_chunks, ceil_div(totals[i], l.warps));
    l.places += static_cast<std::int64_t>(totals[i]) * 32 * per_chunk;
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
  p.table_stride = parts.table_stride;
  const auto kernel = with_format(layout, [&]<GapValues kValues, int kBits>() {
    if constexpr (kBits == kWindowBits) {
      return window_pack_kernel;
    } else {
      return gap_pack_kernel<kValues, kBits>;
    }
  });
  kernel<<<ceil_div(layout.n, 8), 256, 0, stream>>>(p);
  if (layout.bits == kWindowBits) {
    window_order_kernel<<<ceil_div(static_cast<std::int64_t>(layout.blocks) * layout.warps,
                                   kOrderWarps),
                          kOrderWarps * 32, 0, stream>>>(p, layout.blocks * layout.warps);
  }
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

namespace {

// @param kernel  gap_unpack_kernel @param factor  of all values that have no scale
cudaError_t run_unpack(void (*kernel)(const UnpackParams), const void* packed,
                       const GapLayout& layout, float factor, int element_bytes, void* dense,
                       cudaStream_t stream) {
  if (!layout_ok(layout) || kernel == nullptr || dense == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  const bool vectors = layout.k % 8 == 0 &&
                       reinterpret_cast<std::uintptr_t>(dense) % (8 * element_bytes) == 0 &&
                       layout.n * layout.k / 8 <= UINT32_MAX;
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kUnpackSharedBytes);
  int sms = 0;
  if (error == cudaSuccess) error = usable_multiprocessors(&sms);
  if (error != cudaSuccess) return error;
  const int blocks = std::min(sms, layout.blocks * layout.warps);
  kernel<<<blocks, kUnpackWarps * 32, kUnpackSharedBytes, stream>>>(
      {params_of(packed, layout), layout.warps, layout.most_chunks, dense, factor, vectors});
  return cudaGetLastError();
}

}  // namespace

cudaError_t gap_unpack(const void* packed, const GapLayout& layout, void* dense,
                       cudaStream_t stream) {
  const auto kernel = with_format(layout, [&]<GapValues kValues, int kBits>() {
    return gap_unpack_kernel<AsBf16, kValues, kBits>;
  });
  const cudaError_t error = run_unpack(kernel, packed, layout,
                                       std::ldexp(1.0f, layout.top - kExponents), 2, dense, stream);
  if (error != cudaSuccess || layout.strays == 0) return error;
  gap_unpack_strays_kernel<<<layout.blocks, 128, 0, stream>>>(params_of(packed, layout),
                                                              static_cast<unsigned short*>(dense));
  return cudaGetLastError();
}

cudaError_t gap_unpack_codes(const void* packed, const GapLayout& layout, void* codes,
                             cudaStream_t stream) {
  using Kernel = void (*)(const UnpackParams);
  const auto kernel = with_format(layout, [&]<GapValues kValues, int kBits>() -> Kernel {
    if constexpr (kValues == GapValues::kFp8)
      return gap_unpack_kernel<AsCodes<cuda::Fp8>, kValues, kBits>;
    if constexpr (kValues == GapValues::kInt8)
      return gap_unpack_kernel<AsCodes<cuda::Int8>, kValues, kBits>;
    return nullptr;
  });
  return run_unpack(kernel, packed, layout, 1.0f, 1, codes, stream);
}

std::size_t gap_shared_bytes(const GapLayout& layout, const GapPlan& plan) {
  return find_kernel(layout, plan) != nullptr ? shared_bytes(layout, plan) : 0;
}

cudaError_t gap_plan(const GapLayout& layout, int t, GapPlan* plan) {
  if (!layout_ok(layout) || t < 1 || t > most_tokens(layout.bits) || plan == nullptr) {
    return cudaErrorInvalidValue;
  }
  GapPlan p;
  const bool windows = layout.bits == kWindowBits;
  p.tokens = windows ? (t <= 4 ? 4 : 8) : t <= 2 ? t : layout.values == GapValues::kBf16 ? 4 : 2;
  while (p.tokens > (windows ? 4 : 1) && shared_bytes(layout, p) > kMaxSharedBytes) p.tokens /= 2;
  if (gap_shared_bytes(layout, p) == 0 || shared_bytes(layout, p) > kMaxSharedBytes) {
    return cudaErrorNotSupported;
  }
  *plan = p;
  return cudaSuccess;
}

cudaError_t gap_run(const void* packed, const GapLayout& layout, const void* x, void* y, int t,
                    const GapPlan& plan, bool overlap_previous, cudaStream_t stream) {
  const Kernel kernel = find_kernel(layout, plan);
  if (!layout_ok(layout) || kernel == nullptr || t < 1 || t > most_tokens(layout.bits) ||
      packed == nullptr || x == nullptr || y == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0 ||
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

int unpack_codes(const GpuLayout* layout, const void* packed, void* codes, GpuStream stream) {
  return gap_unpack_codes(packed, held<GapLayout>(layout), codes,
                          static_cast<cudaStream_t>(stream));
}

// `kBits`: 0 if the weight decides.
template <GapValues kValues, int kBits>
cudaError_t measure_as(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                       GapLayout* layout, cudaStream_t stream) {
  layout->values = kValues;
  layout->bits = kBits;
  return gap_measure(dense, n, k, scratch, layout, stream);
}

template <GapValues kValues, int kBits>
constexpr GpuLinearKernel shown_as(const char* name) {
  constexpr int64_t kMost = kBits == kWindowBits          ? kWindowMaxTokens
                            : kValues == GapValues::kBf16 ? kGapMaxTokens
                                                          : kGapCodesMaxTokens;
  return {
      .operation = "linear_bitmap",
      .name = name,
      .scratch_bytes = [](int64_t n, int64_t) -> size_t { return gap_scratch_bytes(n); },
      .measure = cuda::OwnLayout<GapLayout>::measure<measure_as<kValues, kBits>>,
      .pack = cuda::OwnLayout<GapLayout>::pack<gap_pack>,
      .unpack = cuda::OwnLayout<GapLayout>::unpack<gap_unpack>,
      .max_tokens = [](const GpuLayout* layout) -> int64_t {
        return kBits == 0 && held<GapLayout>(layout).k > kGapMaxInputsOfTokens ? 1 : kMost;
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
      .unpack_codes = kValues == GapValues::kBf16 ? nullptr : &unpack_codes,
  };
}

}  // namespace

const GpuLinearKernel kGap = shown_as<GapValues::kBf16, 0>("cuda_sm90_gap");
const GpuLinearKernel kWindow = shown_as<GapValues::kBf16, kWindowBits>("cuda_sm90_window");
const GpuLinearKernel kGapInt8 = shown_as<GapValues::kInt8, 0>("cuda_sm90_gap_int8");
const GpuLinearKernel kGapFp8 = shown_as<GapValues::kFp8, 0>("cuda_sm90_gap_fp8");

}  // namespace lacuna::kernels::linear_bitmap
