// The idea: tensor cores want whole fragments, and the memory of the chip is fast enough that few
// instructions may be spent on making them. So nothing is counted or searched: every kept value
// says where it stands in a fragment in shared memory, and a warp stores it there. A fragment is
// read once, and cleared by the lane that has read it. Where two of four columns or more are likely
// to be kept, most values need not even that: two of each group of four go to the sparse tensor
// cores as they lie (form kPairs), and only what is left, 19 % at half of all kept, 4 % at a fifth,
// is scattered, into fragments whose two places of a group are always columns 0 and 1: of three
// kept values one, of four two can be chosen to stand there. With fewer kept values all are
// scattered (form kList).
//
// Packed W: units of 16 rows x 128 columns, all of one size, ordered [row tile][unit along K]; then
// what found no place in its unit; then, where pruning has left rows of unlike lengths (and N is a
// multiple of 4), their
// order: fours of rows are dealt to the tiles until these are even, and y is stored by it.
//
//   unit, kPairs  |metadata 256|step 0: values 512|step 1|step 2|step 3|list|   as cuda_sm90_mma_sp
//   unit, kList   |list|
//
//   list    0           32      36    40                  40 + 8 F              40 + 12 F
//           +-----------+-------+-----+-------------------+---------------------+
//           | banks     | rest  |  -  | values            | places              |   F fours
//           | 1 byte a  |       |     | lane l, round r:  | 1 byte a value      |
//           | lane      |       |     | four 32 r + l     |                     |
//           +-----------+-------+-----+-------------------+---------------------+
//     place    | row of 128 bytes | bank behind the lane's | half |   kPairs 4 + 3 + 1 bits
//                                                                   kList  5 + 2 + 1 bits
//     rest     where the values stand that F fours have no room for, in 16 bytes from the start;
//              0: none. There: a count, then a value and its address in the tile each
//     Values are in the order of their banks, a lane's behind each other: a store of 32 lanes then
//     takes 1.9 turns, 3.5 if they lay anywhere. Spare slots hold a lane's last value again.
//
//   tile    [fragment][lane][4 words][2 values], as one 16-byte load a lane gives an operand:
//           kPairs 4 fragments of 32 columns (2 KB), kList 8 of 16 (4 KB)
//
// F is chosen for the matrix: what a larger one adds to every unit against what finds no place.
// How a block is made of consumers of weights and producers of x: kernels/cuda/sm90_stream.cuh.
//
// Bytes: 12 a four, 40 a unit; kPairs 2,304 more. 0.74 of dense at 50 % zeros, 0.67, 0.63 at 60 and
// 70 %, 0.34 at 80 % (kList), 0.19 at 90 %.
// A unit costs (two row tiles a warp, 16 tokens): kPairs 132 instructions and 56 turns of shared
// memory, kList at 80 % 203 and 115; a unit of dense bytes takes 241 cycles to read.
//
// What counts here, measured (bench/lab/cuda_linear_scatter has the tables):
// - All loads of one kind at one place in the code. Asking for a register's next value as soon as
// it
//   is free made waits for older loads wait for newer ones: up to 26 % slower.
// - Units of one size: with a table of their places the first weights waited for it, 0.5 us a
// kernel.
// - Weights straight into registers: 2 to 9 % faster than through a ring in shared memory, whose
//   turns decide.
// - More than 32 tokens: two row tiles a warp, seven warps; x from shared memory decides.
// Tried and lost: one pass over x for pairs and lists (2 to 9 % slower), all values in lists at 50
// to 70 % (0.93 to 1.23 of dense), slots given so that stores meet fewer banks (nothing to gain: a
// bank has more values than a lane has slots), units aligned to 128 bytes instead of 32 (equal).
#include "lacuna/kernels/linear_bitmap/cuda_sm90_scatter.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <initializer_list>
#include <numeric>
#include <utility>
#include <vector>

#include "lacuna/kernels/cuda/load_once.cuh"
#include "lacuna/kernels/cuda/own_layout.h"
#include "lacuna/kernels/cuda/sm90_device.h"
#include "lacuna/kernels/cuda/sm90_stream.cuh"
#include "lacuna/kernels/linear_bitmap/deal.h"

namespace lacuna::kernels::linear_bitmap {
namespace {

using cuda::Bf16;
using cuda::ceil_div;
using cuda::Fp16;
using cuda::kMaxCluster;
using cuda::kMaxSharedBytes;
using cuda::kTileRows;
using cuda::kUnitColumns;
using cuda::load_once1;
using cuda::load_once16;
using cuda::load_once4;
using cuda::load_once8;
using cuda::StreamParams;

constexpr int kFragmentBytes = 512;  // of 16 rows x 16 columns, or 2 of 4 of 32 columns
constexpr int kSteps = kUnitColumns / 32;
constexpr int kMetadataBytes = 256;
constexpr int kPairsBytes = kMetadataBytes + kSteps * kFragmentBytes;  // 2,304

// Metadata of a tile whose two values of a group stand at columns 0 and 1.
constexpr unsigned kFirstColumns = 0x44444444;

// What a form of units is made of. The tile is where a list is expanded.
template <bool kPairs>
struct Form {
  static constexpr int kListAt = kPairs ? kPairsBytes : 0;
  static constexpr int kTileBytes = (kPairs ? 1 : 2) * kSteps * kFragmentBytes;
  static constexpr int kRows = kTileBytes / 128;        // of 32 banks
  static constexpr int kBanks = kPairs ? 8 : 4;         // that a place of a lane can name
  static constexpr int kMostFours = kPairs ? 64 : 128;  // of a unit: two or four rounds of 32
  static_assert(kRows * kBanks * 2 == 256);             // a place is a byte
};

// Parts of a list.
constexpr int kRestAt = 32, kValuesAt = 40;
__host__ __device__ constexpr int places_at(int fours) { return kValuesAt + 8 * fours; }
template <bool kPairs>
__host__ __device__ constexpr int unit_bytes(int fours) {
  return (Form<kPairs>::kListAt + kValuesAt + 12 * fours + 31) / 32 * 32;
}

// Fours that a lane holds.
__host__ __device__ constexpr int rounds_of(int fours, int lane) {
  return (fours - lane + 31) / 32;
}

__device__ __forceinline__ void store_shared_half(unsigned address, unsigned v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<unsigned short>(v))
               : "memory");
}

