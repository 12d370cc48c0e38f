// The idea: codes of 8 bits with a bitmap are 5 bits a weight where half are kept, of 8, and what
// decides is how few instructions and turns of shared memory make fragments of them. A lane owns
// what it needs: its columns of its two rows, as one string of bytes, which it reads at its own
// pace. Strings lie side by side, word by word, so that 32 lanes never meet in a bank however far
// apart they are.
//
//   step: 4 columns of row g and the same of row g + 8, of lane 4g + t; 8 bits of the mask
//
//                  o: bytes before this step         o': before the next
//   string   ... | | | |a|b|c|d|e|f| | | ...         row g kept a b c, row g + 8 d e f
//                      '-------'                     four bytes from o on: front, for row g
//                          '-------'                 four bytes before o': back, for row g + 8
//
//   Both windows of a place o, the back of one step and the front of the next, come from the same
//   three words: three loads, two funnel shifts. A PRMT puts the kept bytes of a window into their
//   places and zeros between them, and its selector is a product. With the mask's bits b_i of four
//   columns in four nibbles, place j wants byte b_0 + .. + b_(j-1), or one of the zeros 4 .. 7:
//   0x110c b + 0x4444. The bytes for row g + 8 stand the other way round, from the window's end on:
//   0x7777 - 0x1114 b. A step is 21 instructions, 4 of them conversions; no branch, no table.
//
// x becomes fp16 in shared memory, each 256 columns of a token times a power of two: then a pair of
// e4m3 is one conversion (int8: a PRMT and a difference), where bf16 takes three and a half
// instructions. The power is undone at the end of the stage.
//
//   stage: 16 rows x 256 columns; all of one size, [row tile][stage]
//   |pool: tails of strings|header: 2 bytes a lane|mask: 16 bytes a lane|C rows of 32 words|
//     C, the same for the whole matrix, is a little more than the mean; the words of a string past
//     C wait in the pool (header: where, and how many), and their lane moves them behind the rows.
//   mask: a word of four steps i: bit 4 j + i is column j of row g, bit 16 + 4 j + i of row g + 8
//   Packed weights: |scales: float32, rows padded to 16| to a multiple of 128 |stages|
//
// Columns are dealt so that a lane's x is 16 bytes in a row: of each 32, lane t has 8 t .. 8 t + 7.
// A block is row_warps x k_warps warps, each with a ring of its own, filled by bulk copies; x of
// the block's part of K is in shared memory as a whole. Sums go as in cuda/sm90_stream.cuh.
//
// Bytes: N K / 8 for the mask, C and the pool 0.59 to 0.62 N K at half kept, once (evict first); 2
// T K / cluster of x for every block, from L2.
//
// What counts here, measured (bench/lab/cuda_linear_coded has the tables):
// - Instructions: 72 % of what can be issued is, with 28 warps; at 80 % zeros nearly the same time.
// - x before the weights: it waited for all of them in flight, 1.4 us a kernel.
// Lost: a table of selectors in shared memory (two loads a step: 2 us of 28), decoding e4m3 by
// shifts and masks (10 us), half of it so (5 us), two chains of sums, stages of 512 columns (x and
// rings then leave room for fewer stages), two row tiles a warp.
#include "lacuna/kernels/linear_bitmap/cuda_sm90_coded.h"

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "lacuna/kernels/cuda/sm90_codes.cuh"
#include "lacuna/kernels/cuda/sm90_stream.cuh"

namespace lacuna::kernels::linear_bitmap {
namespace {

using cuda::ceil_div;
using cuda::kFragmentFloats;
using cuda::kMaxCluster;
using cuda::kMaxSharedBytes;
using cuda::kTileRows;

constexpr int kStageColumns = 256;
constexpr int kGroups = kStageColumns / 32;    // of 32 columns: two steps a lane
constexpr int kMostWords = kStageColumns / 8;  // of a lane's string
constexpr int kRowBytes = 128;                 // a word of each lane
constexpr int kHeaderBytes = 64, kMaskBytes = 16 * 32;
constexpr int kXPad = 64;       // of a token's x in shared memory: two rows of it meet no bank
constexpr int kMoveBytes = 96;  // what moving a row of words may cost instead
constexpr int kMostAhead = 96 * 1024;    // bytes of weights to ask for before x is there
constexpr int kAloneBytes = 116 * 1024;  // more than half of it: one block a multiprocessor

// How W is packed.
struct Layout {
  std::int64_t n, k;
  int words;       // C
  int most_words;  // of the longest string
  int pool_bytes;  // a multiple of 16

  __host__ __device__ int row_tiles() const {
    return static_cast<int>((n + kTileRows - 1) / kTileRows);
  }
  __host__ __device__ int stages() const {
    return static_cast<int>((k + kStageColumns - 1) / kStageColumns);
  }
  __host__ __device__ int stage_bytes() const {
    return pool_bytes + kHeaderBytes + kMaskBytes + words * kRowBytes;
  }
  // In shared memory, with room for the tails.
  __host__ __device__ int slot_bytes() const {
    return pool_bytes + kHeaderBytes + kMaskBytes + most_words * kRowBytes;
  }
  __host__ __device__ std::size_t scale_bytes() const {
    return (static_cast<std::size_t>(row_tiles()) * kTileRows * sizeof(float) + 127) / 128 * 128;
  }
  std::size_t packed_bytes() const {
    return scale_bytes() + static_cast<std::size_t>(row_tiles()) * stages() * stage_bytes();
  }
};

// ---------- codes ----------

// Bytes of a string, and the fp16 numbers that four of them are.
struct Fp8 {
  static constexpr unsigned kZero = 0;  // four bytes of a dropped weight
  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return cuda::Fp8::encode(bf16);
  }
  static __device__ __forceinline__ void decode(unsigned bytes, unsigned* low, unsigned* high) {
    asm("{\n .reg .b16 l, h;\n mov.b32 {l, h}, %2;\n cvt.rn.f16x2.e4m3x2 %0, l;\n"
        " cvt.rn.f16x2.e4m3x2 %1, h;\n}"
        : "=r"(*low), "=r"(*high)
        : "r"(bytes));
  }
};

// 128 more than the code: as the fraction of an fp16 number it is 1024 + 128 too large.
struct Int8 {
  static constexpr unsigned kZero = 0x80808080;
  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return cuda::Int8::encode(bf16) ^ 0x80;
  }
  static __device__ __forceinline__ void decode(unsigned bytes, unsigned* low, unsigned* high) {
    *low = less_1152(__byte_perm(bytes, 0x64646464, 0x4140));
    *high = less_1152(__byte_perm(bytes, 0x64646464, 0x4342));
  }

