#include "lacuna/kernels/linear_bitmap/cuda_sm90_split.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "lacuna/kernels/cuda/sm90_stream.cuh"

namespace lacuna::kernels::linear_bitmap {
namespace {

using cuda::ceil_div;
using cuda::kStepBytes;
using cuda::kSteps;
using cuda::kTileRows;
using cuda::kUnitColumns;
using cuda::StreamParams;

constexpr int kMetadataBytes = 256;
constexpr int kPlacesBytes = kMetadataBytes + kSteps * kStepBytes;  // of form kPairs: 2,304

// Metadata of a tile whose two values of a group stand at columns 0 and 1, or 2 and 3.
constexpr unsigned kFirstColumns = 0x44444444, kLastColumns = 0xeeeeeeee;

// What a form of units is made of. List l of a unit holds the values that stand in 16 rows and 32
// columns (step l % 4), at columns 0 and 1 of each group of 4, or 2 and 3 (l / 4).
template <bool kPairs>
struct Form {
  static constexpr int kLists = kPairs ? kSteps : 2 * kSteps;
  static constexpr int kListsAt = kPairs ? kPlacesBytes : 0;
  static constexpr int kTileBytes = kLists * kStepBytes;  // the lists, expanded
  static constexpr int kRounds = kPairs ? 2 : 4;          // of 32 quads that wait in registers
};

// List entries come in fours: before them a count of fours and a word for each 32, whose bits tell
// where the next list begins.
__host__ __device__ constexpr int head_bytes(int quads) { return (quads + 95) / 64 * 8; }

// Bytes of a unit.
template <bool kPairs>
__host__ __device__ constexpr int unit_bytes(int quads) {
  return (Form<kPairs>::kListsAt + head_bytes(quads) + quads * 12 + 15) / 16 * 16;
}

__device__ __forceinline__ unsigned load_shared1(unsigned address) {
  unsigned v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
  return v;
}

__device__ __forceinline__ void store_shared_half(unsigned address, unsigned v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<unsigned short>(v))
               : "memory");
}

__device__ __forceinline__ void clear_shared4(unsigned address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

template <int kSelector>
__device__ __forceinline__ void multiply_sp(float (&c)[4], const uint4& a, const uint4& b,
                                            unsigned metadata) {
  asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),
        "r"(metadata), "n"(kSelector));
}

template <bool kPairs>
struct SplitWeights {
  static constexpr bool kExpands = true;

