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

// What a form of units is made of. A tile holds, expanded, the values that stand at columns 0 and 1
// of each group of 4, as the fragments of four steps; form kLists has another, of columns 2 and 3.
template <bool kPairs>
struct Form {
  static constexpr int kTiles = kPairs ? 1 : 2;
  static constexpr int kListAt = kPairs ? kPlacesBytes : 0;
  static constexpr int kTileBytes = kTiles * kSteps * kStepBytes;
  static constexpr int kRounds = kPairs ? 2 : 4;  // of 32 fours that wait in registers
};

// Head of a list: the fours of entries that follow, the place of further ones in 16 bytes from the
// first unit, or 0.
constexpr int kHeadBytes = 16;
constexpr int kFourBytes = 16;

// Bytes of a unit with so many fours. All units of a matrix have one size; further fours of a unit
// stand behind the units.
template <bool kPairs>
__host__ __device__ constexpr int unit_bytes(int fours) {
  return Form<kPairs>::kListAt + kHeadBytes + fours * kFourBytes;
}

constexpr int kUnitAlignment = 32;

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

// Writes four entries (a value, and its place in the tile in the high half) to their places.
__device__ __forceinline__ void scatter(unsigned tile, const uint4& entries) {
  store_shared_half(tile + (entries.x >> 16), entries.x);
  store_shared_half(tile + (entries.y >> 16), entries.y);
  store_shared_half(tile + (entries.z >> 16), entries.z);
  store_shared_half(tile + (entries.w >> 16), entries.w);
}

// Expands what a list has beyond the rounds in registers, and elsewhere: few lists do.
__device__ __noinline__ void scatter_rest(unsigned list, unsigned first, const unsigned char* units,
                                          unsigned tile, int lane) {
  const uint2 head = cuda::load_shared2(list);
  for (unsigned q = first + lane; q < head.x; q += 32) {
    scatter(tile, cuda::load_shared4(list + kHeadBytes + q * kFourBytes));
  }
  if (head.y == 0) return;
  const uint4* rest = reinterpret_cast<const uint4*>(units) + head.y;
  const unsigned fours = rest->x;
  for (unsigned q = lane; q < fours; q += 32) scatter(tile, rest[1 + q]);
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
    unsigned tile;                 // where lists are expanded
    unsigned loaded[MT], now[MT];  // the units whose lists were loaded last, and expanded last
    uint2 heads[MT];               // of the lists loaded last, as their first rounds:
    uint4 entries[MT][kRounds];

    __device__ __forceinline__ Reader(const StreamParams& params, const cuda::StreamSlice& slice,
                                      unsigned ring_address, unsigned full_barriers)
        : p(params), s(slice), ring(ring_address), full(full_barriers) {}

    // Where lists are expanded is zero before and after each unit.
    __device__ __forceinline__ void prepare(unsigned scratch) {
      tile = scratch + s.warp * MT * Form<kPairs>::kTileBytes;
#pragma unroll 1
      for (int i = s.lane * 16; i < MT * Form<kPairs>::kTileBytes; i += 512)
        clear_shared4(tile + i);
    }

    __device__ __forceinline__ void fill(int unit, int slot) {
      if (s.lane != 0) return;
      const unsigned bytes = min(p.stage_units, s.own - unit) * p.unit_bytes;
      cuda::barrier_expect(full + 8 * slot, MT * bytes);
      const std::uint64_t policy = cuda::evict_first();
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        // A tile past the end repeats the last one: its sums are never stored.
        const std::size_t row = min(s.first_tile + m, p.row_tiles - 1);
        cuda::bulk_copy_once(ring + (slot * MT + m) * p.tile_stage_bytes,
                             p.weights + (row * p.units + s.first + unit) * p.unit_bytes, bytes,
                             full + 8 * slot, policy);
      }
    }

    __device__ __forceinline__ void load(int slot) {
#pragma unroll
      for (int m = 0; m < MT; ++m) loaded[m] = ring + (slot * MT + m) * p.tile_stage_bytes;
      load_lists();
    }

    __device__ __forceinline__ void load_next() {
#pragma unroll
      for (int m = 0; m < MT; ++m) loaded[m] += p.unit_bytes;
      load_lists();
    }

    // A lane beyond the last four takes the last one again: it writes what another writes, too.
    __device__ __forceinline__ void load_lists() {
#pragma unroll
      for (int m = 0; m < MT; ++m) heads[m] = cuda::load_shared2(loaded[m] + Form<kPairs>::kListAt);
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned from = loaded[m] + Form<kPairs>::kListAt + kHeadBytes;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (r > 0 && heads[m].x <= 32 * r) break;
          entries[m][r] =
              cuda::load_shared4(from + min(32 * r + s.lane, heads[m].x - 1) * kFourBytes);
        }
      }
    }

    // Expands the lists loaded last.
    __device__ __forceinline__ void expand() {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        now[m] = loaded[m];
        const unsigned to = tile + m * Form<kPairs>::kTileBytes;
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (r > 0 && heads[m].x <= 32 * r) break;
          scatter(to, entries[m][r]);
        }
        if (heads[m].y != 0 || heads[m].x > 32 * kRounds) {
          scatter_rest(now[m] + Form<kPairs>::kListAt, 32 * kRounds, p.weights, to, s.lane);
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

// The values that stand in bank `lane` of shared memory in a step of a tile: value i is half i % 2
// of word lane + 32 (i / 2).
template <bool kPairs>
__device__ __forceinline__ void list_entries(const unsigned short* dense, int n, int k, int row0,
                                             int column0, int tile, int step, int lane,
                                             unsigned (&entry)[8]) {
  const int row = row0 + (lane >> 4) + 8 * (lane & 1);
  const int column = column0 + 32 * step + 4 * ((lane >> 2 & 3) + 4 * (lane >> 1 & 1));
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
      entry[2 * w] = tile == 0 ? v[0] : v[2];
      entry[2 * w + 1] = tile == 0 ? v[1] : v[3];
    }
  }
}

