#include "lacuna/kernels/linear_bitmap/cuda_sm90_scatter.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>
#include <vector>

#include "lacuna/kernels/cuda/sm90_stream.cuh"

namespace lacuna::kernels::linear_bitmap {
namespace {

using cuda::ceil_div;
using cuda::kMaxCluster;
using cuda::kMaxSharedBytes;
using cuda::kTileRows;
using cuda::kUnitColumns;
using cuda::StreamParams;

constexpr int kFragmentBytes = 512;  // 16 rows x 16 columns, dense
constexpr int kSteps = kUnitColumns / 16;
constexpr int kTileBytes = kSteps * kFragmentBytes;
constexpr int kMostFours = 288;  // 9 rounds of 32 lanes

// Parts of a unit.
constexpr int kRestAt = 32, kValuesAt = 40;
__host__ __device__ constexpr int places_at(int fours) { return kValuesAt + 8 * fours; }
__host__ __device__ constexpr int unit_bytes(int fours) {
  return (kValuesAt + 12 * fours + 31) / 32 * 32;
}

// Fours that a lane holds.
__host__ __device__ constexpr int rounds_of(int fours, int lane) {
  return (fours - lane + 31) / 32;
}

__device__ __forceinline__ uint2 load_once2(const unsigned char* p) {
  uint2 v;
  asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned load_once(const unsigned char* p) {
  unsigned v;
  asm volatile("ld.global.cs.u32 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ unsigned load_once_byte(const unsigned char* p) {
  unsigned v;
  asm volatile("ld.global.cs.u8 %0, [%1];" : "=r"(v) : "l"(p));
  return v;
}

__device__ __forceinline__ void store_shared_half(unsigned address, unsigned v) {
  asm volatile("st.shared.u16 [%0], %1;" ::"r"(address), "h"(static_cast<unsigned short>(v))
               : "memory");
}

__device__ __forceinline__ void clear_shared4(unsigned address) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(address), "r"(0) : "memory");
}

__device__ __forceinline__ void multiply(float (&c)[4], const uint4& a, unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}

// Writes four values to their places. `bank`: address of the lane's first bank. A place is 128
// bytes for each of its upper 5 bits and 2 for each of its lower 3: a dot product of bytes.
__device__ __forceinline__ void scatter(unsigned bank, uint2 values, unsigned places) {
  const unsigned low = __byte_perm(places, 0, 0x1100) & 0x07f807f8;
  const unsigned high = __byte_perm(places, 0, 0x3322) & 0x07f807f8;
  store_shared_half(__dp4a(low, 0x0210u, bank), values.x);
  store_shared_half(__dp4a(low, 0x02100000u, bank), values.x >> 16);
  store_shared_half(__dp4a(high, 0x0210u, bank), values.y);
  store_shared_half(__dp4a(high, 0x02100000u, bank), values.y >> 16);
}

// Values that found no place in their unit: a count, then a value and its address in the tile each.
__device__ __noinline__ void scatter_rest(const unsigned* rest, unsigned tile, int lane) {
  const unsigned count = rest[0];
  for (unsigned i = lane; i < count; i += 32) {
    store_shared_half(tile + (rest[4 + i] >> 16), rest[4 + i]);
  }
}

// The weights of sm90_stream.cuh, for units of up to 32 kRounds fours.
template <int kRounds>
struct Scattered {
  static constexpr bool kAnyColumns = true;

  // Registers are given out four warps at a time: 12 warps leave 168 a thread, 16 128, 20 96,
  // 24 80.
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    const int registers = 40 + 4 * token_tiles * tiles_per_warp + 16 * tiles_per_warp +
                          4 * token_tiles + 3 * kRounds * tiles_per_warp;
    return registers <= 84 ? 23 : registers <= 98 ? 19 : registers <= 128 ? 15 : 11;
  }

  template <int MT>
  struct Reader {
    const StreamParams& p;
    const cuda::StreamSlice s;
    const unsigned tile;             // where units are expanded, zero before and after
    const unsigned char* units[MT];  // from the first unit on
    uint2 values[MT][kRounds];       // of the unit loaded last
    unsigned places[MT][kRounds], bank[MT], rest[MT];

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