__device__ __forceinline__ void clear_shared4(unsigned address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

// Writes four values to their places. `bank`: address of the lane's first bank. A place is a row of
// 128 bytes in its upper bits and a half word behind `bank` in its lower ones: a dot product of
// bytes.
template <bool kPairs>
__device__ __forceinline__ void scatter(unsigned bank, uint2 values, unsigned places) {
  constexpr unsigned mask = kPairs ? 0x0ff00ff0 : 0x07f807f8;
  constexpr unsigned factors = kPairs ? 0x0208 : 0x0210;
  const unsigned low = __byte_perm(places, 0, 0x1100) & mask;
  const unsigned high = __byte_perm(places, 0, 0x3322) & mask;
  store_shared_half(__dp4a(low, factors, bank), values.x);
  store_shared_half(__dp4a(low, factors << 16, bank), values.x >> 16);
  store_shared_half(__dp4a(high, factors, bank), values.y);
  store_shared_half(__dp4a(high, factors << 16, bank), values.y >> 16);
}

// Values that found no place in their unit: a count, then a value and its address in the tile each.
__device__ __noinline__ void scatter_rest(const unsigned* rest, unsigned tile, int lane) {
  const unsigned count = rest[0];
  for (unsigned i = lane; i < count; i += 32) {
    store_shared_half(tile + (rest[4 + i] >> 16), rest[4 + i]);
  }
}

// The weights of sm90_stream.cuh, for lists of up to 32 kRounds fours. All of the next unit is on
// its way to registers while one is multiplied.
template <class Half_, bool kPairs, int kRounds>
struct Scattered {
  using Half = Half_;
  static constexpr bool kAnyColumns = true;
  static constexpr bool kOrdered = true;
  static constexpr bool kScaled = false;
  static constexpr int kTileBytes = Form<kPairs>::kTileBytes;

  // Registers are given out four warps at a time: 8 warps leave 255 a thread, 12 168, 16 128, 20
  // 96, 24 80.
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    const int registers = 40 + 4 * token_tiles * tiles_per_warp + 4 * token_tiles +
                          (16 + 3 * kRounds + (kPairs ? 12 : 0)) * tiles_per_warp;
    return registers <= 84    ? 23
           : registers <= 98  ? 19
           : registers <= 132 ? 15
           : registers <= 172 ? 11
                              : 7;
  }

  template <int MT>
  struct Reader {
    const StreamParams& p;
    const cuda::StreamSlice s;
    const unsigned tile;             // zero before and after
    const unsigned char* units[MT];  // from the first unit on
    // Of the unit loaded last:
    uint2 values[MT][kRounds];
    unsigned places[MT][kRounds], bank[MT], rest[MT];
    uint4 pairs[MT][kSteps];
    uint2 metadata[MT];

    __device__ __forceinline__ Reader(const StreamParams& params, const cuda::StreamSlice& slice,
                                      unsigned shared_base)
        : p(params),
          s(slice),
          tile(shared_base + params.scratch_offset + slice.warp * MT * kTileBytes) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        // A tile past the end repeats the last one: its sums are never stored.
        const std::size_t row = min(s.first_tile + m, p.row_tiles - 1);
        units[m] = p.weights + (row * p.units + s.first) * p.unit_bytes;
      }
    }

    __device__ __forceinline__ const unsigned char* unit_at(int m, int unit) const {
      return units[m] + static_cast<unsigned>(unit * p.unit_bytes);
    }

    // All loads of a kind are asked for at one place: the few scoreboards of a warp make a wait for
    // one of them a wait for those that were asked for after it as well.
    __device__ __forceinline__ void load_lists(int unit) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned char* list = unit_at(m, unit) + Form<kPairs>::kListAt;
        const unsigned char* value = list + kValuesAt + static_cast<unsigned>(8 * s.lane);
        const unsigned char* place =
            list + kValuesAt + static_cast<unsigned>(8 * p.fours + 4 * s.lane);
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (32 * r + s.lane < p.fours) {
            values[m][r] = load_once8(value + 256 * r);
            places[m][r] = load_once4(place + 128 * r);
          }
        }
        bank[m] = load_once1(list + static_cast<unsigned>(s.lane));
        rest[m] = load_once4(list + kRestAt);
      }
    }

    __device__ __forceinline__ void load_pairs(int unit) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned char* from = unit_at(m, unit);
        metadata[m] = load_once8(from + static_cast<unsigned>(8 * s.lane));
        from += kMetadataBytes + static_cast<unsigned>(16 * s.lane);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          pairs[m][step] = load_once16(from + step * kFragmentBytes);
        }
      }
    }

    __device__ __forceinline__ void start() {
      if (s.own > 0) {
        if constexpr (kPairs) load_pairs(0);
        load_lists(0);
      }
#pragma unroll 1
      for (int i = s.lane * 16; i < MT * kTileBytes; i += 512) clear_shared4(tile + i);
    }

    // Expands the lists loaded last.
    __device__ __forceinline__ void expand() {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const unsigned to = tile + m * kTileBytes + 4 * bank[m];
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (32 * r + s.lane < p.fours) scatter<kPairs>(to, values[m][r], places[m][r]);
        }
        if (rest[m] != 0) {
          scatter_rest(
              reinterpret_cast<const unsigned*>(p.weights) + static_cast<std::size_t>(rest[m]) * 4,
              tile + m * kTileBytes, s.lane);
        }
      }
      __syncwarp();
    }

    static constexpr int kFragments = kPairs ? 1 : 2;  // of a step of 32 columns
    struct Step {
      uint4 a[MT][kFragments];
    };

    // Loads what the lists hold of a step, and clears it.
    __device__ __forceinline__ void load_step(int step, Step& to) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < kFragments; ++i) {
          const unsigned from =
              tile + m * kTileBytes + (kFragments * step + i) * kFragmentBytes + s.lane * 16;
          to.a[m][i] = cuda::load_shared4(from);
          clear_shared4(from);
        }
      }
    }

    template <int NT>
    __device__ __forceinline__ void load_x(unsigned x, unsigned x_stride, int step,
                                           uint4 (&fragments)[NT]) {
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        fragments[j] = cuda::load_matrices(x + j * 8 * x_stride + step * 64);
      }
    }

    // Multiplies a round of units, while the next ones come.
    template <int NT, class Wait>
    __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], int round, unsigned x,
                                             unsigned x_stride, const Wait& wait_for_x) {
      const int units_here = min(p.stage_units, s.own - round);
#pragma unroll 1
      for (int u = 0; u < units_here; ++u) {
        const int next = u + 1 < units_here ? round + u + 1 : round + s.span;
        const unsigned b = x + u * (2 * kUnitColumns);
        uint4 fragments[NT];
        if constexpr (kPairs) {
          if (u == 0) wait_for_x();
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            load_x(b, x_stride, step, fragments);
#pragma unroll
            for (int j = 0; j < NT; ++j) {
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                const unsigned e = step < 2 ? metadata[m].x : metadata[m].y;
                if (step % 2 == 0) {
                  Half::template multiply_sparse<0>(sums[m][j], pairs[m][step], fragments[j], e);
                } else {
                  Half::template multiply_sparse<1>(sums[m][j], pairs[m][step], fragments[j], e);
                }
              }
            }
          }
          if (next < s.own) load_pairs(next);
        }
        expand();
        if (next < s.own) load_lists(next);
        if (!kPairs && u == 0) wait_for_x();
        Step steps[2];
        load_step(0, steps[0]);
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          load_x(b, x_stride, step, fragments);
          if (step + 1 < kSteps) load_step(step + 1, steps[(step + 1) % 2]);
          const Step& a = steps[step % 2];