// Entries of a unit that stand in bank `lane`.
template <bool kPairs>
__device__ __forceinline__ int count_entries(const unsigned short* dense, int n, int k, int row0,
                                             int column0, int lane) {
  int count = 0;
#pragma unroll 1
  for (int i = 0; i < Form<kPairs>::kTiles * kSteps; ++i) {
    unsigned entry[8];
    list_entries<kPairs>(dense, n, k, row0, column0, i / kSteps, i % kSteps, lane, entry);
#pragma unroll
    for (int j = 0; j < 8; ++j) count += entry[j] != 0;
  }
  return count;
}

// No list is empty: it then writes a zero.
__host__ __device__ constexpr int fours_of(int entries) {
  return entries > 0 ? (entries + 3) / 4 : 1;
}

// One warp a unit: its fours in both forms, and the values it keeps.
__global__ void __launch_bounds__(256)
    split_count_kernel(const unsigned short* dense, int n, int k, int units, std::int64_t all,
                       uint2* fours, unsigned long long* kept) {
  const int lane = threadIdx.x & 31;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (index >= all) return;
  const int row0 = static_cast<int>(index / units) * kTileRows;
  const int column0 = static_cast<int>(index % units) * kUnitColumns;
  const int listed = __reduce_add_sync(~0u, count_entries<true>(dense, n, k, row0, column0, lane));
  const int values = __reduce_add_sync(~0u, count_entries<false>(dense, n, k, row0, column0, lane));
  if (lane == 0) {
    fours[index] = make_uint2(fours_of(listed), fours_of(values));
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
                      int unit_stride, const unsigned* elsewhere, unsigned char* packed) {
  const int lane = threadIdx.x & 31;
  const std::int64_t index =
      static_cast<std::int64_t>(blockIdx.x) * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (index >= all) return;
  const int row0 = static_cast<int>(index / units) * kTileRows;
  const int column0 = static_cast<int>(index % units) * kUnitColumns;
  unsigned char* unit = packed + index * unit_stride;

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

  // Entries in the order of their banks fill lane 0's fours of all rounds, then lane 1's: lanes
  // that store at once then meet in few banks.
  const int count = count_entries<kPairs>(dense, n, k, row0, column0, lane);
  int before = count;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, before, d);
    if (lane >= d) before += other;
  }
  const int total = __shfl_sync(~0u, before, 31);
  before -= count;
  const int fours = fours_of(total), rounds = (fours + 31) / 32,
            long_lanes = fours - 32 * (rounds - 1);
  const int here = min(fours, (unit_stride - unit_bytes<kPairs>(0)) / kFourBytes);
  unsigned* list = reinterpret_cast<unsigned*>(unit + Form<kPairs>::kListAt);
  unsigned* rest =
      reinterpret_cast<unsigned*>(packed + static_cast<std::size_t>(elsewhere[index]) * 16);
  if (lane == 0) {
    list[0] = here;
    list[1] = elsewhere[index];
    if (elsewhere[index] != 0) rest[0] = fours - here;
  }
  const auto store = [&](int i, unsigned entry) {
    int to_lane, slot;  // of a lane's entries
    if (i < long_lanes * 4 * rounds) {
      to_lane = i / (4 * rounds);
      slot = i % (4 * rounds);
    } else {
      i -= long_lanes * 4 * rounds;
      to_lane = long_lanes + i / (4 * (rounds - 1));
      slot = i % (4 * (rounds - 1));
    }
    const int four = 32 * (slot / 4) + to_lane;
    if (four < here) {
      list[4 + 4 * four + slot % 4] = entry;
    } else {
      rest[4 + 4 * (four - here) + slot % 4] = entry;
    }
  };
  unsigned last = 0;