  // Registers are given out four warps at a time: 16 warps leave 128 a thread, 20 leave 96, 24 80.
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    return token_tiles * tiles_per_warp > 4          ? 15
           : tiles_per_warp == 2 || token_tiles == 4 ? 19
                                                     : 23;
  }

  template <int MT>
  struct Reader {
    static constexpr int kRounds = Form<kPairs>::kRounds;
    const StreamParams& p;
    const cuda::StreamSlice s;
    const unsigned ring, full;
    unsigned tile;  // where lists are expanded
    // Lane i: where the weights of round i of 32 begin and end, of these 32 rounds and the next.
    unsigned begin[MT], end[MT], next_begin[MT], next_end[MT];
    int filled = 0;                // rounds asked for
    unsigned loaded[MT], now[MT];  // the units whose lists were loaded last, and expanded last
    int quads[MT];                 // of the lists loaded last, as their first rounds:
    unsigned begins[MT][kRounds], places[MT][kRounds];
    uint2 values[MT][kRounds];

    __device__ __forceinline__ Reader(const StreamParams& params, const cuda::StreamSlice& slice,
                                      unsigned ring_address, unsigned full_barriers)
        : p(params), s(slice), ring(ring_address), full(full_barriers) {
      load_offsets(0, begin, end);
      load_offsets(32, next_begin, next_end);
    }

    __device__ __forceinline__ void load_offsets(int round0, unsigned (&b)[MT], unsigned (&e)[MT]) {
      const int unit = (round0 + s.lane) * s.span;
      if (unit >= s.own) return;
      const int units = min(p.stage_units, s.own - unit);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const std::size_t row = min(s.first_tile + m, p.row_tiles - 1);
        const unsigned* from = p.offsets + row * p.units + s.first + unit;
        b[m] = __ldg(from);
        e[m] = __ldg(from + units);
      }
    }

    // Where lists are expanded is zero before and after each unit.
    __device__ __forceinline__ void prepare(unsigned scratch) {
      tile = scratch + s.warp * MT * Form<kPairs>::kTileBytes;
#pragma unroll 1
      for (int i = s.lane * 16; i < MT * Form<kPairs>::kTileBytes; i += 512)
        clear_shared4(tile + i);
    }

    __device__ __forceinline__ void fill(int, int slot) {
      const int i = filled & 31;
      if (i == 0 && filled > 0) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          begin[m] = next_begin[m];
          end[m] = next_end[m];
        }
        load_offsets(filled + 32, next_begin, next_end);
      }
      ++filled;
      unsigned from[MT], bytes[MT], sum = 0;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        from[m] = __shfl_sync(~0u, begin[m], i);
        bytes[m] = (__shfl_sync(~0u, end[m], i) - from[m]) * 16;
        sum += bytes[m];
      }
      if (s.lane == 0) {
        const std::uint64_t policy = cuda::evict_first();
        cuda::barrier_expect(full + 8 * slot, sum);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          cuda::bulk_copy_once(ring + (slot * MT + m) * p.tile_stage_bytes,
                               p.weights + static_cast<std::size_t>(from[m]) * 16, bytes[m],
                               full + 8 * slot, policy);
        }
      }
    }

    __device__ __forceinline__ void load(int slot) {
#pragma unroll
      for (int m = 0; m < MT; ++m) loaded[m] = ring + (slot * MT + m) * p.tile_stage_bytes;
      load_lists();
    }

    __device__ __forceinline__ void load_next() {
#pragma unroll
      for (int m = 0; m < MT; ++m) loaded[m] += unit_bytes<kPairs>(quads[m]);
      load_lists();
    }

    __device__ __forceinline__ void load_lists() {
#pragma unroll
      for (int m = 0; m < MT; ++m) quads[m] = load_shared1(loaded[m] + Form<kPairs>::kListsAt);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned lists = loaded[m] + Form<kPairs>::kListsAt;
        const unsigned value = lists + head_bytes(quads[m]) + 8 * s.lane;
        const unsigned place = value + 8 * quads[m] - 4 * s.lane;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (32 * r + s.lane < quads[m]) {
            begins[m][r] = load_shared1(lists + 4 + 4 * r);
            values[m][r] = cuda::load_shared2(value + 256 * r);
            places[m][r] = load_shared1(place + 128 * r);
          }
        }
      }
    }

    // Writes four entries to where they stand in the fragments of list `list`.
    static __device__ __forceinline__ void scatter(unsigned list, uint2 value, unsigned place) {
      store_shared_half(__dp4a(place, 0x2u, list), value.x);
      store_shared_half(__dp4a(place, 0x200u, list), value.x >> 16);
      store_shared_half(__dp4a(place, 0x20000u, list), value.y);
      store_shared_half(__dp4a(place, 0x2000000u, list), value.y >> 16);
    }

    // Expands the lists loaded last.
    __device__ __forceinline__ void expand() {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        now[m] = loaded[m];
        unsigned to = tile + m * Form<kPairs>::kTileBytes;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (32 * r + s.lane < quads[m]) {
            scatter(to + __popc(begins[m][r] << (31 - s.lane)) * kStepBytes, values[m][r],
                    places[m][r]);
            to += __popc(begins[m][r]) * kStepBytes;
          }
        }
        if (quads[m] > 32 * kRounds) {  // Longer lists than most.
          const unsigned lists = now[m] + Form<kPairs>::kListsAt;
          const unsigned value = lists + head_bytes(quads[m]), place = value + 8 * quads[m];
#pragma unroll 1
          for (int q = 32 * kRounds + s.lane; q < quads[m]; q += 32) {
            const unsigned next = load_shared1(lists + 4 + q / 32 * 4);
            scatter(to + __popc(next << (31 - s.lane)) * kStepBytes,
                    cuda::load_shared2(value + 8 * q), load_shared1(place + 4 * q));
            to += __popc(next) * kStepBytes;
          }
        }
      }
      __syncwarp();
    }

    struct Step {
      uint4 listed[MT], placed[MT];
    };

    // Loads what is multiplied in a step, and clears the expanded lists.
    __device__ __forceinline__ void load_step(int step, Step& to) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned from = tile + m * Form<kPairs>::kTileBytes + step * kStepBytes + s.lane * 16;
        to.listed[m] = cuda::load_shared4(from);
        if constexpr (kPairs) {
          to.placed[m] =
              cuda::load_shared4(now[m] + kMetadataBytes + step * kStepBytes + s.lane * 16);
        } else {
          to.placed[m] = cuda::load_shared4(from + kSteps * kStepBytes);
          clear_shared4(from + kSteps * kStepBytes);
        }
        clear_shared4(from);
      }
    }

    // Multiplies the unit expanded last.
    template <int NT>
    __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], unsigned x,
                                             unsigned x_stride) {
      uint2 metadata[MT];
      if constexpr (kPairs) {
#pragma unroll
        for (int m = 0; m < MT; ++m) metadata[m] = cuda::load_shared2(now[m] + s.lane * 8);
      }
      Step steps[2];
      load_step(0, steps[0]);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        uint4 fragments[NT];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          fragments[j] = cuda::load_matrices(x + j * 8 * x_stride + step * 64);
        }
        if (step + 1 < kSteps) load_step(step + 1, steps[(step + 1) % 2]);
        const Step& a = steps[step % 2];