#pragma unroll
          for (int i = 0; i < kFragments; ++i) {
#pragma unroll
            for (int j = 0; j < NT; ++j) {
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                if constexpr (kPairs) {
                  Half::template multiply_sparse<0>(sums[m][j], a.a[m][i], fragments[j],
                                                    kFirstColumns);
                } else {
                  Half::multiply(sums[m][j], a.a[m][i], i == 0 ? fragments[j].x : fragments[j].z,
                                 i == 0 ? fragments[j].y : fragments[j].w);
                }
              }
            }
          }
        }
        __syncwarp();
      }
    }

    __device__ __forceinline__ void start_rest() {}
    __device__ __forceinline__ void next(int) {}
  };
};

// ---------- packing ----------

// W [n,k], whose rows are packed in another order, or their own.
struct Dense {
  const unsigned short* at;
  int n, k;
  const int* fours;  // where each four rows come from, in fours; -1: none; null: as they lie

  // Of the packed row: where it stands in W; n or more: nowhere.
  __device__ __forceinline__ int row(int packed) const {
    if (fours == nullptr) return packed;
    const int four = fours[packed >> 2];
    return four < 0 ? n : 4 * four + (packed & 3);
  }
  __device__ __forceinline__ const unsigned short* address(int row, int column) const {
    return at + static_cast<std::size_t>(row) * k + column;
  }
};

// Four weights of a packed row from `column` on; zeros beyond W, and for -0.0.
__device__ __forceinline__ void load_group(const Dense& dense, int packed_row, int column,
                                           unsigned (&v)[4]) {
  uint2 word = make_uint2(0, 0);
  const int row = dense.row(packed_row);
  if (row < dense.n && column < dense.k) {
    word = *reinterpret_cast<const uint2*>(dense.address(row, column));
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

// What a group of form kPairs leaves to the list: the first of three, the first two of four, which
// stand at columns 0 and 1 in any case.
__device__ __forceinline__ void listed_of(const unsigned (&v)[4], unsigned (&listed)[2]) {
  const int kept = (v[0] != 0) + (v[1] != 0) + (v[2] != 0) + (v[3] != 0);
  listed[0] = kept >= 3 ? v[0] : 0;
  listed[1] = kept == 4 || (kept == 3 && v[0] == 0) ? v[1] : 0;
}

// The two values of a group that it does not leave (low half first) and their 4 bits of columns.
__device__ __forceinline__ unsigned paired_of(const unsigned (&v)[4], unsigned* values) {
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
  if (second < 0) {  // The partner is a zero: any column that keeps the order.
    second = 3;
    if (first == 3) first = 0;
  }
  const unsigned low = first == 0 ? left[0] : first == 1 ? left[1] : left[2];
  const unsigned high = second == 1 ? left[1] : second == 2 ? left[2] : left[3];
  *values = low | high << 16;
  return first | second << 2;
}

// A warp's view of the list of one unit: the values in it and their addresses in the tile, in the
// order of the banks of shared memory that they stand in.
struct Entries {
  int total;
  int before;  // entries in the banks before bank `lane`
  bool some;   // in bank `lane`
};

// The values that stand in words b + 32 w, w = 0..3, of fragment f of the tile; b = lane.
template <bool kPairs>
__device__ __forceinline__ void fragment_entries(const Dense& dense, int row0, int column0, int f,
                                                 int lane, unsigned (&values)[8]) {
  const int row = row0 + (lane >> 4) + 8 * (lane & 1);
  const int t = lane >> 2 & 3, right = lane >> 1 & 1;
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    if constexpr (kPairs) {
      unsigned v[4], listed[2];
      load_group(dense, row + 2 * w, column0 + 32 * f + 4 * t + 16 * right, v);
      listed_of(v, listed);
      values[2 * w] = listed[0];
      values[2 * w + 1] = listed[1];
    } else {
      const int r = dense.row(row + 2 * w), column = column0 + 16 * f + 2 * t + 8 * right;
      unsigned word = 0;
      if (r < dense.n && column < dense.k) {
        word = *reinterpret_cast<const unsigned*>(dense.address(r, column));
      }
      values[2 * w] = word & 0x7fff ? word & 0xffff : 0;  // without -0.0
      values[2 * w + 1] = word & 0x7fff0000 ? word >> 16 : 0;
    }
  }
}

// Lane b collects bank b. `to`: all entries of a warp, in shared memory; null: counts alone.
template <bool kPairs>
__device__ __forceinline__ Entries collect_entries(const Dense& dense, std::int64_t unit, int units,
                                                   unsigned* to) {
  const int lane = threadIdx.x & 31;
  const int row0 = static_cast<int>(unit / units) * kTileRows;
  const int column0 = static_cast<int>(unit % units) * kUnitColumns;
  unsigned values[8];
  int count = 0;
#pragma unroll 1
  for (int f = 0; f < Form<kPairs>::kTileBytes / kFragmentBytes; ++f) {
    fragment_entries<kPairs>(dense, row0, column0, f, lane, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) count += values[i] != 0;
  }
  int at = count;
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const int other = __shfl_up_sync(~0u, at, d);
    if (lane >= d) at += other;
  }
  const Entries e = {__shfl_sync(~0u, at, 31), at - count, count > 0};
  if (to == nullptr) return e;
  at -= count;
#pragma unroll 1
  for (int f = 0; f < Form<kPairs>::kTileBytes / kFragmentBytes; ++f) {
    fragment_entries<kPairs>(dense, row0, column0, f, lane, values);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      if (values[i] == 0) continue;
      to[at++] = values[i] | (f * kFragmentBytes + 4 * (lane + 32 * (i / 2)) + 2 * (i % 2)) << 16;
    }
  }
  __syncwarp();
  return e;
}