#pragma unroll 1
  for (int i = 0; i < Form<kPairs>::kTiles * kSteps; ++i) {
    unsigned entry[8];
    list_entries<kPairs>(dense, n, k, row0, column0, i / kSteps, i % kSteps, lane, entry);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      if (entry[j] == 0) continue;
      last = entry[j] | (i * kStepBytes + 4 * (lane + 32 * (j / 2)) + 2 * (j % 2)) << 16;
      store(before++, last);
    }
  }
  if (before == total && (count > 0 || (total == 0 && lane == 0))) {  // The last entry fills up.
    for (int i = total; i < 4 * fours; ++i) store(i, last);
  }
}

constexpr int kUnpackWarps = 4;

// One warp unpacks one unit, through a tile in shared memory.
template <bool kPairs>
__global__ void __launch_bounds__(kUnpackWarps * 32)
    split_unpack_kernel(const unsigned char* packed, int unit_stride, int n, int k, int units,
                        std::int64_t all, unsigned short* dense) {
  __shared__ uint2 tiles[kUnpackWarps][kTileRows][kUnitColumns / 4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t index = static_cast<std::int64_t>(blockIdx.x) * kUnpackWarps + warp;
  if (index >= all) return;
  const int row0 = static_cast<int>(index / units) * kTileRows;
  const int column0 = static_cast<int>(index % units) * kUnitColumns;
  const unsigned char* unit = packed + index * unit_stride;
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
  const auto put = [&](unsigned entry) {
    const int word = entry >> 18 & 127, step = entry >> 25 & 3, other = entry >> 27 & 1;
    const int fragment_lane = word >> 2, part = word & 3;
    const int column =
        32 * step + 4 * ((fragment_lane & 3) + 4 * (part >> 1)) + 2 * other + (entry >> 17 & 1);
    if ((entry & 0xffff) != 0) *at((fragment_lane >> 2) + 8 * (part & 1), column) = entry & 0xffff;
  };
  const unsigned* list = reinterpret_cast<const unsigned*>(unit + Form<kPairs>::kListAt);
  for (unsigned i = lane; i < 4 * list[0]; i += 32) put(list[4 + i]);
  if (list[1] != 0) {
    const unsigned* rest =
        reinterpret_cast<const unsigned*>(packed) + 4 * static_cast<std::size_t>(list[1]);
    for (unsigned i = lane; i < 4 * rest[0]; i += 32) put(rest[4 + i]);
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
      plan, layout.unit_bytes,
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
         (l.form == SplitForm::kPairs || l.form == SplitForm::kLists) && l.unit_bytes > 0;
}

std::int64_t units_of(std::int64_t n, std::int64_t k) {
  return static_cast<std::int64_t>(ceil_div(n, kTileRows)) * (k / kUnitColumns);
}

// Scratch: what is kept | fours of each unit in both forms, then where its lists stand if
// elsewhere.
constexpr std::size_t kFoursAt = 128;
constexpr int kMostFours = kTileRows * kUnitColumns / 4;
// Entries elsewhere keep a warp waiting as long as so many bytes of weights would.
constexpr int kElsewhereCost = 8192;

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
  return kFoursAt + (units_of(n, k) + 1) * 8;
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
  cudaError_t error = cudaMemsetAsync(scratch, 0, kFoursAt, stream);
  if (error != cudaSuccess) return error;
  split_count_kernel<<<ceil_div(all, 8), 256, 0, stream>>>(
      static_cast<const unsigned short*>(dense), static_cast<int>(n), static_cast<int>(k),
      static_cast<int>(k / kUnitColumns), all, reinterpret_cast<uint2*>(base + kFoursAt),
      reinterpret_cast<unsigned long long*>(base));
  error = cudaGetLastError();
  std::vector<uint2> fours(all);
  unsigned long long kept = 0;
  if (error == cudaSuccess) {
    error = cudaMemcpyAsync(fours.data(), base + kFoursAt, all * sizeof(uint2),
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
  const bool pairs = l.form == SplitForm::kPairs;
  const auto fours_in = [&](std::int64_t i) { return pairs ? fours[i].x : fours[i].y; };

  // The size of a unit: what it adds to all of them against what is left to stand elsewhere.
  std::vector<std::int64_t> units_with(kMostFours + 1, 0);
  for (std::int64_t i = 0; i < all; ++i) ++units_with[fours_in(i)];
  const int least = pairs ? unit_bytes<true>(0) : unit_bytes<false>(0);
  std::int64_t best = -1, beyond = 0;
  for (int f = kMostFours; f >= 0; --f) {  // `beyond` units have more than f
    const int bytes =
        (least + f * kFourBytes + kUnitAlignment - 1) / kUnitAlignment * kUnitAlignment;
    const std::int64_t cost = all * bytes + beyond * kElsewhereCost;
    if (best < 0 || cost <= best) {
      best = cost;
      l.unit_bytes = bytes;
    }
    beyond += units_with[f];
  }
  std::vector<unsigned> elsewhere(all, 0);
  std::uint64_t end = static_cast<std::uint64_t>(all) * l.unit_bytes / 16;
  const int here = (l.unit_bytes - least) / kFourBytes;
  for (std::int64_t i = 0; i < all; ++i) {
    const int rest = fours_in(i) - here;
    if (rest <= 0) continue;
    elsewhere[i] = static_cast<unsigned>(end);
    end += 1 + rest;
    ++l.elsewhere;
  }
  if (end >= (1ull << 32)) return cudaErrorNotSupported;
  l.packed_bytes = end * 16;
  error = cudaMemcpyAsync(base + kFoursAt, elsewhere.data(), elsewhere.size() * 4,
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
  const cudaError_t error =
      cudaMemsetAsync(packed, 0, layout.packed_bytes, stream);  // the ends of units
  if (error != cudaSuccess) return error;
  const auto kernel =
      layout.form == SplitForm::kPairs ? split_pack_kernel<true> : split_pack_kernel<false>;
  kernel<<<ceil_div(all, 8), 256, 0, stream>>>(
      static_cast<const unsigned short*>(dense), static_cast<int>(layout.n),
      static_cast<int>(layout.k), static_cast<int>(layout.k / kUnitColumns), all, layout.unit_bytes,
      reinterpret_cast<const unsigned*>(static_cast<const unsigned char*>(scratch) + kFoursAt),
      static_cast<unsigned char*>(packed));
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
  const auto kernel =
      layout.form == SplitForm::kPairs ? split_unpack_kernel<true> : split_unpack_kernel<false>;
  kernel<<<ceil_div(all, kUnpackWarps), kUnpackWarps * 32, 0, stream>>>(
      static_cast<const unsigned char*>(packed), layout.unit_bytes, static_cast<int>(layout.n),
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
  p.weights = static_cast<const unsigned char*>(packed);
  p.unit_bytes = layout.unit_bytes;
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