#pragma unroll
        for (int j = 0; j < NT; ++j) {
#pragma unroll
          for (int m = 0; m < MT; ++m)
            multiply_sp<0>(sums[m][j], a.listed[m], fragments[j], kFirstColumns);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            if constexpr (kPairs) {
              const unsigned e = step < 2 ? metadata[m].x : metadata[m].y;
              if (step % 2 == 0) {
                multiply_sp<0>(sums[m][j], a.placed[m], fragments[j], e);
              } else {
                multiply_sp<1>(sums[m][j], a.placed[m], fragments[j], e);
              }
            } else {
              multiply_sp<0>(sums[m][j], a.placed[m], fragments[j], kLastColumns);
            }
          }
        }
      }
      __syncwarp();
    }
  };
};

// ---------- packing ----------

// Four weights of a row from `column` on; zeros beyond W, and for -0.0.
__device__ __forceinline__ void load_group(const unsigned short* dense, int n, int k, int row,
                                           int column, unsigned (&v)[4]) {
  uint2 word = make_uint2(0, 0);
  if (row < n) {
    word = *reinterpret_cast<const uint2*>(dense + static_cast<std::size_t>(row) * k + column);
  }
  v[0] = word.x & 0xffff;
  v[1] = word.x >> 16;
  v[2] = word.y & 0xffff;
  v[3] = word.y >> 16;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if ((v[i] & 0x7fff) == 0) v[i] = 0;
  }
}

__device__ __forceinline__ int kept_of(const unsigned (&v)[4]) {
  return (v[0] != 0) + (v[1] != 0) + (v[2] != 0) + (v[3] != 0);
}

// What a group of form kPairs leaves to its list: the first of three, the first two of four, which
// stand at columns 0 and 1 in any case.
__device__ __forceinline__ void listed_of(const unsigned (&v)[4], unsigned (&listed)[2]) {
  const int kept = kept_of(v);
  listed[0] = kept >= 3 ? v[0] : 0;
  listed[1] = kept == 4 || (kept == 3 && v[0] == 0) ? v[1] : 0;
}

// The entries of a list that stand in bank `lane` of shared memory, so that entries in this order
// meet few conflicts. Entry i: half i % 2 of word lane + 32 (i / 2).
template <bool kPairs>
__device__ __forceinline__ void list_entries(const unsigned short* dense, int n, int k, int row0,
                                             int column0, int list, int lane,
                                             unsigned (&entry)[8]) {
  const int row = row0 + (lane >> 4) + 8 * (lane & 1);
  const int column = column0 + 32 * (list % kSteps) + 4 * ((lane >> 2 & 3) + 4 * (lane >> 1 & 1));
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    unsigned v[4];
    load_group(dense, n, k, row + 2 * w, column, v);
    if constexpr (kPairs) {
      unsigned listed[2];
      listed_of(v, listed);
      entry[2 * w] = listed[0];
      entry[2 * w + 1] = listed[1];
    } else {
      entry[2 * w] = list < kSteps ? v[0] : v[2];
      entry[2 * w + 1] = list < kSteps ? v[1] : v[3];
    }
  }
}

__device__ __forceinline__ int count_entries(const unsigned (&entry)[8]) {
  int count = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) count += entry[i] != 0;
  return count;
}

// Fours of a list: the last entry fills the last of them up, and no list is empty (it then writes
// a zero).
__device__ __forceinline__ int quads_of(int entries) { return max((entries + 3) / 4, 1); }