// Which entries a lane gets: consecutive ones, as many as it has slots, of as many banks as a place
// can name.
struct Share {
  int first, count;
  int placed;  // of all lanes
};

template <bool kPairs>
__device__ __forceinline__ Share share_of(const Entries& e, int fours) {
  constexpr int kBanks = Form<kPairs>::kBanks;
  const int lane = threadIdx.x & 31;
  Share share = {0, 0, 0};
#pragma unroll 1
  for (int l = 0; l < 32; ++l) {
    const int i = share.placed;
    const int bank = 31 - __clz(__ballot_sync(~0u, e.some && e.before <= i));
    const int beyond = __shfl_sync(~0u, e.before, min(bank + kBanks, 31));
    const int last = min(bank < 32 - kBanks ? beyond : e.total, i + 4 * rounds_of(fours, l));
    const int end = i < e.total ? last : i;
    if (l == lane) {
      share.first = i;
      share.count = end - i;
    }
    share.placed = end;
  }
  return share;
}

constexpr int kPackWarps = 4;
constexpr int kUnitValues = kTileRows * kUnitColumns;

struct PackParams {
  Dense dense;
  int units, fours, unit_bytes;
  std::int64_t all;  // units
  // Of each unit: entries of its list in form kPairs and in form kList; then (x alone) entries that
  // find no place; then where these stand.
  uint2* numbers;
  unsigned char* packed;
};

__device__ __forceinline__ std::int64_t unit_of_warp() {
  return static_cast<std::int64_t>(blockIdx.x) * kPackWarps + (threadIdx.x >> 5);
}

// What four rows of W, as they lie, bring to their tile: entries of its lists in both forms. One
// warp each.
__global__ void __launch_bounds__(kPackWarps * 32)
    scatter_fours_kernel(const Dense dense, int fours, uint2* numbers) {
  const std::int64_t four = unit_of_warp();
  if (four >= fours) return;
  const int lane = threadIdx.x & 31;
  int pairs = 0, list = 0;
  for (int i = 0; i < 4; ++i) {
    for (int column = 4 * lane; column < dense.k; column += 128) {
      unsigned v[4];
      load_group(dense, static_cast<int>(four) * 4 + i, column, v);
      const int kept = (v[0] != 0) + (v[1] != 0) + (v[2] != 0) + (v[3] != 0);
      pairs += max(kept - 2, 0);
      list += kept;
    }
  }
  pairs = __reduce_add_sync(~0u, pairs);
  list = __reduce_add_sync(~0u, list);
  if (lane == 0) numbers[four] = make_uint2(pairs, list);
}

// One warp a unit, in all of these.
__global__ void __launch_bounds__(kPackWarps * 32) scatter_count_kernel(const PackParams p) {
  const std::int64_t unit = unit_of_warp();
  if (unit >= p.all) return;
  const Entries pairs = collect_entries<true>(p.dense, unit, p.units, nullptr);
  const Entries list = collect_entries<false>(p.dense, unit, p.units, nullptr);
  if (threadIdx.x % 32 == 0) p.numbers[unit] = make_uint2(pairs.total, list.total);
}

template <bool kPairs>
__global__ void __launch_bounds__(kPackWarps * 32) scatter_rest_kernel(const PackParams p) {
  const std::int64_t unit = unit_of_warp();
  if (unit >= p.all) return;
  const Entries e = collect_entries<kPairs>(p.dense, unit, p.units, nullptr);
  const Share share = share_of<kPairs>(e, p.fours);
  if (threadIdx.x % 32 == 0) p.numbers[unit].x = e.total - share.placed;
}

// A lane writes its own fragments and its metadata.
__device__ __forceinline__ void pack_pairs(const PackParams& p, std::int64_t unit,
                                           unsigned char* to) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const int row = static_cast<int>(unit / p.units) * kTileRows + g;
  const int column0 = static_cast<int>(unit % p.units) * kUnitColumns;
  unsigned v[4], values;
#pragma unroll 1
  for (int step = 0; step < kSteps; ++step) {
    unsigned a[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      load_group(p.dense, row + 8 * (i & 1), column0 + 32 * step + 4 * t + 16 * (i >> 1), v);
      paired_of(v, &a[i]);
    }
    *reinterpret_cast<uint4*>(to + kMetadataBytes + step * kFragmentBytes + lane * 16) =
        make_uint4(a[0], a[1], a[2], a[3]);
  }
  unsigned metadata[2];
#pragma unroll
  for (int word = 0; word < 2; ++word) {
    metadata[word] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      load_group(p.dense, row + 8 * (i / 4),
                 column0 + 32 * (2 * word + t / 2) + 16 * (t % 2) + 4 * (i % 4), v);
      metadata[word] |= paired_of(v, &values) << (4 * i);
    }
  }
  *reinterpret_cast<uint2*>(to + lane * 8) = make_uint2(metadata[0], metadata[1]);
}

template <bool kPairs>
__global__ void __launch_bounds__(kPackWarps * 32) scatter_pack_kernel(const PackParams p) {
  __shared__ unsigned all_entries[kPackWarps][kUnitValues];
  const int lane = threadIdx.x & 31;
  const std::int64_t unit = unit_of_warp();
  if (unit >= p.all) return;
  unsigned* const entries = all_entries[threadIdx.x >> 5];
  const Entries e = collect_entries<kPairs>(p.dense, unit, p.units, entries);
  const Share share = share_of<kPairs>(e, p.fours);
  unsigned char* to = p.packed + unit * p.unit_bytes;
  if constexpr (kPairs) pack_pairs(p, unit, to);
  to += Form<kPairs>::kListAt;
  // A lane with slots to spare writes its last entry again, a lane without entries the one before.
  const int first = share.count > 0 ? share.first : max(share.first - 1, 0);
  const int last = max(share.first + share.count - 1, first);
  const int bank = e.total > 0 ? entries[first] >> 18 & 31 : 0;
  to[lane] = bank;
  for (int r = 0; r < rounds_of(p.fours, lane); ++r) {
    unsigned value[4] = {}, places = 0;
    for (int i = 0; i < 4 && e.total > 0; ++i) {
      const unsigned entry = entries[min(first + 4 * r + i, last)];
      value[i] = entry & 0xffff;
      const unsigned row = entry >> 23, word = (entry >> 18 & 31) - bank, half = entry >> 17 & 1;
      places |= (row * (2 * Form<kPairs>::kBanks) | word << 1 | half) << (8 * i);
    }
    const int four = 32 * r + lane;
    *reinterpret_cast<uint2*>(to + kValuesAt + 8 * four) =
        make_uint2(value[0] | value[1] << 16, value[2] | value[3] << 16);
    *reinterpret_cast<unsigned*>(to + places_at(p.fours) + 4 * four) = places;
  }
  const unsigned rest = p.numbers[unit].x;
  if (lane == 0) *reinterpret_cast<unsigned*>(to + kRestAt) = rest;
  if (rest != 0) {
    unsigned* const words =
        reinterpret_cast<unsigned*>(p.packed + static_cast<std::size_t>(rest) * 16);
    if (lane == 0) words[0] = e.total - share.placed;
    for (int i = share.placed + lane; i < e.total; i += 32)
      words[4 + i - share.placed] = entries[i];
  }
}