 private:
  static __device__ __forceinline__ unsigned less_1152(unsigned pair) {
    unsigned v;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(v) : "r"(pair), "r"(0xe480e480));
    return v;
  }
};

// ---------- a lane's string ----------

// Four bytes of two words, or of a window and `zero`.
__device__ __forceinline__ unsigned pick(unsigned low, unsigned high, unsigned selector) {
  unsigned v;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(v) : "r"(low), "r"(high), "r"(selector));
  return v;
}

template <int kOffset>
__device__ __forceinline__ unsigned word_at(unsigned address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1 + %2];" : "=r"(v) : "r"(address), "n"(kOffset));
  return v;
}

struct String {
  unsigned words;  // address of the row before this lane's first word
  unsigned bits;   // 8 times the bytes read
  unsigned front;  // the next four bytes

  __device__ __forceinline__ void start(unsigned lane_words) {
    words = lane_words - kRowBytes;
    bits = 0;
    front = word_at<0>(lane_words);
  }

  // The four bytes of a row and of the row 8 below. @param mask  word of four steps
  template <class Code>
  __device__ __forceinline__ uint2 step(unsigned mask, int i) {
    const unsigned kept = mask >> i & 0x11111111;
    uint2 bytes;
    bytes.x = pick(front, Code::kZero, kept * 0x110c + 0x4444);
    bits += 8 * __popc(kept);
    unsigned at;  // one instruction, where the compiler takes two
    asm("mad.lo.u32 %0, %1, %2, %3;" : "=r"(at) : "r"(bits >> 5), "n"(kRowBytes), "r"(words));
    const unsigned before = word_at<0>(at), here = word_at<kRowBytes>(at);
    front = __funnelshift_r(here, word_at<2 * kRowBytes>(at), bits);
    const unsigned back = __funnelshift_r(before, here, bits);
    bytes.y = pick(back, Code::kZero, 0x7777 - (kept >> 16) * 0x1114);
    return bytes;
  }
};

// Moves this lane's words past C from the pool behind its others. @return the address of those
__device__ __forceinline__ unsigned complete(unsigned char* slot, const Layout& l, int lane) {
  unsigned char* const header = slot + l.pool_bytes;
  unsigned char* const words = header + kHeaderBytes + kMaskBytes + 4 * lane;
  const unsigned tail = *reinterpret_cast<const unsigned short*>(header + 2 * lane);
  const unsigned char* from = slot + (tail & 0x3ff) * 4;
  unsigned char* to = words + l.words * kRowBytes;
#pragma unroll 1
  for (int i = tail >> 10; i > 0; --i, from += 4, to += kRowBytes) {
    *reinterpret_cast<unsigned*>(to) = *reinterpret_cast<const unsigned*>(from);
  }
  return cuda::shared_address(words);
}

// ---------- packing ----------

// The steps of 32 columns of a lane: 8 columns from `column` on of rows g and g + 8.
struct Dense {
  const unsigned short* w;
  int n, k;

  // bf16 numbers; zero beyond the matrix, +0 for -0.
  __device__ __forceinline__ void read(int row, int column, unsigned short (&v)[8]) const {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      v[i] = 0;
      if (row < n && column + i < k) v[i] = w[static_cast<std::size_t>(row) * k + column + i];
      if ((v[i] & 0x7fff) == 0) v[i] = 0;
    }
  }
};

constexpr int kPackWarps = 4;

// Words of a lane's string.
__device__ __forceinline__ int count_words(const Dense& dense, int row, int column, int lane) {
  int bytes = 0;
#pragma unroll 1
  for (int group = 0; group < kGroups; ++group) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      unsigned short v[8];
      dense.read(row + (lane >> 2) + 8 * half, column + 32 * group + 8 * (lane & 3), v);
#pragma unroll
      for (int i = 0; i < 8; ++i) bytes += v[i] != 0;
    }
  }
  return (bytes + 3) / 4;
}

// What decides the layout, over all stages.
struct Found {
  int pool[kMostWords + 1];  // most words in a pool if C were the index
  int most_words;
};

__global__ void __launch_bounds__(kPackWarps * 32)
    coded_count_kernel(const Dense dense, int stages, std::int64_t all, Found* found) {
  const int lane = threadIdx.x & 31;
  const std::int64_t i = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + (threadIdx.x >> 5);
  if (i >= all) return;
  const int words = count_words(dense, static_cast<int>(i / stages) * kTileRows,
                                static_cast<int>(i % stages) * kStageColumns, lane);
  for (int c = 0; c <= kMostWords; ++c) {
    const int pool = __reduce_add_sync(~0u, max(words - c, 0));
    if (lane == 0 && pool > found->pool[c]) atomicMax(&found->pool[c], pool);
  }
  const int most = __reduce_max_sync(~0u, words);
  if (lane == 0 && most > found->most_words) atomicMax(&found->most_words, most);
}