// One warp a unit: its size in 16 bytes, in both forms, and the values it keeps.
__global__ void __launch_bounds__(256)
    split_count_kernel(const unsigned short* dense, int n, int k, int units, std::int64_t all,
                       uint2* sizes, unsigned long long* kept) {
  const int lane = threadIdx.x & 31;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (index >= all) return;
  const int row0 = static_cast<int>(index / units) * kTileRows;
  const int column0 = static_cast<int>(index % units) * kUnitColumns;
  int of_pairs = 0, of_lists = 0, values = 0;
#pragma unroll 1
  for (int list = 0; list < 2 * kSteps; ++list) {
    unsigned entry[8];
    list_entries<false>(dense, n, k, row0, column0, list, lane, entry);
    const int entries = __reduce_add_sync(~0u, count_entries(entry));
    values += entries;
    of_lists += quads_of(entries);
    if (list >= kSteps) continue;
    list_entries<true>(dense, n, k, row0, column0, list, lane, entry);
    of_pairs += quads_of(__reduce_add_sync(~0u, count_entries(entry)));
  }
  if (lane == 0) {
    sizes[index] = make_uint2(unit_bytes<true>(of_pairs) / 16, unit_bytes<false>(of_lists) / 16);
    atomicAdd(kept, static_cast<unsigned long long>(values));
  }
}

// The two values of a group that stand in places (low half first) and their 4 bits of positions.
__device__ __forceinline__ unsigned placed_of(const unsigned (&v)[4], unsigned* values) {
  unsigned listed[2];
  listed_of(v, listed);
  const unsigned left[4] = {listed[0] ? 0 : v[0], listed[1] ? 0 : v[1], v[2], v[3]};
  int first = -1, second = -1;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (left[i] == 0) continue;
    if (first < 0) {
      first = i;
    } else {
      second = i;
    }
  }
  if (first < 0) first = 0;
  if (second < 0) {  // The partner is a zero: any place that keeps the order.
    second = 3;
    if (first == 3) first = 0;
  }
  const unsigned low = first == 0 ? left[0] : first == 1 ? left[1] : left[2];
  const unsigned high = second == 1 ? left[1] : second == 2 ? left[2] : left[3];
  *values = low | high << 16;
  return first | second << 2;
}

// One warp packs one unit.
template <bool kPairs>
__global__ void __launch_bounds__(256)
    split_pack_kernel(const unsigned short* dense, int n, int k, int units, std::int64_t all,
                      const unsigned* offsets, unsigned char* packed) {
  const int lane = threadIdx.x & 31;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (index >= all) return;
  const int row0 = static_cast<int>(index / units) * kTileRows;
  const int column0 = static_cast<int>(index % units) * kUnitColumns;
  unsigned char* unit = packed + static_cast<std::size_t>(offsets[index]) * 16;

  if constexpr (kPairs) {
    const int g = lane >> 2, t = lane & 3;
    unsigned v[4], values;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        load_group(dense, n, k, row0 + g + 8 * (i & 1),
                   column0 + 32 * step + 4 * (t + 4 * (i >> 1)), v);
        placed_of(v, &a[i]);
      }
      *reinterpret_cast<uint4*>(unit + kMetadataBytes + step * kStepBytes + lane * 16) =
          make_uint4(a[0], a[1], a[2], a[3]);
    }
    unsigned metadata[2];
#pragma unroll
    for (int word = 0; word < 2; ++word) {
      metadata[word] = 0;
      const int column = column0 + 32 * (2 * word + t / 2) + 16 * (t % 2);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        load_group(dense, n, k, row0 + g + 8 * (i / 4), column + 4 * (i % 4), v);
        metadata[word] |= placed_of(v, &values) << (4 * i);
      }
    }
    *reinterpret_cast<uint2*>(unit + lane * 8) = make_uint2(metadata[0], metadata[1]);
  }

  int starts[Form<kPairs>::kLists + 1];  // fours before each list
  starts[0] = 0;
#pragma unroll
  for (int list = 0; list < Form<kPairs>::kLists; ++list) {
    unsigned entry[8];
    list_entries<kPairs>(dense, n, k, row0, column0, list, lane, entry);
    starts[list + 1] = starts[list] + quads_of(__reduce_add_sync(~0u, count_entries(entry)));
  }
  const int quads = starts[Form<kPairs>::kLists], rounds = (quads + 31) / 32;
  unsigned char* lists = unit + Form<kPairs>::kListsAt;
  for (int r = lane; r < rounds + 1; r += 32) {
    unsigned word = 0;
    if (r == 0) {
      word = quads;
    } else {
#pragma unroll
      for (int list = 1; list < Form<kPairs>::kLists; ++list) {
        if (starts[list] / 32 == r - 1) word |= 1u << (starts[list] % 32);
      }
    }
    reinterpret_cast<unsigned*>(lists)[r] = word;
  }
  unsigned short* values = reinterpret_cast<unsigned short*>(lists + head_bytes(quads));
  unsigned char* places = lists + head_bytes(quads) + 8 * quads;