// Unpacks through a tile in shared memory.
template <bool kPairs>
__global__ void __launch_bounds__(kPackWarps * 32)
    scatter_unpack_kernel(const PackParams p, unsigned short* dense) {
  __shared__ uint2 tiles[kPackWarps][kTileRows][kUnitColumns / 4];
  const int lane = threadIdx.x & 31;
  const std::int64_t unit = unit_of_warp();
  if (unit >= p.all) return;
  const auto tile = tiles[threadIdx.x >> 5];
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) tile[row][lane] = make_uint2(0, 0);
  __syncwarp();
  const auto at = [&](int row, int column) {
    return reinterpret_cast<unsigned short*>(&tile[row][0]) + column;
  };
  const unsigned char* from = p.packed + unit * p.unit_bytes;
  if constexpr (kPairs) {
    const int g = lane >> 2, t = lane & 3;
    const uint2 metadata = *reinterpret_cast<const uint2*>(from + lane * 8);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 word = *reinterpret_cast<const uint4*>(from + kMetadataBytes +
                                                         step * kFragmentBytes + lane * 16);
      const unsigned values[4] = {word.x, word.y, word.z, word.w};
#pragma unroll
      for (int half = 0; half < 2; ++half) {  // columns 0..15 and 16..31 of the step
        // The columns of a group lie in the metadata of the lane that mma.sp takes them from.
        const unsigned columns =
            __shfl_sync(~0u, step < 2 ? metadata.x : metadata.y, 4 * g + 2 * (step % 2) + half);
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // rows g and g + 8
          const unsigned column = columns >> (16 * i + 4 * t);
          unsigned short* group = at(g + 8 * i, 32 * step + 16 * half + 4 * t);
          group[column & 3] = values[2 * half + i] & 0xffff;
          group[column >> 2 & 3] = values[2 * half + i] >> 16;
        }
      }
    }
    __syncwarp();
  }
  const auto put = [&](unsigned value, unsigned address) {
    const int word = address >> 2 & 127, f = address / kFragmentBytes, half = address >> 1 & 1;
    const int t = word >> 2 & 3, right = word >> 1 & 1;
    const int column =
        kPairs ? 32 * f + 4 * t + 16 * right + half : 16 * f + 2 * t + 8 * right + half;
    *at((word >> 4) + 8 * (word & 1), column) = value;
  };
  from += Form<kPairs>::kListAt;
  const unsigned bank = from[lane];
  for (int r = 0; r < rounds_of(p.fours, lane); ++r) {
    const int four = 32 * r + lane;
    for (int i = 0; i < 4; ++i) {
      const unsigned place = from[places_at(p.fours) + 4 * four + i];
      const unsigned value =
          reinterpret_cast<const unsigned short*>(from + kValuesAt)[4 * four + i];
      constexpr unsigned kHalves = 2 * Form<kPairs>::kBanks;
      if (value != 0) put(value, place / kHalves * 128 + bank * 4 + place % kHalves * 2);
    }
  }
  if (const unsigned rest = *reinterpret_cast<const unsigned*>(from + kRestAt)) {
    const unsigned* words =
        reinterpret_cast<const unsigned*>(p.packed + static_cast<std::size_t>(rest) * 16);
    for (unsigned i = lane; i < words[0]; i += 32) put(words[4 + i] & 0xffff, words[4 + i] >> 16);
  }
  __syncwarp();
  const int row0 = static_cast<int>(unit / p.units) * kTileRows;
  const int column = static_cast<int>(unit % p.units) * kUnitColumns + 4 * lane;
  for (int i = 0; i < kTileRows && column < p.dense.k; ++i) {
    const int row = p.dense.row(row0 + i);
    if (row < p.dense.n) {
      *reinterpret_cast<uint2*>(dense + static_cast<std::size_t>(row) * p.dense.k + column) =
          tile[i][lane];
    }
  }
}

// ---------- host ----------

template <class Weights>
cuda::StreamKernel weights_kernel(int token_tiles, int tiles_per_warp) {
  switch (token_tiles * 16 + tiles_per_warp) {
    case 1 * 16 + 1:
      return cuda::stream_kernel<Weights, 1, 1>;
    case 1 * 16 + 2:
      return cuda::stream_kernel<Weights, 1, 2>;
    case 2 * 16 + 1:
      return cuda::stream_kernel<Weights, 2, 1>;
    case 2 * 16 + 2:
      return cuda::stream_kernel<Weights, 2, 2>;
    case 4 * 16 + 1:
      return cuda::stream_kernel<Weights, 4, 1>;
    case 4 * 16 + 2:
      return cuda::stream_kernel<Weights, 4, 2>;
    case 8 * 16 + 1:
      return cuda::stream_kernel<Weights, 8, 1>;
    case 8 * 16 + 2:
      return cuda::stream_kernel<Weights, 8, 2>;
    default:
      return nullptr;
  }
}

// Of the kernels for pairs and lists of up to one and two rounds, for lists of up to two and four.
int kind_of(const ScatterLayout& l) {
  return l.form == ScatterForm::kPairs ? (l.fours <= 32 ? 0 : 1) : (l.fours <= 64 ? 2 : 3);
}

template <class Half>
cuda::StreamKernel find_kernel(const ScatterLayout& l, int token_tiles, int tiles_per_warp) {
  switch (kind_of(l)) {
    case 0:
      return weights_kernel<Scattered<Half, true, 1>>(token_tiles, tiles_per_warp);
    case 1:
      return weights_kernel<Scattered<Half, true, 2>>(token_tiles, tiles_per_warp);
    case 2:
      return weights_kernel<Scattered<Half, false, 2>>(token_tiles, tiles_per_warp);
    default:
      return weights_kernel<Scattered<Half, false, 4>>(token_tiles, tiles_per_warp);
  }
}