template <class Code>
__global__ void __launch_bounds__(kPackWarps * 32)
    coded_pack_kernel(const Dense dense, const Layout l, unsigned char* packed) {
  const int lane = threadIdx.x & 31, stages = l.stages();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + (threadIdx.x >> 5);
  if (at >= static_cast<std::int64_t>(l.row_tiles()) * stages) return;
  const int row = static_cast<int>(at / stages) * kTileRows;
  const int column = static_cast<int>(at % stages) * kStageColumns;
  unsigned char* const pool = packed + l.scale_bytes() + at * l.stage_bytes();
  unsigned char* const header = pool + l.pool_bytes;
  unsigned char* const mask = header + kHeaderBytes;

  const int words = count_words(dense, row, column, lane), tail = max(words - l.words, 0);
  int start = tail;  // the tails of the lanes before
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, start, d);
    if (lane >= d) start += other;
  }
  start -= tail;
  *reinterpret_cast<unsigned short*>(header + 2 * lane) =
      static_cast<unsigned short>(tail > 0 ? start | tail << 10 : 0);

  unsigned word = 0;  // being filled
  int count = 0;      // bytes so far
  const auto store = [&](int i) {
    unsigned char* to = i < l.words ? mask + kMaskBytes + i * kRowBytes + 4 * lane
                                    : pool + (start + i - l.words) * 4;
    *reinterpret_cast<unsigned*>(to) = word;
    word = 0;
  };
  unsigned masks[kGroups / 2] = {};
#pragma unroll
  for (int group = 0; group < kGroups; ++group) {
    unsigned short v[2][8];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      dense.read(row + (lane >> 2) + 8 * half, column + 32 * group + 8 * (lane & 3), v[half]);
    }
#pragma unroll
    for (int step = 0; step < 2; ++step)
#pragma unroll
      for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int place = half ? 3 - i : i;
          const unsigned short value = v[half][4 * step + place];
          if (value == 0) continue;
          masks[group / 2] |= 1u << (16 * half + 4 * place + 2 * (group % 2) + step);
          word |= Code::encode(value) << (8 * (count & 3));
          if ((++count & 3) == 0) store(count / 4 - 1);
        }
  }
  if (count & 3) store(count / 4);
  *reinterpret_cast<uint4*>(mask + 16 * lane) = make_uint4(masks[0], masks[1], masks[2], masks[3]);
}

__global__ void coded_scales_kernel(const __nv_bfloat16* scales, int n, int padded, float* packed) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row < padded) packed[row] = row < n ? __bfloat162float(scales[row]) : 0.f;
}

// The dense matrix in bf16, codes times their scales; 8 columns of a row at a time.
template <class Code>
struct AsBf16 {
  using Element = unsigned short;
  using Eight = uint4;
  static __device__ __forceinline__ Eight eight(unsigned low, unsigned high, float scale) {
    unsigned v[4];
    Code::decode(low, &v[0], &v[1]);
    Code::decode(high, &v[2], &v[3]);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 f = __half22float2(*reinterpret_cast<const __half2*>(&v[i]));
      const __nv_bfloat162 b = __floats2bfloat162_rn(f.x * scale, f.y * scale);
      v[i] = *reinterpret_cast<const unsigned*>(&b);
    }
    return {v[0], v[1], v[2], v[3]};
  }
};

// The codes themselves: bytes differ from them as that of a dropped weight does from 0.
template <class Code>
struct AsCodes {
  using Element = unsigned char;
  using Eight = uint2;
  static __device__ __forceinline__ Eight eight(unsigned low, unsigned high, float) {
    return {low ^ Code::kZero, high ^ Code::kZero};
  }
};

// One warp a stage. @param vectors  eight at a time: k % 8 == 0 and dense aligned to them
template <class Code, class As>
__global__ void __launch_bounds__(kPackWarps * 32)
    coded_unpack_kernel(const unsigned char* packed, const Layout l, typename As::Element* dense,
                        bool vectors) {
  extern __shared__ __align__(128) unsigned char shared[];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, stages = l.stages();
  const std::int64_t at = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
  if (at >= static_cast<std::int64_t>(l.row_tiles()) * stages) return;
  unsigned char* const slot = shared + warp * l.slot_bytes();
  const unsigned char* const from = packed + l.scale_bytes() + at * l.stage_bytes();
  for (int i = 16 * lane; i < l.stage_bytes(); i += 512) {
    *reinterpret_cast<uint4*>(slot + i) = *reinterpret_cast<const uint4*>(from + i);
  }
  __syncwarp();
  const unsigned words = complete(slot, l, lane);
  __syncwarp();
  String string;
  string.start(words);
  const int g = lane >> 2, t = lane & 3;
  const int row = static_cast<int>(at / stages) * kTileRows + g;
  const int column = static_cast<int>(at % stages) * kStageColumns + 8 * t;
  const float* scales = reinterpret_cast<const float*>(packed) + row;
  const float scale[2] = {scales[0], scales[8]};
  const unsigned* const masks =
      reinterpret_cast<const unsigned*>(slot + l.pool_bytes + kHeaderBytes + 16 * lane);
#pragma unroll 1
  for (int pair = 0; pair < kGroups / 2; ++pair) {
#pragma unroll
    for (int group = 0; group < 2; ++group) {
      const uint2 low = string.step<Code>(masks[pair], 2 * group);
      const uint2 high = string.step<Code>(masks[pair], 2 * group + 1);
      const int first = column + 64 * pair + 32 * group;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row + 8 * half >= l.n) continue;
        const typename As::Eight v =
            half ? As::eight(low.y, high.y, scale[1]) : As::eight(low.x, high.x, scale[0]);
        typename As::Element* const to =
            dense + static_cast<std::size_t>(row + 8 * half) * l.k + first;
        if (vectors) {
          if (first < l.k) *reinterpret_cast<typename As::Eight*>(to) = v;
        } else {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            if (first + i < l.k) to[i] = reinterpret_cast<const typename As::Element*>(&v)[i];
          }
        }
      }
    }
  }
}