#pragma unroll 1
  for (int list = 0; list < Form<kPairs>::kLists; ++list) {
    unsigned entry[8];
    list_entries<kPairs>(dense, n, k, row0, column0, list, lane, entry);
    const int count = count_entries(entry);
    int before = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, before, d);
      if (lane >= d) before += other;
    }
    const int total = __shfl_sync(~0u, before, 31);
    before -= count;
    int start = 0;
#pragma unroll
    for (int i = 0; i < Form<kPairs>::kLists; ++i) {
      if (i == list) start = 4 * starts[i];
    }
    int to = start + before;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (entry[i] == 0) continue;
      values[to] = entry[i];
      places[to] = 2 * (lane + 32 * (i / 2)) + i % 2;
      for (int j = to + 1; to == start + total - 1 && j % 4 != 0; ++j) {
        values[j] = entry[i];
        places[j] = places[to];
      }
      ++to;
    }
    if (total == 0 && lane < 4) {
      values[start + lane] = 0;
      places[start + lane] = 0;
    }
  }
}

constexpr int kUnpackWarps = 4;

// One warp unpacks one unit, through a tile in shared memory.
template <bool kPairs>
__global__ void __launch_bounds__(kUnpackWarps * 32)
    split_unpack_kernel(const unsigned char* packed, const unsigned* offsets, int n, int k,
                        int units, std::int64_t all, unsigned short* dense) {
  __shared__ uint2 tiles[kUnpackWarps][kTileRows][kUnitColumns / 4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + warp;
  if (index >= all) return;
  const int row0 = static_cast<int>(index / units) * kTileRows;
  const int column0 = static_cast<int>(index % units) * kUnitColumns;
  const unsigned char* unit = packed + static_cast<std::size_t>(offsets[index]) * 16;
  const auto tile = tiles[warp];
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) tile[row][lane] = make_uint2(0, 0);
  __syncwarp();
  const auto at = [&](int row, int column) {
    return reinterpret_cast<unsigned short*>(&tile[row][0]) + column;
  };
  if constexpr (kPairs) {
    const int g = lane >> 2, t = lane & 3;
    const uint2 metadata = *reinterpret_cast<const uint2*>(unit + lane * 8);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 word =
          *reinterpret_cast<const uint4*>(unit + kMetadataBytes + step * kStepBytes + lane * 16);
      const unsigned values[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // columns 0..15 and 16..31 of the step
        // The places of a group lie in the metadata of the lane that mma.sp takes them from.
        const unsigned places =
            __shfl_sync(~0u, step < 2 ? metadata.x : metadata.y, 4 * g + 2 * (step % 2) + half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // rows g and g + 8
          const unsigned place = places >> (16 * i + 4 * t);
          unsigned short* group = at(g + 8 * i, 32 * step + 16 * half + 4 * t);
          group[place & 3] = values[2 * half + i] & 0xffff;
          group[place >> 2 & 3] = values[2 * half + i] >> 16;
        }
      }
    }
    __syncwarp();
  }
  const unsigned char* lists = unit + Form<kPairs>::kListsAt;
  const unsigned* words = reinterpret_cast<const unsigned*>(lists);
  const int quads = words[0], rounds = (quads + 31) / 32;
  const unsigned char* values = lists + head_bytes(quads);
  int list0 = 0;
#pragma unroll 1
  for (int r = 0; r < rounds; ++r) {
    const unsigned begins = words[1 + r];
    const int quad = 32 * r + lane;
    if (quad < quads) {
      const int list = list0 + __popc(begins << (31 - lane));
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const unsigned short v = reinterpret_cast<const unsigned short*>(values)[4 * quad + i];
        const int place = (values + 8 * quads)[4 * quad + i];
        const int fragment_lane = place >> 3, part = place >> 1 & 3;
        const int column = 32 * (list % kSteps) + 4 * ((fragment_lane & 3) + 4 * (part >> 1)) +
                           2 * (list / kSteps) + (place & 1);
        if (v != 0) *at((fragment_lane >> 2) + 8 * (part & 1), column) = v;
      }
    }
    list0 += __popc(begins);
  }
  __syncwarp();
  for (int row = 0; row < kTileRows && row0 + row < n; ++row) {
    *reinterpret_cast<uint2*>(dense + static_cast<std::size_t>(row0 + row) * k + column0 +
                              4 * lane) = tile[row][lane];
  }
}