int max_warps(const ScatterLayout& l, int token_tiles, int tiles_per_warp) {
  switch (kind_of(l)) {
    case 0:
      return Scattered<Bf16, true, 1>::max_warps(token_tiles, tiles_per_warp);
    case 1:
      return Scattered<Bf16, true, 2>::max_warps(token_tiles, tiles_per_warp);
    case 2:
      return Scattered<Bf16, false, 2>::max_warps(token_tiles, tiles_per_warp);
    default:
      return Scattered<Bf16, false, 4>::max_warps(token_tiles, tiles_per_warp);
  }
}

bool pairs_in(const ScatterLayout& l) { return l.form == ScatterForm::kPairs; }

int bytes_of_unit(const ScatterLayout& l, int fours) {
  return pairs_in(l) ? unit_bytes<true>(fours) : unit_bytes<false>(fours);
}

int most_fours(const ScatterLayout& l) {
  return pairs_in(l) ? Form<true>::kMostFours : Form<false>::kMostFours;
}

cuda::StreamShared shared_of(const ScatterLayout& l, const ScatterPlan& plan) {
  return cuda::stream_shared(plan, 0,
                             pairs_in(l) ? Form<true>::kTileBytes : Form<false>::kTileBytes);
}

bool layout_ok(const ScatterLayout& l) {
  return scatter_shape_refusal(l.n, l.k, 1) == nullptr &&
         (l.form == ScatterForm::kPairs || l.form == ScatterForm::kList) && l.fours >= 1 &&
         l.fours <= most_fours(l);
}

std::int64_t units_of(std::int64_t n, std::int64_t k) {
  return static_cast<std::int64_t>(ceil_div(n, kTileRows)) * ceil_div(k, kUnitColumns);
}

PackParams pack_params(const ScatterLayout& l) {
  PackParams p = {};
  p.dense.n = static_cast<int>(l.n);
  p.dense.k = static_cast<int>(l.k);
  p.units = ceil_div(l.k, kUnitColumns);
  p.fours = l.fours;
  p.unit_bytes = bytes_of_unit(l, l.fours);
  p.all = units_of(l.n, l.k);
  return p;
}

// Values without a place keep a warp waiting as long as so many bytes of weights would.
constexpr int kRestCost = 4096;
// Share of kept values from which pairs are faster than a list of all.
constexpr double kPairsFrom = 0.22;

// The order of the rows of a packed W, or null.
const int* order_of(const ScatterLayout& l, const void* packed) {
  const auto* const bytes = static_cast<const unsigned char*>(packed);
  return l.order_at > 0 ? reinterpret_cast<const int*>(bytes + l.order_at) : nullptr;
}

// Row tiles that need this much more than the mean are worth another order of the rows.
constexpr double kUneven = 1.05;

// Which fours of rows share a tile: those that bring most go first, each to the tile that has least
// so far. Empty where the tiles are even as the rows lie.
std::vector<int> dealt_fours(const std::vector<uint2>& fours, int tiles, bool pairs) {
  constexpr int kOfATile = kTileRows / 4;
  const auto brings = [&](int four) -> std::int64_t {
    return pairs ? fours[four].x : fours[four].y;
  };
  const auto count = static_cast<int>(fours.size());
  std::int64_t all = 0, most = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    std::int64_t here = 0;
    for (int i = tile * kOfATile; i < std::min((tile + 1) * kOfATile, count); ++i)
      here += brings(i);
    all += here;
    most = std::max(most, here);
  }
  if (static_cast<double>(most) * tiles <= kUneven * static_cast<double>(all)) return {};
  std::vector<int> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return brings(a) > brings(b); });
  const auto shared_out = deal(count, tiles, kOfATile, [&](int i) { return brings(order[i]); });
  std::vector<int> dealt(static_cast<std::size_t>(tiles) * kOfATile, -1);
  for (int tile = 0; tile < tiles; ++tile)
    for (std::size_t i = 0; i < shared_out[tile].size(); ++i)
      dealt[static_cast<std::size_t>(tile) * kOfATile + i] = order[shared_out[tile][i]];
  return dealt;
}

// The scratch: numbers of units, later those of fours; then the order of the fours.
std::size_t order_at(std::int64_t n, std::int64_t k) {
  const auto numbers = std::max<std::int64_t>(units_of(n, k), (n + 3) / 4);
  return static_cast<std::size_t>(numbers) * sizeof(uint2);
}
std::size_t order_bytes(std::int64_t n) {
  return static_cast<std::size_t>(ceil_div(n, kTileRows)) * (kTileRows / 4) * sizeof(int);
}

}  // namespace

const char* scatter_refusal(std::int64_t n, std::int64_t k, int t, int device) {
  if (const char* reason = scatter_shape_refusal(n, k, t)) return reason;
  return cuda::sm90_refusal(device);
}

std::size_t scatter_scratch_bytes(std::int64_t n, std::int64_t k) {
  return order_at(n, k) + order_bytes(n);
}