// ---------- the product ----------

struct Params {
  Layout l;
  const unsigned char* stages;
  const float* scales;
  const __nv_bfloat16* x;
  __nv_bfloat16* y;
  int t;
  int row_tiles, all_stages, stage_bytes, slot_bytes;
  int row_warps, k_warps, row_warps_inverse, ring, at_once, cluster_log2;
  int ring_offset, x_offset, powers_offset, sums_offset, x_stride;
  int most_part, most_part_inverse;  // stages of a block; 2^20 / that, rounded up
  bool sums_apart, x_vectors, overlap;
};

constexpr int max_warps(int token_tiles, int tiles_per_warp) {
  return tiles_per_warp > 1 ? (token_tiles > 1 ? 16 : 20) : 28;
}

__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0,
                                         unsigned b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 8 columns of x to where cuda::copy16 would bring them, where it can't.
__device__ __noinline__ void copy_x_slowly(unsigned char* to, const __nv_bfloat16* from, int left) {
  for (int i = 0; i < 8; ++i) {
    reinterpret_cast<__nv_bfloat16*>(to)[i] = i < left ? from[i] : __nv_bfloat16(0.f);
  }
}

// A pair of bf16 times a power of two, in fp16.
__device__ __forceinline__ unsigned half_pair(unsigned pair, float power) {
  const __half2 h = __floats2half2_rn(__uint_as_float(pair << 16) * power,
                                      __uint_as_float(pair & 0xffff0000u) * power);
  return *reinterpret_cast<const unsigned*>(&h);
}

// Turns a stage of a token's x into fp16, 8 columns a lane. @return what undoes its power
__device__ __forceinline__ float convert_x(unsigned char* at) {
  const uint4 v = *reinterpret_cast<const uint4*>(at);
  const unsigned pairs = __vmaxu2(__vmaxu2(v.x & 0x7fff7fff, v.y & 0x7fff7fff),
                                  __vmaxu2(v.z & 0x7fff7fff, v.w & 0x7fff7fff));
  const unsigned most = __reduce_max_sync(~0u, max(pairs & 0xffff, pairs >> 16));
  // The largest becomes 2^14 .. 2^15.
  const int field = min(268 - static_cast<int>(most >> 7), 253);
  const float power = __int_as_float(field << 23);
  *reinterpret_cast<uint4*>(at) = make_uint4(half_pair(v.x, power), half_pair(v.y, power),
                                             half_pair(v.z, power), half_pair(v.w, power));
  return __int_as_float((254 - field) << 23);
}

template <class Code, int NT, int MT>
__global__ void __launch_bounds__(max_warps(NT, MT) * 32, 1) coded_kernel(const Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned shared_base = cuda::shared_address(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int warps = p.row_warps * p.k_warps;
  const int cluster = 1 << p.cluster_log2;
  const int rank = static_cast<int>(blockIdx.x) & (cluster - 1);
  const int row_group = static_cast<int>(blockIdx.x) >> p.cluster_log2;
  const int first_stage = (rank * p.all_stages) >> p.cluster_log2;
  const int part = (((rank + 1) * p.all_stages) >> p.cluster_log2) - first_stage;
  const int block_fragments = p.row_warps * MT * NT;
  const int slots = (block_fragments + cluster - 1) >> p.cluster_log2;  // fragments summed here
  const int k_warp = (warp * p.row_warps_inverse) >> 16, row_warp = warp - k_warp * p.row_warps;
  const int first_tile = (row_group * p.row_warps + row_warp) * MT;
  const unsigned full = shared_base + 8 * warp * p.ring;
  const unsigned sums_full = shared_base + 8 * warps * p.ring;
  unsigned char* const ring = shared + p.ring_offset + warp * p.ring * MT * p.slot_bytes;

  // The next stage of this warp's tiles; a tile past the end repeats the last one: its sums are
  // never stored.
  const unsigned char* next[MT];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const std::size_t tile = min(first_tile + m, p.row_tiles - 1);
    next[m] = p.stages + (tile * p.all_stages + first_stage + k_warp) * p.stage_bytes;
  }
  const std::uint64_t policy = cuda::evict_first();
  const auto fill = [&](int slot) {
    cuda::barrier_expect(full + 8 * slot, MT * p.stage_bytes);
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      cuda::bulk_copy_once(cuda::shared_address(ring) + (slot * MT + m) * p.slot_bytes, next[m],
                           p.stage_bytes, full + 8 * slot, policy);
      next[m] += p.k_warps * p.stage_bytes;
    }
  };
  int filled = 0, to_fill = k_warp;
  const auto begin = [&] {
    if (lane == 0) {
#pragma unroll 1
      for (int i = 0; i < p.ring; ++i) cuda::barrier_init(full + 8 * i, 1);
      if (warp == 0) cuda::barrier_init(sums_full, 1);
      cuda::barrier_init_fence();
#pragma unroll 1
      for (; filled < p.at_once && to_fill < part; ++filled, to_fill += p.k_warps) {
        fill(filled);
      }
      if (warp == 0 && cluster > 1) {
        const int fragments = (block_fragments - rank + cluster - 1) >> p.cluster_log2;
        cuda::barrier_expect(sums_full,
                             (cluster - 1) * p.k_warps * fragments * (kFragmentFloats * 4));
      }
    }
    __syncwarp();
    if (cluster > 1) cuda::cluster_arrive_relaxed();  // Others may store into my memory.
    cuda::launch_next();
    cuda::await_previous();
  };
  // x of this block, a stage of a token at a time. It is asked for before the weights, unless the
  // kernel ahead may still write it: an x that comes late waits for every weight in flight.
  const int pieces = p.t * p.most_part;
  const auto place = [&](int piece, int* token, int* stage) {
    *token = (piece * p.most_part_inverse) >> 20;
    *stage = piece - *token * p.most_part;
    return shared + p.x_offset + *token * p.x_stride + *stage * (2 * kStageColumns) + 16 * lane;
  };
  // Each of both is there once: instructions are cold at every launch.