    // What a lane reads of a unit of row tile m.
    struct Source {
      const unsigned char *unit, *values, *places;
    };
    __device__ __forceinline__ Source source_of(int m, int unit) {
      const unsigned char* from = units[m] + static_cast<unsigned>(unit * p.unit_bytes);
      return {from, from + static_cast<unsigned>(8 * s.lane) + kValuesAt,
              from + static_cast<unsigned>(8 * p.fours + 4 * s.lane) + kValuesAt};
    }

    __device__ __forceinline__ void load_round(int m, int r, const Source& from) {
      values[m][r] = load_once2(from.values + 256 * r);
      places[m][r] = load_once(from.places + 128 * r);
    }

    __device__ __forceinline__ void load_rest(int m, const Source& from) {
      bank[m] = load_once_byte(from.unit + static_cast<unsigned>(s.lane));
      rest[m] = load_once(from.unit + kRestAt);
    }

    __device__ __forceinline__ void start() {
      if (s.own > 0) {
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const Source from = source_of(m, 0);
#pragma unroll
          for (int r = 0; r < kRounds; ++r) {
            if (32 * r + s.lane < p.fours) load_round(m, r, from);
          }
          load_rest(m, from);
        }
      }
#pragma unroll 1
      for (int i = s.lane * 16; i < MT * kTileBytes; i += 512) clear_shared4(tile + i);
    }

    // Expands the unit loaded last; its registers ask for the unit `next` as soon as they are free.
    __device__ __forceinline__ void expand(int next) {
      const bool more = next < s.own;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const Source from = source_of(m, next);
        const unsigned to = tile + m * kTileBytes + 4 * bank[m];
#pragma unroll
        for (int r = 0; r < kRounds; ++r) {
          if (32 * r + s.lane < p.fours) {
            scatter(to, values[m][r], places[m][r]);
            if (more) load_round(m, r, from);
          }
        }
        if (rest[m] != 0) {
          scatter_rest(
              reinterpret_cast<const unsigned*>(p.weights) + static_cast<std::size_t>(rest[m]) * 4,
              tile + m * kTileBytes, s.lane);
        }
        if (more) load_rest(m, from);
      }
      __syncwarp();
    }

    struct Step {
      uint4 a[MT][2];
    };

    // Loads the fragments of 32 columns and clears them.
    __device__ __forceinline__ void load_step(int step, Step& to) {
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const unsigned from =
              tile + m * kTileBytes + (2 * step + i) * kFragmentBytes + s.lane * 16;
          to.a[m][i] = cuda::load_shared4(from);
          clear_shared4(from);
        }
      }
    }

    // Expands a unit, and multiplies it while the next one comes.
    template <int NT, class Wait>
    __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], int round, unsigned x,
                                             unsigned x_stride, const Wait& wait_for_x) {
      const int units_here = min(p.stage_units, s.own - round);
#pragma unroll 1
      for (int u = 0; u < units_here; ++u) {
        expand(u + 1 < units_here ? round + u + 1 : round + s.span);
        if (u == 0) wait_for_x();
        const unsigned b = x + u * (2 * kUnitColumns);
        Step steps[2];
        load_step(0, steps[0]);
#pragma unroll
        for (int step = 0; step < kSteps / 2; ++step) {
          uint4 fragments[NT];
#pragma unroll
          for (int j = 0; j < NT; ++j) {
            fragments[j] = cuda::load_matrices(b + j * 8 * x_stride + step * 64);
          }
          if (step + 1 < kSteps / 2) load_step(step + 1, steps[(step + 1) % 2]);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
#pragma unroll
            for (int j = 0; j < NT; ++j) {
#pragma unroll
              for (int m = 0; m < MT; ++m) {
                linear_bitmap::multiply(sums[m][j], steps[step % 2].a[m][i],
                                        i == 0 ? fragments[j].x : fragments[j].z,
                                        i == 0 ? fragments[j].y : fragments[j].w);
              }
            }
          }
        }
        __syncwarp();
      }
    }

    __device__ __forceinline__ void next(int) {}
  };
};