template <bool kPairs>
cuda::StreamKernel kernel_of(int token_tiles, int tiles_per_warp) {
  switch (token_tiles * 16 + tiles_per_warp) {
    case 1 * 16 + 1:
      return cuda::stream_kernel<SplitWeights<kPairs>, 1, 1>;
    case 1 * 16 + 2:
      return cuda::stream_kernel<SplitWeights<kPairs>, 1, 2>;
    case 2 * 16 + 1:
      return cuda::stream_kernel<SplitWeights<kPairs>, 2, 1>;
    case 2 * 16 + 2:
      return cuda::stream_kernel<SplitWeights<kPairs>, 2, 2>;
    case 4 * 16 + 1:
      return cuda::stream_kernel<SplitWeights<kPairs>, 4, 1>;
    case 4 * 16 + 2:
      return cuda::stream_kernel<SplitWeights<kPairs>, 4, 2>;
    default:
      return nullptr;
  }
}

cuda::StreamKernel find_kernel(SplitForm form, int token_tiles, int tiles_per_warp) {
  return form == SplitForm::kPairs ? kernel_of<true>(token_tiles, tiles_per_warp)
                                   : kernel_of<false>(token_tiles, tiles_per_warp);
}

cuda::StreamShared shared_of(const SplitLayout& layout, const SplitPlan& plan) {
  return cuda::stream_shared(
      plan, layout.max_unit_bytes,
      layout.form == SplitForm::kPairs ? Form<true>::kTileBytes : Form<false>::kTileBytes);
}

int max_warps(const SplitPlan& plan) {
  return SplitWeights<true>::max_warps(plan.token_tiles, plan.tiles_per_warp);
}

// A warp waits for its next weights before it gives back the memory of the last.
bool plan_ok(const SplitPlan& plan) {
  return cuda::stream_plan_ok(plan, max_warps(plan)) && plan.stages >= 2;
}

bool layout_ok(const SplitLayout& l) {
  return split_shape_refusal(l.n, l.k, 1) == nullptr &&
         (l.form == SplitForm::kPairs || l.form == SplitForm::kLists) && l.max_unit_bytes > 0;
}

std::int64_t units_of(std::int64_t n, std::int64_t k) {
  return static_cast<std::int64_t>(ceil_div(n, kTileRows)) * (k / kUnitColumns);
}

// Scratch: what is kept | sizes of the units in both forms, then where each begins.
constexpr std::size_t kSizesAt = 128;

}  // namespace

const char* split_refusal(std::int64_t n, std::int64_t k, int t, int device) {
  if (const char* reason = split_shape_refusal(n, k, t)) return reason;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "no such device";
  }
  if (major != 9 || minor != 0) return "needs compute capability 9.0";
  return nullptr;
}

std::size_t split_scratch_bytes(std::int64_t n, std::int64_t k) {
  return kSizesAt + (units_of(n, k) + 1) * 8;
}