#pragma unroll 1
  for (int turn = 0; turn < 2; ++turn) {
    if ((turn == 0) == p.overlap) {
      begin();
      continue;
    }
#pragma unroll 1
    for (int piece = warp; piece < pieces; piece += warps) {
      int token, stage;
      unsigned char* const to = place(piece, &token, &stage);
      const int column = (first_stage + stage) * kStageColumns + 8 * lane;
      const __nv_bfloat16* const from = p.x + static_cast<std::size_t>(token) * p.l.k + column;
      const int left = static_cast<int>(p.l.k) - column;
      if (p.x_vectors && left > 0) {
        cuda::copy16(cuda::shared_address(to), from);
      } else {
        copy_x_slowly(to, from, left);
      }
    }
  }
  float* const powers = reinterpret_cast<float*>(shared + p.powers_offset);
  asm volatile("cp.async.wait_all;" ::: "memory");
#pragma unroll 1
  for (int piece = warp; piece < pieces; piece += warps) {
    int token, stage;
    const float undo = convert_x(place(piece, &token, &stage));
    if (lane == 0) powers[stage * (NT * 8) + token] = undo;
  }
  if (lane == 0) {  // What was left for the end of the kernel ahead.
#pragma unroll 1
    for (; filled < p.ring && to_fill < part; ++filled, to_fill += p.k_warps) {
      fill(filled);
    }
  }
  __syncthreads();

  float scale[MT][2], sums[MT][NT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m) {
    const float* of = p.scales + min(first_tile + m, p.row_tiles - 1) * kTileRows + (lane >> 2);
    scale[m][0] = __ldg(of);
    scale[m][1] = __ldg(of + 8);
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][j][i] = 0.f;
  }
  // Tokens past the last repeat it: their sums are never stored.
  const unsigned char* x_of[NT];
#pragma unroll
  for (int j = 0; j < NT; ++j) {
    x_of[j] =
        shared + p.x_offset + min(8 * j + (lane >> 2), p.t - 1) * p.x_stride + 16 * (lane & 3);
  }

  int slot = 0;
  unsigned phase = 0;
#pragma unroll 1
  for (int stage = k_warp; stage < part; stage += p.k_warps) {
    cuda::barrier_wait(full + 8 * slot, phase);
    unsigned char* const weights = ring + slot * MT * p.slot_bytes;
    float sum[MT][NT][4] = {};
    unsigned words[MT];
    uint4 masks[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      words[m] = complete(weights + m * p.slot_bytes, p.l, lane);
      masks[m] = *reinterpret_cast<const uint4*>(weights + m * p.slot_bytes + p.l.pool_bytes +
                                                 kHeaderBytes + 16 * lane);
    }
    __syncwarp();
    String string[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) string[m].start(words[m]);
    const int x_stage = stage * (2 * kStageColumns);
#pragma unroll
    for (int pair = 0; pair < kGroups / 2; ++pair) {
      unsigned mask[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        mask[m] = pair == 0   ? masks[m].x
                  : pair == 1 ? masks[m].y
                  : pair == 2 ? masks[m].z
                              : masks[m].w;
      }
#pragma unroll
      for (int group = 0; group < 2; ++group) {
        uint4 x[NT];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          x[j] = *reinterpret_cast<const uint4*>(x_of[j] + x_stage + 128 * pair + 64 * group);
        }
#pragma unroll
        for (int step = 0; step < 2; ++step) {
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            const uint2 bytes = string[m].template step<Code>(mask[m], 2 * group + step);
            unsigned a[4];
            Code::decode(bytes.x, &a[0], &a[2]);
            Code::decode(bytes.y, &a[1], &a[3]);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
              multiply(sum[m][j], a, step ? x[j].z : x[j].x, step ? x[j].w : x[j].y);
            }
          }
        }
      }
    }
    // The slot has been read.
    __syncwarp();
    if (lane == 0 && to_fill < part) {
      fill(slot);
      to_fill += p.k_warps;
    }
    if (++slot == p.ring) {
      slot = 0;
      phase ^= 1;
    }
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      const float2 undo =
          *reinterpret_cast<const float2*>(powers + stage * (NT * 8) + 8 * j + 2 * (lane & 3));