cudaError_t scatter_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                            ScatterLayout* layout, cudaStream_t stream) {
  if (scatter_shape_refusal(n, k, 1) != nullptr || dense == nullptr || scratch == nullptr ||
      layout == nullptr || layout->fours < 0 || reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(scratch) % 8 != 0) {
    return cudaErrorInvalidValue;
  }
  ScatterLayout l;
  l.n = n;
  l.k = k;
  l.form = layout->form;
  PackParams p = pack_params(l);
  p.dense.at = static_cast<const unsigned short*>(dense);
  p.numbers = static_cast<uint2*>(scratch);
  std::vector<uint2> numbers;
  const auto fetch = [&](std::int64_t count) -> cudaError_t {
    numbers.resize(count);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(numbers.data(), scratch, count * sizeof(uint2),
                              cudaMemcpyDeviceToHost, stream);
    }
    return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
  };
  const auto run = [&](void (*kernel)(PackParams)) -> cudaError_t {
    kernel<<<ceil_div(p.all, kPackWarps), kPackWarps * 32, 0, stream>>>(p);
    return fetch(p.all);
  };
  const int fours = ceil_div(n, 4);
  scatter_fours_kernel<<<ceil_div(fours, kPackWarps), kPackWarps * 32, 0, stream>>>(p.dense, fours,
                                                                                    p.numbers);
  cudaError_t error = fetch(fours);
  if (error != cudaSuccess) return error;
  for (const uint2& number : numbers) l.kept += number.y;
  if (l.form == ScatterForm::kChoose) {
    l.form = l.kept > kPairsFrom * n * k ? ScatterForm::kPairs : ScatterForm::kList;
  }
  // (Fours of y leave together only where all of them are whole.)
  std::vector<int> order;
  if (n % 4 == 0) order = dealt_fours(numbers, ceil_div(n, kTileRows), pairs_in(l));
  if (!order.empty()) {
    auto* const to = static_cast<unsigned char*>(scratch) + order_at(n, k);
    error = cudaMemcpyAsync(to, order.data(), order_bytes(n), cudaMemcpyHostToDevice, stream);
    if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
    if (error != cudaSuccess) return error;
    p.dense.fours = reinterpret_cast<const int*>(to);
  }
  error = run(scatter_count_kernel);
  if (error != cudaSuccess) return error;

  // The size of a unit: what it adds to all of them against what is left to stand elsewhere.
  std::vector<std::int64_t> units_with(kUnitValues / 4 + 1, 0);
  for (const uint2& number : numbers) ++units_with[((pairs_in(l) ? number.x : number.y) + 3) / 4];
  std::int64_t best = -1, beyond = 0;
  for (int fours = kUnitValues / 4; fours >= 1; --fours) {  // `beyond` units have more
    const std::int64_t cost = p.all * bytes_of_unit(l, fours) + beyond * kRestCost;
    if (fours <= most_fours(l) && (best < 0 || cost <= best)) {
      best = cost;
      l.fours = fours;
    }
    beyond += units_with[fours];
  }
  if (layout->fours > 0) l.fours = std::min(layout->fours, most_fours(l));

  p.fours = l.fours;
  error = run(pairs_in(l) ? scatter_rest_kernel<true> : scatter_rest_kernel<false>);
  if (error != cudaSuccess) return error;
  std::uint64_t end = static_cast<std::uint64_t>(p.all) * bytes_of_unit(l, l.fours) / 16;
  for (uint2& number : numbers) {
    if (number.x == 0) continue;
    const unsigned rest = number.x;
    number.x = static_cast<unsigned>(end);
    end += 1 + (rest + 3) / 4;
    ++l.elsewhere;
  }
  if (!order.empty()) {
    l.order_at = end * 16;
    end += (order_bytes(n) + 15) / 16;
  }
  if (end >= (1ull << 32)) return cudaErrorNotSupported;
  l.packed_bytes = end * 16;
  error = cudaMemcpyAsync(scratch, numbers.data(), p.all * sizeof(uint2), cudaMemcpyHostToDevice,
                          stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) *layout = l;
  return error;
}