cudaError_t split_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                          SplitLayout* layout, cudaStream_t stream) {
  if (split_shape_refusal(n, k, 1) != nullptr || dense == nullptr || scratch == nullptr ||
      layout == nullptr || reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(scratch) % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  const std::int64_t all = units_of(n, k);
  unsigned char* const base = static_cast<unsigned char*>(scratch);
  cudaError_t error = cudaMemsetAsync(scratch, 0, kSizesAt, stream);
  if (error != cudaSuccess) return error;
  split_count_kernel<<<ceil_div(all, 8), 256, 0, stream>>>(
      static_cast<const unsigned short*>(dense), static_cast<int>(n), static_cast<int>(k),
      static_cast<int>(k / kUnitColumns), all, reinterpret_cast<uint2*>(base + kSizesAt),
      reinterpret_cast<unsigned long long*>(base));
  error = cudaGetLastError();
  std::vector<uint2> sizes(all);
  unsigned long long kept = 0;
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(sizes.data(), base + kSizesAt, all * sizeof(uint2),
                            cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(&kept, base, sizeof(kept), cudaMemcpyDeviceToHost, stream);
  }
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return error;
  SplitLayout l;
  l.n = n;
  l.k = k;
  l.kept = static_cast<std::int64_t>(kept);
  l.form = layout->form;
  if (l.form == SplitForm::kChoose) {
    l.form = l.kept * 4 <= n * k ? SplitForm::kLists : SplitForm::kPairs;
  }
  std::vector<unsigned> offsets(all + 1);
  std::uint64_t total = 0;
  for (std::int64_t i = 0; i < all; ++i) {
    const unsigned size = l.form == SplitForm::kPairs ? sizes[i].x : sizes[i].y;
    offsets[i] = static_cast<unsigned>(total);
    l.max_unit_bytes = std::max(l.max_unit_bytes, static_cast<int>(size * 16));
    total += size;
  }
  if (total >= (1ull << 32)) return cudaErrorNotSupported;
  offsets[all] = static_cast<unsigned>(total);
  l.units_at = ((all + 1) * 4 + 127) / 128 * 128;
  l.packed_bytes = l.units_at + total * 16;
  error = cudaMemcpyAsync(base + kSizesAt, offsets.data(), offsets.size() * 4,
                          cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) *layout = l;
  return error;
}

cudaError_t split_pack(const void* dense, const void* scratch, const SplitLayout& layout,
                       void* packed, cudaStream_t stream) {
  if (!layout_ok(layout) || dense == nullptr || scratch == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  const std::int64_t all = units_of(layout.n, layout.k);
  unsigned char* const to = static_cast<unsigned char*>(packed);
  cudaError_t error =
      cudaMemsetAsync(packed, 0, layout.packed_bytes, stream);  // of the ends of units
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(to, static_cast<const unsigned char*>(scratch) + kSizesAt,
                            (all + 1) * 4, cudaMemcpyDeviceToDevice, stream);
  }
  if (error != cudaSuccess) return error;
  const auto kernel =
      layout.form == SplitForm::kPairs ? split_pack_kernel<true> : split_pack_kernel<false>;
  kernel<<<ceil_div(all, 8), 256, 0, stream>>>(
      static_cast<const unsigned short*>(dense), static_cast<int>(layout.n),
      static_cast<int>(layout.k), static_cast<int>(layout.k / kUnitColumns), all,
      reinterpret_cast<const unsigned*>(to), to + layout.units_at);
  return cudaGetLastError();
}

cudaError_t split_unpack(const void* packed, const SplitLayout& layout, void* dense,
                         cudaStream_t stream) {
  if (!layout_ok(layout) || dense == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  const std::int64_t all = units_of(layout.n, layout.k);
  const unsigned char* const from = static_cast<const unsigned char*>(packed);
  const auto kernel =
      layout.form == SplitForm::kPairs ? split_unpack_kernel<true> : split_unpack_kernel<false>;
  kernel<<<ceil_div(all, kUnpackWarps), kUnpackWarps * 32, 0, stream>>>(
      from + layout.units_at, reinterpret_cast<const unsigned*>(from), static_cast<int>(layout.n),
      static_cast<int>(layout.k), static_cast<int>(layout.k / kUnitColumns), all,
      static_cast<unsigned short*>(dense));
  return cudaGetLastError();
}

std::size_t split_shared_bytes(const SplitLayout& layout, const SplitPlan& plan) {
  return find_kernel(layout.form, plan.token_tiles, plan.tiles_per_warp) != nullptr && plan_ok(plan)
             ? shared_of(layout, plan).bytes
             : 0;
}

cudaError_t split_plan(const SplitLayout& layout, int t, SplitPlan* plan) {
  if (!layout_ok(layout) || split_shape_refusal(layout.n, layout.k, t) != nullptr ||
      plan == nullptr) {
    return cudaErrorInvalidValue;
  }
  static std::atomic<int> known[2][3][16][9];
  const int tiles = ceil_div(layout.n, kTileRows),
            units = static_cast<int>(layout.k / kUnitColumns);
  SplitPlan p;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : 4;
  const auto clusters = [&](int cluster, int* at_once) {
    return cuda::clusters_at_once(find_kernel(layout.form, p.token_tiles, 2), cluster,
                                  known[layout.form == SplitForm::kPairs][p.token_tiles / 2],
                                  at_once);
  };
  int at_once = 0, row_tiles = 0;
  for (p.cluster = 1;; p.cluster *= 2) {
    const cudaError_t error = clusters(p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
    const bool idle = tiles * 4 < at_once * 3;
    const bool enough = t <= 2 || row_tiles >= 13 || (t <= 8 && p.cluster >= 2);
    if ((enough && !idle) || p.cluster == cuda::kMaxCluster || units < 4 * p.cluster) break;
  }
  while (p.cluster > 1 && units < 2 * p.cluster) {
    p.cluster /= 2;
    const cudaError_t error = clusters(p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
  }
  const int part = ceil_div(units, p.cluster);
  p.tiles_per_warp = row_tiles == 1 ? 1 : 2;
  const int most = max_warps(p) - 1;
  const int waves = ceil_div(row_tiles, most * p.tiles_per_warp);
  if (waves > 1) row_tiles = ceil_div(tiles, static_cast<std::int64_t>(at_once) * waves);
  p.row_warps = ceil_div(row_tiles, p.tiles_per_warp);
  const int wanted_x_warps = t <= 2 ? 2 : t <= 8 ? 3 : t <= 16 ? 2 : 4;
  for (; p.row_warps >= 1; p.row_warps /= 2) {
    for (p.k_warps = std::clamp(12 / p.row_warps, 1, std::min(6, part)); p.k_warps >= 1;
         --p.k_warps) {
      const int warps = p.row_warps * p.k_warps;
      p.x_warps = std::min(wanted_x_warps, max_warps(p) + 1 - warps);
      p.stage_units = 1;
      const int rounds = ceil_div(part, p.stage_units * p.k_warps);
      for (p.stages = 2; p.stages >= 2; --p.stages) {
        for (p.x_stages = std::min(3, rounds); p.x_stages >= std::min(2, rounds); --p.x_stages) {
          const std::size_t bytes = split_shared_bytes(layout, p);
          if (bytes > 0 && bytes <= cuda::kMaxSharedBytes) {
            *plan = p;
            return cudaSuccess;
          }
        }
      }
    }
  }
  return cudaErrorNotSupported;
}

cudaError_t split_run(const void* packed, const SplitLayout& layout, const void* x, void* y, int t,
                      const SplitPlan& plan, bool overlap_previous, cudaStream_t stream) {
  if (!layout_ok(layout) || split_shared_bytes(layout, plan) == 0 ||
      split_shape_refusal(layout.n, layout.k, t) != nullptr || t > plan.token_tiles * 8 ||
      packed == nullptr || x == nullptr || y == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0 ||
      reinterpret_cast<std::uintptr_t>(x) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(y) % (layout.n % 4 == 0 ? 8 : 2) != 0) {
    return cudaErrorInvalidValue;
  }
  StreamParams p = {};
  p.offsets = static_cast<const unsigned*>(packed);
  p.weights = static_cast<const unsigned char*>(packed) + layout.units_at;
  p.x = static_cast<const __nv_bfloat16*>(x);
  p.y = static_cast<__nv_bfloat16*>(y);
  p.n = static_cast<int>(layout.n);
  p.k = static_cast<int>(layout.k);
  p.t = t;
  return cuda::stream_launch(find_kernel(layout.form, plan.token_tiles, plan.tiles_per_warp), p,
                             plan, shared_of(layout, plan), overlap_previous, stream);
}

namespace {

struct Call {
  int t;
  SplitPlan plan;
};

}  // namespace

const GpuLinearKernel kSplit = {
    .operation = "linear_bitmap",
    .name = "cuda_sm90_split",
    .scratch_bytes = [](int64_t n, int64_t k) -> size_t { return split_scratch_bytes(n, k); },
    .measure = [](const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
                  GpuStream stream) -> int {
      SplitLayout split;
      const cudaError_t error =
          split_measure(dense, n, k, scratch, &split, static_cast<cudaStream_t>(stream));
      layout->packed_bytes = split.packed_bytes;
      hold(layout, split);
      return error;
    },
    .pack = [](const GpuLayout* layout, const void* dense, const void* scratch, void* packed,
               GpuPackReport*, GpuStream stream) -> int {
      return split_pack(dense, scratch, held<SplitLayout>(layout), packed,
                        static_cast<cudaStream_t>(stream));
    },
    .unpack = [](const GpuLayout* layout, const void* packed, void* dense,
                 GpuStream stream) -> int {
      return split_unpack(packed, held<SplitLayout>(layout), dense,
                          static_cast<cudaStream_t>(stream));
    },
    .max_tokens = [](const GpuLayout*) -> int64_t { return kSplitMaxTokens; },
    .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
      Call call{static_cast<int>(std::min(tokens, kSplitMaxTokens + 1)), {}};
      const cudaError_t error = split_plan(held<SplitLayout>(layout), call.t, &call.plan);
      if (error == cudaSuccess) hold(plan, call);
      return error;
    },
    .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
    .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
              void* y, void*, int overlap_previous, GpuStream stream) -> int {
      const auto call = held<Call>(plan);
      return split_run(packed, held<SplitLayout>(layout), x, y, call.t, call.plan,
                       overlap_previous != 0, static_cast<cudaStream_t>(stream));
    },
};

}  // namespace lacuna::kernels::linear_bitmap