#pragma unroll
      for (int m = 0; m < MT; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[m][j][i] = fmaf(sum[m][j][i], i % 2 ? undo.y : undo.x, sums[m][j][i]);
        }
    }
  }

  if (cluster > 1) cuda::cluster_wait();  // All blocks of the cluster have started.
  if (!p.sums_apart) {                    // All their rings must have been read.
    if (cluster > 1) {
      cuda::cluster_arrive();
      cuda::cluster_wait();
    } else {
      __syncthreads();
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
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[m][j][i] *= scale[m][i >> 1];
      const unsigned q = out + (f >> p.cluster_log2) * (kFragmentFloats * 4);
      const int owner = f & (cluster - 1);
      if (owner == rank) {
        cuda::store_shared4(q, sums[m][j]);
      } else {
        cuda::store_cluster4(cuda::cluster_address(q, owner), sums[m][j],
                             cuda::cluster_address(sums_full, owner));
      }
    }
  __syncthreads();
  if (cluster > 1) cuda::barrier_wait_cluster(sums_full, 0);

  // All warps: add up the parts of K in their order, four rows of one token a lane, and store. A
  // fragment lies as the tensor cores leave it: lane 4g+t has rows g and g+8 of tokens 2t and 2t+1.
  // Neighbours take the four rows in different turns, else they would meet in one bank.
  const int parts = p.k_warps << p.cluster_log2;
  const int part_floats = slots * kFragmentFloats;
  const int quarter = lane & 3, token_lane = lane >> 2, odd = quarter & 1;
#pragma unroll 1
  for (int s = warp; s < slots; s += warps) {
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
    __nv_bfloat16* y = p.y + token * p.l.n + row;
    if (p.l.n % 4 == 0) {
      const __nv_bfloat162 low = __floats2bfloat162_rn(v[0], v[1]);
      const __nv_bfloat162 high = __floats2bfloat162_rn(v[2], v[3]);
      uint2 word;
      word.x = *reinterpret_cast<const unsigned*>(&low);
      word.y = *reinterpret_cast<const unsigned*>(&high);
      if (row < p.l.n) *reinterpret_cast<uint2*>(y) = word;
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (row + i < p.l.n) y[i] = __float2bfloat16_rn(v[i]);
      }
    }
  }
}

// ---------- host ----------

struct Shared {
  int ring_offset, x_offset, powers_offset, sums_offset, x_stride, bytes;
  bool sums_apart;
};

Shared shared_of(const Layout& l, const CodedCut& c, int t) {
  const int warps = c.row_warps * c.k_warps, part = ceil_div(l.stages(), c.cluster);
  Shared s;
  s.ring_offset = (8 * (warps * c.stages + 1) + 127) / 128 * 128;
  // Two rows of words more: a string's last place looks behind its end.
  s.x_offset = s.ring_offset + warps * c.stages * c.tiles_per_warp * l.slot_bytes() + 2 * kRowBytes;
  s.x_stride = part * (2 * kStageColumns) + kXPad;
  s.powers_offset = (s.x_offset + t * s.x_stride + 15) / 16 * 16;
  const int powers_end = s.powers_offset + part * c.token_tiles * 8 * 4;
  const int fragments = c.row_warps * c.tiles_per_warp * c.token_tiles;
  const int sums = c.cluster * c.k_warps * ceil_div(fragments, c.cluster) * (kFragmentFloats * 4);
  s.sums_apart = powers_end + sums <= kMaxSharedBytes - 256;
  s.sums_offset = s.sums_apart ? powers_end : s.ring_offset;
  s.bytes = std::max(powers_end, s.sums_offset + sums);
  return s;
}

template <class Code>
struct Coded {
  using Kernel = void (*)(const Params);

  static Kernel kernel(const CodedCut& c) {
    switch (c.token_tiles * 16 + c.tiles_per_warp) {
      case 1 * 16 + 1:
        return coded_kernel<Code, 1, 1>;
      case 1 * 16 + 2:
        return coded_kernel<Code, 1, 2>;
      case 2 * 16 + 1:
        return coded_kernel<Code, 2, 1>;
      case 2 * 16 + 2:
        return coded_kernel<Code, 2, 2>;
      default:
        return nullptr;
    }
  }

  static bool cut_ok(const Layout& l, const CodedCut& c, int t) {
    const int warps = c.row_warps * c.k_warps;
    return kernel(c) != nullptr && t <= c.token_tiles * 8 && warps >= 1 &&
           warps <= max_warps(c.token_tiles, c.tiles_per_warp) && c.stages >= 1 && c.cluster >= 1 &&
           c.cluster <= kMaxCluster && (c.cluster & (c.cluster - 1)) == 0 &&
           c.cluster <= l.stages() && shared_of(l, c, t).bytes <= kMaxSharedBytes - 256;
  }