// ---------- packing ----------

// A warp's view of one unit: the entries that are kept, a value and its address in the tile, in the
// order of the banks of shared memory that they stand in.
struct Entries {
  int total;
  int before;  // entries in the banks before bank `lane`
  bool some;   // in bank `lane`
};

// Lane b collects bank b: in each step of 16 columns, word b + 32 w, w = 0..3, two values each.
// `to`: all entries of a warp, in shared memory.
__device__ __forceinline__ Entries collect_entries(const unsigned short* dense, int n, int k,
                                                   std::int64_t unit, int units, unsigned* to) {
  const int lane = threadIdx.x & 31;
  const int row0 = static_cast<int>(unit / units) * kTileRows + 8 * (lane & 1) + (lane >> 4);
  const int column0 =
      static_cast<int>(unit % units) * kUnitColumns + 2 * (lane >> 2 & 3) + 8 * (lane >> 1 & 1);
  Entries e;
  int at = 0;
#pragma unroll 1
  for (int pass = 0; pass < 2; ++pass) {  // counts, then stores
    int count = 0;
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int w = 0; w < 4; ++w) {
        const int row = row0 + 2 * w, column = column0 + 16 * step;
        unsigned word = 0;
        if (row < n && column < k) {
          word = *reinterpret_cast<const unsigned*>(dense + static_cast<std::size_t>(row) * k +
                                                    column);
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const unsigned v = half == 0 ? word & 0xffff : word >> 16;
          if ((v & 0x7fff) == 0) continue;  // +0.0 and -0.0
          if (pass == 1) {
            to[at + count] = v | (step * kFragmentBytes + 4 * (lane + 32 * w) + 2 * half) << 16;
          }
          ++count;
        }
      }
    }
    if (pass == 1) break;
    at = count;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int other = __shfl_up_sync(~0u, at, d);
      if (lane >= d) at += other;
    }
    e.total = __shfl_sync(~0u, at, 31);
    at -= count;
    e.before = at;
    e.some = count > 0;
  }
  __syncwarp();
  return e;
}

// Which entries a lane gets: consecutive ones, as many as it has slots, of four banks at most.
struct Share {
  int first, count;
  int placed;  // of all lanes
};