cudaError_t scatter_pack(const void* dense, const void* scratch, const ScatterLayout& layout,
                         void* packed, cudaStream_t stream) {
  if (!layout_ok(layout) || dense == nullptr || scratch == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  cudaError_t error = cudaMemsetAsync(packed, 0, layout.packed_bytes, stream);  // gaps of parts
  if (error != cudaSuccess) return error;
  PackParams p = pack_params(layout);
  p.dense.at = static_cast<const unsigned short*>(dense);
  p.numbers = const_cast<uint2*>(static_cast<const uint2*>(scratch));
  p.packed = static_cast<unsigned char*>(packed);
  if (layout.order_at > 0) {
    const auto* const order =
        static_cast<const unsigned char*>(scratch) + order_at(layout.n, layout.k);
    p.dense.fours = reinterpret_cast<const int*>(order);
    error = cudaMemcpyAsync(p.packed + layout.order_at, order, order_bytes(layout.n),
                            cudaMemcpyDeviceToDevice, stream);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = pairs_in(layout) ? scatter_pack_kernel<true> : scatter_pack_kernel<false>;
  kernel<<<ceil_div(p.all, kPackWarps), kPackWarps * 32, 0, stream>>>(p);
  return cudaGetLastError();
}

cudaError_t scatter_unpack(const void* packed, const ScatterLayout& layout, void* dense,
                           cudaStream_t stream) {
  if (!layout_ok(layout) || dense == nullptr || packed == nullptr ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0) {
    return cudaErrorInvalidValue;
  }
  PackParams p = pack_params(layout);
  p.packed = const_cast<unsigned char*>(static_cast<const unsigned char*>(packed));
  p.dense.fours = order_of(layout, packed);
  const auto kernel = pairs_in(layout) ? scatter_unpack_kernel<true> : scatter_unpack_kernel<false>;
  kernel<<<ceil_div(p.all, kPackWarps), kPackWarps * 32, 0, stream>>>(
      p, static_cast<unsigned short*>(dense));
  return cudaGetLastError();
}

std::size_t scatter_shared_bytes(const ScatterLayout& layout, const ScatterPlan& plan) {
  if (find_kernel<Bf16>(layout, plan.token_tiles, plan.tiles_per_warp) == nullptr ||
      !cuda::stream_plan_ok(plan, max_warps(layout, plan.token_tiles, plan.tiles_per_warp)) ||
      plan.stages != 0) {
    return 0;
  }
  return shared_of(layout, plan).bytes;
}

cudaError_t scatter_plan(const ScatterLayout& layout, int t, ScatterPlan* plan) {
  if (!layout_ok(layout) || scatter_shape_refusal(layout.n, layout.k, t) != nullptr ||
      plan == nullptr) {
    return cudaErrorInvalidValue;
  }
  static std::atomic<int> known[4][5][16][9];  // [kind][token tiles / 2]
  const int tiles = ceil_div(layout.n, kTileRows), units = ceil_div(layout.k, kUnitColumns);
  ScatterPlan p;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;
  p.x_warps = t <= 16 ? 2 : t <= 32 ? 4 : 1;
  const int most_of_one = max_warps(layout, p.token_tiles, 1) + 1 - p.x_warps;
  const int most_of_two = max_warps(layout, p.token_tiles, 2) + 1 - p.x_warps;
  int at_once[kMaxCluster + 1] = {};
  for (int cluster = 1; cluster <= kMaxCluster; cluster *= 2) {
    const cudaError_t error =
        cuda::clusters_at_once(find_kernel<Bf16>(layout, p.token_tiles, 1), cluster,
                               known[kind_of(layout)][p.token_tiles / 2], &at_once[cluster]);
    if (error != cudaSuccess) return error;
  }
  // Warps of two row tiles that a block of such a cluster needs for all rows to be in one wave.
  const auto row_warps = [&](int cluster) {
    return ceil_div(ceil_div(tiles, at_once[cluster]), 2);
  };
  const auto first_with = [&](std::initializer_list<int> clusters, int least) {
    for (const int cluster : clusters) {
      const int warps = row_warps(cluster);
      if (least <= warps && warps <= most_of_two && units >= 2 * cluster) return cluster;
    }
    return 0;
  };
  // Pairs want many rows in a block, which then read little of x; lists, which keep a warp longer,
  // want warps along K.
  p.cluster = 0;
  if (t > 32) {
    p.cluster = first_with({1, 2}, 7);
  } else if (t > 16) {
    p.cluster = first_with({1, 2, 4}, 7);
  } else if (pairs_in(layout)) {
    p.cluster = first_with({2, 4, 8}, 9);
    if (p.cluster == 0) p.cluster = first_with({1, 2, 4, 8}, 7);
  }
  if (p.cluster == 0) p.cluster = row_warps(2) > most_of_two ? 1 : 2;
  while (p.cluster > 1 && units < 2 * p.cluster) p.cluster /= 2;

  int row_tiles = ceil_div(tiles, at_once[p.cluster]);
  const bool one = row_tiles == 1 || (t <= 8 && pairs_in(layout) && p.cluster == kMaxCluster &&
                                      row_tiles <= most_of_one);
  p.tiles_per_warp = one ? 1 : 2;
  const int most = one ? most_of_one : most_of_two;
  const int waves = ceil_div(row_tiles, most * p.tiles_per_warp);
  if (waves > 1) row_tiles = ceil_div(tiles, static_cast<std::int64_t>(at_once[p.cluster]) * waves);
  const int part = ceil_div(units, p.cluster);
  for (p.row_warps = ceil_div(row_tiles, p.tiles_per_warp); p.row_warps >= 1; p.row_warps /= 2) {
    const int wanted = std::min(t > 16 ? 8 : 14, most) / p.row_warps;
    for (p.k_warps = std::clamp(wanted, 1, std::min(6, part)); p.k_warps >= 1; --p.k_warps) {
      const int warps = p.row_warps * p.k_warps;
      if (t <= 8) p.x_warps = warps < most ? 3 : 2;
      if (t > 32) p.x_warps = warps < most ? 2 : 1;
      const bool two = part >= (t > 16 ? 4 : 6) * p.k_warps && (p.k_warps <= 2 || t <= 8 || t > 16);
      const int most_units = t <= 32                          ? (two ? 2 : 1)
                             : p.k_warps > 1                  ? 1
                             : pairs_in(layout) && part <= 32 ? 2
                                                              : 4;
      for (p.stage_units = most_units; p.stage_units >= 1; --p.stage_units) {
        const int rounds = ceil_div(part, p.stage_units * p.k_warps);
        for (p.x_stages = std::min(t > 16 ? 2 : 3, rounds); p.x_stages >= std::min(2, rounds);
             --p.x_stages) {
          const std::size_t bytes = scatter_shared_bytes(layout, p);
          if (bytes > 0 && bytes <= kMaxSharedBytes) {
            *plan = p;
            return cudaSuccess;
          }
        }
      }
    }
  }
  return cudaErrorNotSupported;
}

template <class Half>
cudaError_t scatter_run(const void* packed, const ScatterLayout& layout, const void* x, void* y,
                        int t, const ScatterPlan& plan, bool overlap_previous,
                        cudaStream_t stream) {
  if (!layout_ok(layout) || scatter_shared_bytes(layout, plan) == 0 ||
      scatter_shape_refusal(layout.n, layout.k, t) != nullptr || t > plan.token_tiles * 8 ||
      packed == nullptr || x == nullptr || y == nullptr ||
      reinterpret_cast<std::uintptr_t>(packed) % 128 != 0 ||
      reinterpret_cast<std::uintptr_t>(x) % 16 != 0 ||
      reinterpret_cast<std::uintptr_t>(y) % (layout.n % 4 == 0 ? 8 : 2) != 0) {
    return cudaErrorInvalidValue;
  }
  StreamParams p = {};
  p.weights = static_cast<const unsigned char*>(packed);
  p.unit_bytes = bytes_of_unit(layout, layout.fours);
  p.fours = layout.fours;
  p.row_fours = order_of(layout, packed);
  p.x = static_cast<const unsigned short*>(x);
  p.y = static_cast<unsigned short*>(y);
  p.n = static_cast<int>(layout.n);
  p.k = static_cast<int>(layout.k);
  p.t = t;
  return cuda::stream_launch(find_kernel<Half>(layout, plan.token_tiles, plan.tiles_per_warp), p,
                             plan, shared_of(layout, plan), overlap_previous, stream);
}

namespace {

struct Call {
  int t;
  ScatterPlan plan;
};

template <class Half>
constexpr GpuLinearKernel kernel_of(const char* name) {
  return {
      .operation = "linear_bitmap",
      .name = name,
      .scratch_bytes = [](int64_t n, int64_t k) -> size_t { return scatter_scratch_bytes(n, k); },
      .measure = cuda::OwnLayout<ScatterLayout>::measure<scatter_measure>,
      .pack = cuda::OwnLayout<ScatterLayout>::pack<scatter_pack>,
      .unpack = cuda::OwnLayout<ScatterLayout>::unpack<scatter_unpack>,
      .max_tokens = [](const GpuLayout*) -> int64_t { return kScatterMaxTokens; },
      .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
      .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
        Call call{static_cast<int>(std::min(tokens, kScatterMaxTokens + 1)), {}};
        const cudaError_t error = scatter_plan(held<ScatterLayout>(layout), call.t, &call.plan);
        if (error == cudaSuccess) hold(plan, call);
        return error;
      },
      .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
      .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                void* y, void*, int overlap_previous, GpuStream stream) -> int {
        const auto call = held<Call>(plan);
        return scatter_run<Half>(packed, held<ScatterLayout>(layout), x, y, call.t, call.plan,
                                 overlap_previous != 0, static_cast<cudaStream_t>(stream));
      },
  };
}

}  // namespace

template cudaError_t scatter_run<Bf16>(const void*, const ScatterLayout&, const void*, void*, int,
                                       const ScatterPlan&, bool, cudaStream_t);
template cudaError_t scatter_run<Fp16>(const void*, const ScatterLayout&, const void*, void*, int,
                                       const ScatterPlan&, bool, cudaStream_t);

const GpuLinearKernel kScatter = kernel_of<Bf16>("cuda_sm90_scatter");
const GpuLinearKernel kScatterF16 = kernel_of<Fp16>("cuda_sm90_scatter_f16");

}  // namespace lacuna::kernels::linear_bitmap