  static int measure(const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
                     GpuStream stream) {
    if (coded_shape_refusal(n, k, 1) != nullptr || dense == nullptr || scratch == nullptr) {
      return cudaErrorInvalidValue;
    }
    const auto on = static_cast<cudaStream_t>(stream);
    Layout l{n, k, 0, 0, 0};
    const std::int64_t all = static_cast<std::int64_t>(l.row_tiles()) * l.stages();
    cudaError_t error = cudaMemsetAsync(scratch, 0, sizeof(Found), on);
    if (error != cudaSuccess) return error;
    coded_count_kernel<<<ceil_div(all, kPackWarps), kPackWarps * 32, 0, on>>>(
        {static_cast<const unsigned short*>(dense), static_cast<int>(n), static_cast<int>(k)},
        l.stages(), all, static_cast<Found*>(scratch));
    error = cudaGetLastError();
    Found found;
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(&found, scratch, sizeof found, cudaMemcpyDeviceToHost, on);
    }
    if (error == cudaSuccess) error = cudaStreamSynchronize(on);
    if (error != cudaSuccess) return error;
    const auto pool_bytes = [&](int c) { return (4 * found.pool[c] + 15) / 16 * 16; };
    // A row of words less to move from the pool is worth some bytes.
    const auto cost = [&](int c) {
      return c * kRowBytes + pool_bytes(c) + kMoveBytes * std::max(found.most_words - c, 0);
    };
    for (int c = 1; c <= kMostWords; ++c) {
      if (cost(c) <= cost(l.words)) l.words = c;
    }
    l.pool_bytes = pool_bytes(l.words);
    l.most_words = std::max(found.most_words, l.words);
    layout->packed_bytes = l.packed_bytes();
    hold(layout, l);
    return cudaSuccess;
  }

  static int pack(const GpuLayout* layout, const void* dense, const void*, void* packed,
                  GpuPackReport*, GpuStream stream) {
    const auto l = held<Layout>(layout);
    const auto on = static_cast<cudaStream_t>(stream);
    if (dense == nullptr || packed == nullptr ||
        reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
      return cudaErrorInvalidValue;
    }
    const cudaError_t error = cudaMemsetAsync(packed, 0, l.packed_bytes(), on);
    if (error != cudaSuccess) return error;
    const std::int64_t all = static_cast<std::int64_t>(l.row_tiles()) * l.stages();
    coded_pack_kernel<Code><<<ceil_div(all, kPackWarps), kPackWarps * 32, 0, on>>>(
        {static_cast<const unsigned short*>(dense), static_cast<int>(l.n), static_cast<int>(l.k)},
        l, static_cast<unsigned char*>(packed));
    return cudaGetLastError();
  }

  static int pack_scales(const GpuLayout* layout, const void* scales, void* packed,
                         GpuStream stream) {
    const auto l = held<Layout>(layout);
    const int padded = l.row_tiles() * kTileRows;
    coded_scales_kernel<<<ceil_div(padded, 256), 256, 0, static_cast<cudaStream_t>(stream)>>>(
        static_cast<const __nv_bfloat16*>(scales), static_cast<int>(l.n), padded,
        static_cast<float*>(packed));
    return cudaGetLastError();
  }

  template <class As>
  static int unpack_as(const GpuLayout* layout, const void* packed, void* dense, GpuStream stream) {
    const auto l = held<Layout>(layout);
    if (dense == nullptr || packed == nullptr) return cudaErrorInvalidValue;
    const auto kernel = coded_unpack_kernel<Code, As>;
    const int bytes = kPackWarps * l.slot_bytes() + 2 * kRowBytes;
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
    const std::int64_t all = static_cast<std::int64_t>(l.row_tiles()) * l.stages();
    const bool vectors =
        l.k % 8 == 0 && reinterpret_cast<std::uintptr_t>(dense) % sizeof(typename As::Eight) == 0;
    kernel<<<ceil_div(all, kPackWarps), kPackWarps * 32, bytes,
             static_cast<cudaStream_t>(stream)>>>(static_cast<const unsigned char*>(packed), l,
                                                  static_cast<typename As::Element*>(dense),
                                                  vectors);
    return cudaGetLastError();
  }

  // From measured rules (bench/lab/cuda_linear_coded): two blocks share K, a warp has one row tile,
  // and there are up to 28 warps, as many along K as leave fewest rounds. Where so much of the x of
  // more than 8 tokens does not fit, eight blocks share K if they take all rows at once, else four.
  static bool choose(const Layout& l, int t, const int (&at_once)[kMaxCluster + 1], CodedCut* cut) {
    struct Form {
      int cluster, tiles;  // of a warp
    };
    static constexpr Form kFew[] = {{2, 1}, {1, 1}, {4, 1}, {8, 1}};
    static constexpr Form kMore[] = {{2, 1}, {1, 1}, {8, 1}, {4, 2}};
    const int stages = l.stages();
    CodedCut c;
    c.token_tiles = t <= 8 ? 1 : 2;
    for (const Form& form : t <= 8 ? kFew : kMore) {
      c.cluster = static_cast<unsigned char>(form.cluster);
      c.tiles_per_warp = static_cast<unsigned char>(form.tiles);
      const int most = max_warps(c.token_tiles, form.tiles);
      const int groups = at_once[form.cluster], part = ceil_div(stages, form.cluster);
      const int tiles = ceil_div(l.row_tiles(), form.tiles);  // of all warps
      const int waves = ceil_div(ceil_div(tiles, groups), most);
      if (t > 8 && form.cluster == 8 && waves > 1) continue;
      const int rows = ceil_div(tiles, static_cast<std::int64_t>(groups) * waves);
      c.row_warps = static_cast<unsigned char>(rows);
      for (int k_warps = std::min(most / rows, part); k_warps >= 1; --k_warps) {
        const int rounds = ceil_div(part, k_warps);
        c.k_warps = static_cast<unsigned char>(ceil_div(part, rounds));
        for (int ring = std::min(2, rounds); ring >= 1; --ring) {
          c.stages = static_cast<unsigned char>(ring);
          if (rows * c.k_warps * 2 > most && cut_ok(l, c, t)) {
            *cut = c;
            return true;
          }
        }
      }
    }
    return choose_any(l, t, at_once, cut);
  }

  // For few rows and a short K, or where x is long.
  static bool choose_any(const Layout& l, int t, const int (&at_once)[kMaxCluster + 1],
                         CodedCut* cut) {
    CodedCut c;
    c.token_tiles = t <= 8 ? 1 : 2;
    c.tiles_per_warp = 1;
    c.stages = 1;
    const int most = max_warps(c.token_tiles, 1);
    // Beyond two blocks, two launches of 8 tokens read less.
    for (int cluster = 1; cluster <= (t <= 8 ? kMaxCluster : 2); cluster *= 2) {
      c.cluster = static_cast<unsigned char>(cluster);
      const int part = ceil_div(l.stages(), cluster);
      const int rows = std::min(most, ceil_div(l.row_tiles(), at_once[cluster]));
      for (int row_warps = rows; row_warps >= 1; --row_warps) {
        c.row_warps = static_cast<unsigned char>(row_warps);
        for (int k_warps = std::min(most / row_warps, part); k_warps >= 1; --k_warps) {
          c.k_warps = static_cast<unsigned char>(k_warps);
          if (cut_ok(l, c, t)) {
            *cut = c;
            return true;
          }
        }
      }
    }
    return false;
  }

  static int plan(const GpuLayout* layout, int64_t tokens, GpuPlan* plan) {
    const auto l = held<Layout>(layout);
    if (coded_shape_refusal(l.n, l.k, tokens) != nullptr) return cudaErrorInvalidValue;
    CodedCall call;
    call.tokens = static_cast<int>(tokens);
    call.each = ceil_div(tokens, ceil_div(tokens, 16));
    static std::atomic<int> known[16][9];
    int at_once[kMaxCluster + 1] = {};
    for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
      const cudaError_t error =
          cuda::clusters_at_once(coded_kernel<Code, 1, 1>, cluster, known, &at_once[cluster]);
      if (error != cudaSuccess) return error;
    }
    if (!choose(l, call.each, at_once, &call.cut)) {
      call.each = ceil_div(tokens, ceil_div(tokens, 8));
      if (!choose(l, call.each, at_once, &call.cut)) return cudaErrorNotSupported;
    }
    hold(plan, call);
    return cudaSuccess;
  }

  static int run(const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                 void* y, void*, int overlap_previous, GpuStream stream) {
    const auto l = held<Layout>(layout);
    const auto call = held<CodedCall>(plan);
    const CodedCut& c = call.cut;
    const auto at = [](const void* p) { return reinterpret_cast<std::uintptr_t>(p); };
    if (call.each < 1 || !cut_ok(l, c, call.each) || packed == nullptr || x == nullptr ||
        y == nullptr || at(packed) % 128 != 0 || at(x) % (l.k % 8 == 0 ? 16 : 2) != 0 ||
        at(y) % (l.n % 4 == 0 ? 8 : 2) != 0) {
      return cudaErrorInvalidValue;
    }
    const Shared s = shared_of(l, c, call.each);
    Params p = {};
    p.l = l;
    p.stages = static_cast<const unsigned char*>(packed) + l.scale_bytes();
    p.scales = static_cast<const float*>(packed);
    p.row_tiles = l.row_tiles();
    p.all_stages = l.stages();
    p.stage_bytes = l.stage_bytes();
    p.slot_bytes = l.slot_bytes();
    p.row_warps = c.row_warps;
    p.k_warps = c.k_warps;
    p.row_warps_inverse = 65536 / c.row_warps + 1;
    p.ring = c.stages;
    // Many weights in flight delay x even if it was asked for first.
    const int in_flight = c.row_warps * c.k_warps * c.stages * c.tiles_per_warp * p.stage_bytes;
    p.at_once = overlap_previous || in_flight > kMostAhead ? 1 : c.stages;
    p.cluster_log2 = c.cluster == 1 ? 0 : c.cluster == 2 ? 1 : c.cluster == 4 ? 2 : 3;
    p.ring_offset = s.ring_offset;
    p.x_offset = s.x_offset;
    p.powers_offset = s.powers_offset;
    p.sums_offset = s.sums_offset;
    p.x_stride = s.x_stride;
    p.sums_apart = s.sums_apart;
    p.x_vectors = l.k % 8 == 0;
    p.most_part = ceil_div(l.stages(), c.cluster);
    p.most_part_inverse = (1 << 20) / p.most_part + 1;
    p.overlap = overlap_previous != 0;
    const int bytes = std::max(s.bytes, kAloneBytes);
    cudaError_t error =
        cudaFuncSetAttribute(kernel(c), cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(ceil_div(p.row_tiles, c.row_warps * c.tiles_per_warp) * c.cluster);
    config.blockDim = dim3(c.row_warps * c.k_warps * 32);
    config.dynamicSmemBytes = bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    cudaLaunchAttribute attributes[2];
    config.attrs = attributes;
    if (c.cluster > 1) {
      attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
      attributes[config.numAttrs].val.clusterDim.x = c.cluster;
      attributes[config.numAttrs].val.clusterDim.y = 1;
      attributes[config.numAttrs].val.clusterDim.z = 1;
      ++config.numAttrs;
    }
    if (overlap_previous) {
      attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
      attributes[config.numAttrs].val.programmaticStreamSerializationAllowed = 1;
      ++config.numAttrs;
    }
    for (int first = 0; first < call.tokens && error == cudaSuccess; first += call.each) {
      p.t = std::min(call.each, call.tokens - first);
      p.x = static_cast<const __nv_bfloat16*>(x) + first * l.k;
      p.y = static_cast<__nv_bfloat16*>(y) + first * l.n;
      error = cudaLaunchKernelEx(&config, kernel(c), p);
    }
    return error;
  }

  static constexpr GpuLinearKernel shown_as(const char* name) {
    return {.operation = "linear_bitmap",
            .name = name,
            .scratch_bytes = [](int64_t, int64_t) -> size_t { return sizeof(Found); },
            .measure = measure,
            .pack = pack,
            .unpack = unpack_as<AsBf16<Code>>,
            .max_tokens = [](const GpuLayout*) -> int64_t { return kCodedMaxTokens; },
            .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
            .plan = plan,
            .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
            .run = run,
            .pack_scales = pack_scales,
            .unpack_codes = unpack_as<AsCodes<Code>>};
  }
};

}  // namespace

const GpuLinearKernel kFp8 = Coded<Fp8>::shown_as("cuda_sm90_fp8");
const GpuLinearKernel kInt8 = Coded<Int8>::shown_as("cuda_sm90_int8");

}  // namespace lacuna::kernels::linear_bitmap