__device__ __forceinline__ Share share_of(const Entries& e, int fours) {
  const int lane = threadIdx.x & 31;
  Share share = {0, 0, 0};
#pragma unroll 1
  for (int l = 0; l < 32; ++l) {
    const int i = share.placed;
    const int bank = 31 - __clz(__ballot_sync(~0u, e.some && e.before <= i));
    const int beyond = __shfl_sync(~0u, e.before, min(bank + 4, 31));
    const int last = min(bank < 28 ? beyond : e.total, i + 4 * rounds_of(fours, l));
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
  const unsigned short* dense;
  int n, k, units, fours;
  std::int64_t all;  // units
  unsigned*
      numbers;  // of each unit: what is kept (fours is 0), what finds no place, where it stands
  unsigned char* packed;
};

// One warp a unit.
__global__ void __launch_bounds__(kPackWarps * 32) scatter_count_kernel(const PackParams p) {
  __shared__ unsigned entries[kPackWarps][kUnitValues];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
  if (unit >= p.all) return;
  const Entries e = collect_entries(p.dense, p.n, p.k, unit, p.units, entries[warp]);
  const int number = p.fours == 0 ? e.total : e.total - share_of(e, p.fours).placed;
  if (lane == 0) p.numbers[unit] = number;
}

__global__ void __launch_bounds__(kPackWarps * 32) scatter_pack_kernel(const PackParams p) {
  __shared__ unsigned entries[kPackWarps][kUnitValues];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
  if (unit >= p.all) return;
  const Entries e = collect_entries(p.dense, p.n, p.k, unit, p.units, entries[warp]);
  const Share share = share_of(e, p.fours);
  unsigned char* const to = p.packed + unit * unit_bytes(p.fours);
  // A lane with slots to spare writes its last entry again, a lane without entries the one before.
  const int first = share.count > 0 ? share.first : max(share.first - 1, 0);
  const int last = max(share.first + share.count - 1, first);
  const int bank = e.total > 0 ? entries[warp][first] >> 18 & 31 : 0;
  to[lane] = bank;
  for (int r = 0; r < rounds_of(p.fours, lane); ++r) {
    unsigned value[4] = {}, places = 0;
    for (int i = 0; i < 4 && e.total > 0; ++i) {
      const unsigned entry = entries[warp][min(first + 4 * r + i, last)];
      value[i] = entry & 0xffff;
      const unsigned row = entry >> 23, word = (entry >> 18 & 31) - bank, half = entry >> 17 & 1;
      places |= (row << 3 | word << 1 | half) << (8 * i);
    }
    const int four = 32 * r + lane;
    *reinterpret_cast<uint2*>(to + kValuesAt + 8 * four) =
        make_uint2(value[0] | value[1] << 16, value[2] | value[3] << 16);
    *reinterpret_cast<unsigned*>(to + places_at(p.fours) + 4 * four) = places;
  }
  const unsigned rest = p.numbers[unit];
  if (lane == 0) *reinterpret_cast<unsigned*>(to + kRestAt) = rest;
  if (rest != 0) {
    unsigned* const words =
        reinterpret_cast<unsigned*>(p.packed + static_cast<std::size_t>(rest) * 16);
    if (lane == 0) words[0] = e.total - share.placed;
    for (int i = share.placed + lane; i < e.total; i += 32) {
      words[4 + i - share.placed] = entries[warp][i];
    }
  }
}

// One warp unpacks one unit, through a tile in shared memory.
__global__ void __launch_bounds__(kPackWarps * 32)
    scatter_unpack_kernel(const PackParams p, unsigned short* dense) {
  __shared__ uint2 tiles[kPackWarps][kTileRows][kUnitColumns / 4];
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const std::int64_t unit = static_cast<std::int64_t>(blockIdx.x) * kPackWarps + warp;
  if (unit >= p.all) return;
  const auto tile = tiles[warp];
#pragma unroll
  for (int row = 0; row < kTileRows; ++row) tile[row][lane] = make_uint2(0, 0);
  __syncwarp();
  const auto put = [&](unsigned value, unsigned address) {
    const int word = address >> 2 & 127, step = address / kFragmentBytes;
    const int column = 16 * step + 2 * (word >> 2 & 3) + 8 * (word >> 1 & 1) + (address >> 1 & 1);
    reinterpret_cast<unsigned short*>(&tile[(word >> 4) + 8 * (word & 1)][0])[column] = value;
  };
  const unsigned char* const from = p.packed + unit * unit_bytes(p.fours);
  const unsigned bank = from[lane];
  for (int r = 0; r < rounds_of(p.fours, lane); ++r) {
    const int four = 32 * r + lane;
    for (int i = 0; i < 4; ++i) {
      const unsigned place = from[places_at(p.fours) + 4 * four + i];
      const unsigned value =
          reinterpret_cast<const unsigned short*>(from + kValuesAt)[4 * four + i];
      if (value != 0)
        put(value, (place >> 3) * 128 + (bank + (place >> 1 & 3)) * 4 + (place & 1) * 2);
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
  for (int row = 0; row < kTileRows && row0 + row < p.n && column < p.k; ++row) {
    *reinterpret_cast<uint2*>(dense + static_cast<std::size_t>(row0 + row) * p.k + column) =
        tile[row][lane];
  }
}

// ---------- host ----------

template <int kRounds>
cuda::StreamKernel kernel_of(int token_tiles, int tiles_per_warp) {
  switch (token_tiles * 16 + tiles_per_warp) {
    case 1 * 16 + 1:
      return cuda::stream_kernel<Scattered<kRounds>, 1, 1>;
    case 1 * 16 + 2:
      return cuda::stream_kernel<Scattered<kRounds>, 1, 2>;
    case 2 * 16 + 1:
      return cuda::stream_kernel<Scattered<kRounds>, 2, 1>;
    case 2 * 16 + 2:
      return cuda::stream_kernel<Scattered<kRounds>, 2, 2>;
    case 4 * 16 + 1:
      return cuda::stream_kernel<Scattered<kRounds>, 4, 1>;
    case 4 * 16 + 2:
      return cuda::stream_kernel<Scattered<kRounds>, 4, 2>;
    default:
      return nullptr;
  }
}

// Kernels for units of up to 32 fours times 2, 4, 6 and 9.
int rounds_index(int fours) { return fours <= 64 ? 0 : fours <= 128 ? 1 : fours <= 192 ? 2 : 3; }

cuda::StreamKernel find_kernel(int fours, int token_tiles, int tiles_per_warp) {
  switch (rounds_index(fours)) {
    case 0:
      return kernel_of<2>(token_tiles, tiles_per_warp);
    case 1:
      return kernel_of<4>(token_tiles, tiles_per_warp);
    case 2:
      return kernel_of<6>(token_tiles, tiles_per_warp);
    default:
      return kernel_of<9>(token_tiles, tiles_per_warp);
  }
}

int max_warps(int fours, int token_tiles, int tiles_per_warp) {
  switch (rounds_index(fours)) {
    case 0:
      return Scattered<2>::max_warps(token_tiles, tiles_per_warp);
    case 1:
      return Scattered<4>::max_warps(token_tiles, tiles_per_warp);
    case 2:
      return Scattered<6>::max_warps(token_tiles, tiles_per_warp);
    default:
      return Scattered<9>::max_warps(token_tiles, tiles_per_warp);
  }
}

cuda::StreamShared shared_of(const ScatterPlan& plan) {
  return cuda::stream_shared(plan, 0, kTileBytes);
}

bool layout_ok(const ScatterLayout& l) {
  return scatter_shape_refusal(l.n, l.k, 1) == nullptr && l.fours >= 1 && l.fours <= kMostFours;
}

std::int64_t units_of(std::int64_t n, std::int64_t k) {
  return static_cast<std::int64_t>(ceil_div(n, kTileRows)) * ceil_div(k, kUnitColumns);
}

PackParams pack_params(const ScatterLayout& l) {
  PackParams p = {};
  p.n = static_cast<int>(l.n);
  p.k = static_cast<int>(l.k);
  p.units = ceil_div(l.k, kUnitColumns);
  p.fours = l.fours;
  p.all = units_of(l.n, l.k);
  return p;
}

// Values without a place keep a warp waiting as long as so many bytes of weights would.
constexpr int kRestCost = 4096;

}  // namespace

const char* scatter_refusal(std::int64_t n, std::int64_t k, int t, int device) {
  if (const char* reason = scatter_shape_refusal(n, k, t)) return reason;
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "no such device";
  }
  if (major != 9 || minor != 0) return "needs compute capability 9.0";
  return nullptr;
}

std::size_t scatter_scratch_bytes(std::int64_t n, std::int64_t k) { return units_of(n, k) * 4; }

cudaError_t scatter_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                            ScatterLayout* layout, cudaStream_t stream) {
  if (scatter_shape_refusal(n, k, 1) != nullptr || dense == nullptr || scratch == nullptr ||
      layout == nullptr || layout->fours < 0 || layout->fours > kMostFours ||
      reinterpret_cast<std::uintptr_t>(dense) % 8 != 0 ||
      reinterpret_cast<std::uintptr_t>(scratch) % 4 != 0) {
    return cudaErrorInvalidValue;
  }
  ScatterLayout l;
  l.n = n;
  l.k = k;
  PackParams p = pack_params(l);
  p.dense = static_cast<const unsigned short*>(dense);
  p.numbers = static_cast<unsigned*>(scratch);
  std::vector<unsigned> numbers(p.all);
  const auto count = [&]() -> cudaError_t {
    scatter_count_kernel<<<ceil_div(p.all, kPackWarps), kPackWarps * 32, 0, stream>>>(p);
    cudaError_t error = cudaGetLastError();
    if (error == cudaSuccess) {
      error = cudaMemcpyAsync(numbers.data(), scratch, p.all * 4, cudaMemcpyDeviceToHost, stream);
    }
    return error == cudaSuccess ? cudaStreamSynchronize(stream) : error;
  };
  cudaError_t error = count();
  if (error != cudaSuccess) return error;

  // The size of a unit: what it adds to all of them against what is left to stand elsewhere.
  std::vector<std::int64_t> units_with(kUnitValues / 4 + 1, 0);
  for (const unsigned kept : numbers) {
    l.kept += kept;
    ++units_with[(kept + 3) / 4];
  }
  std::int64_t best = -1, beyond = 0;
  for (int fours = kUnitValues / 4; fours >= 1; --fours) {  // `beyond` units have more
    const std::int64_t cost = p.all * unit_bytes(fours) + beyond * kRestCost;
    if (fours <= kMostFours && (best < 0 || cost <= best)) {
      best = cost;
      l.fours = fours;
    }
    beyond += units_with[fours];
  }
  if (layout->fours > 0) l.fours = layout->fours;

  p.fours = l.fours;
  error = count();
  if (error != cudaSuccess) return error;
  std::uint64_t end = static_cast<std::uint64_t>(p.all) * unit_bytes(l.fours) / 16;
  for (unsigned& number : numbers) {
    if (number == 0) continue;
    const unsigned rest = number;
    number = static_cast<unsigned>(end);
    end += 1 + (rest + 3) / 4;
    ++l.elsewhere;
  }
  if (end >= (1ull << 32)) return cudaErrorNotSupported;
  l.packed_bytes = end * 16;
  error = cudaMemcpyAsync(scratch, numbers.data(), p.all * 4, cudaMemcpyHostToDevice, stream);
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
  const cudaError_t error =
      cudaMemsetAsync(packed, 0, layout.packed_bytes, stream);  // gaps between parts
  if (error != cudaSuccess) return error;
  PackParams p = pack_params(layout);
  p.dense = static_cast<const unsigned short*>(dense);
  p.numbers = const_cast<unsigned*>(static_cast<const unsigned*>(scratch));
  p.packed = static_cast<unsigned char*>(packed);
  scatter_pack_kernel<<<ceil_div(p.all, kPackWarps), kPackWarps * 32, 0, stream>>>(p);
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
  scatter_unpack_kernel<<<ceil_div(p.all, kPackWarps), kPackWarps * 32, 0, stream>>>(
      p, static_cast<unsigned short*>(dense));
  return cudaGetLastError();
}

std::size_t scatter_shared_bytes(const ScatterLayout& layout, const ScatterPlan& plan) {
  if (find_kernel(layout.fours, plan.token_tiles, plan.tiles_per_warp) == nullptr ||
      !cuda::stream_plan_ok(plan, max_warps(layout.fours, plan.token_tiles, plan.tiles_per_warp)) ||
      plan.stages != 0) {
    return 0;
  }
  return shared_of(plan).bytes;
}

cudaError_t scatter_plan(const ScatterLayout& layout, int t, ScatterPlan* plan) {
  if (!layout_ok(layout) || scatter_shape_refusal(layout.n, layout.k, t) != nullptr ||
      plan == nullptr) {
    return cudaErrorInvalidValue;
  }
  static std::atomic<int> known[4][3][16][9];  // [rounds][token tiles / 2]
  const int tiles = ceil_div(layout.n, kTileRows), units = ceil_div(layout.k, kUnitColumns);
  ScatterPlan p;
  p.token_tiles = t <= 8 ? 1 : t <= 16 ? 2 : 4;
  const auto clusters = [&](int cluster, int* at_once) {
    return cuda::clusters_at_once(find_kernel(layout.fours, p.token_tiles, 1), cluster,
                                  known[rounds_index(layout.fours)][p.token_tiles / 2], at_once);
  };
  int at_once = 0, row_tiles = 0;
  for (p.cluster = 1;; p.cluster *= 2) {
    const cudaError_t error = clusters(p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
    const bool idle = tiles * 4 < at_once * 3;
    const bool enough = row_tiles >= 9 || (t <= 8 && p.cluster >= 2);
    if ((enough && !idle) || p.cluster == kMaxCluster || units < 4 * p.cluster) break;
  }
  while (p.cluster > 1 && units < 2 * p.cluster) {
    p.cluster /= 2;
    const cudaError_t error = clusters(p.cluster, &at_once);
    if (error != cudaSuccess) return error;
    row_tiles = ceil_div(tiles, at_once);
  }
  const int part = ceil_div(units, p.cluster);
  for (p.tiles_per_warp = row_tiles >= 12 ? 2 : 1; p.tiles_per_warp >= 1; --p.tiles_per_warp) {
    const int limit = max_warps(layout.fours, p.token_tiles, p.tiles_per_warp);
    const int wanted_x_warps = t > 8 && t <= 16 ? 2 : t > 16 ? 4 : 3;
    const int most = limit + 1 - 2;
    int rows = row_tiles;
    const int waves = ceil_div(rows, most * p.tiles_per_warp);
    if (waves > 1) rows = ceil_div(tiles, static_cast<std::int64_t>(at_once) * waves);
    p.row_warps = ceil_div(rows, p.tiles_per_warp);
    for (p.k_warps = std::clamp(most / p.row_warps, 1, std::min(6, part)); p.k_warps >= 1;
         --p.k_warps) {
      p.x_warps = std::clamp(limit + 1 - p.row_warps * p.k_warps, 1, wanted_x_warps);
      for (p.stage_units = part >= 8 * p.k_warps ? 2 : 1; p.stage_units >= 1; --p.stage_units) {
        const int rounds = ceil_div(part, p.stage_units * p.k_warps);
        for (p.x_stages = std::min(3, rounds); p.x_stages >= std::min(2, rounds); --p.x_stages) {
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
  p.unit_bytes = unit_bytes(layout.fours);
  p.fours = layout.fours;
  p.x = static_cast<const __nv_bfloat16*>(x);
  p.y = static_cast<__nv_bfloat16*>(y);
  p.n = static_cast<int>(layout.n);
  p.k = static_cast<int>(layout.k);
  p.t = t;
  return cuda::stream_launch(find_kernel(layout.fours, plan.token_tiles, plan.tiles_per_warp), p,
                             plan, shared_of(plan), overlap_previous, stream);
}

namespace {

struct Call {
  int t;
  ScatterPlan plan;
};

}  // namespace

const GpuLinearKernel kScatter = {
    .operation = "linear_bitmap",
    .name = "cuda_sm90_scatter",
    .scratch_bytes = [](int64_t n, int64_t k) -> size_t { return scatter_scratch_bytes(n, k); },
    .measure = [](const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
                  GpuStream stream) -> int {
      ScatterLayout own;
      const cudaError_t error =
          scatter_measure(dense, n, k, scratch, &own, static_cast<cudaStream_t>(stream));
      layout->packed_bytes = own.packed_bytes;
      hold(layout, own);
      return error;
    },
    .pack = [](const GpuLayout* layout, const void* dense, const void* scratch, void* packed,
               GpuPackReport*, GpuStream stream) -> int {
      return scatter_pack(dense, scratch, held<ScatterLayout>(layout), packed,
                          static_cast<cudaStream_t>(stream));
    },
    .unpack = [](const GpuLayout* layout, const void* packed, void* dense,
                 GpuStream stream) -> int {
      return scatter_unpack(packed, held<ScatterLayout>(layout), dense,
                            static_cast<cudaStream_t>(stream));
    },
    .max_tokens = [](const GpuLayout*) -> int64_t { return kScatterMaxTokens; },
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
      return scatter_run(packed, held<ScatterLayout>(layout), x, y, call.t, call.plan,
                         overlap_previous != 0, static_cast<cudaStream_t>(stream));
    },
};

}  // namespace lacuna::kernels::linear_bitmap
