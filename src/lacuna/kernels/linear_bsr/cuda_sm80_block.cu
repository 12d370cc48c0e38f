// The idea: a block is dense, so its weights need no unpacking; all that counts is that they come
// at the speed of the memory. They are stored in the order in which the tensor cores want them, so
// that a 16-byte load a lane is half an operand, and go straight into registers: no shared memory,
// no barrier until the sums are added. The tensor cores' order of K inside a product is ours to
// choose, as long as W and x agree: lane 4g+q takes columns 8q .. 8q+7 of 32 for two steps, which
// are 16 bytes of a row of x as it lies.
//
// Packed W:
//
//   lists    [groups, longest first] first unit, units, group                   16 bytes
//   columns  [groups, the same order][columns_stride] / 32                      4 bytes
//   units    [units][row tile of the group][rows g, rows g + 8][lane 4g+q][8 columns]   1 KB a tile
//
// A group is 16, 32 or 64 rows that keep the same columns; a unit is 32 columns of it. A group's
// columns lie at a place that needs no list to be known, so that x waits for one load less.
//
//   block of threads: row_tiles of one group, 8 token_tiles tokens
//   warp w: units w, w + warps, ... of the list; asks for the next `depth` of them, then multiplies
//           the ones before; its sums stay in registers
//   at the end: sums of all warps through shared memory, added in their order
//
// Bytes: 2 a stored weight, once; x 64 bytes a token and unit, for every row_tiles rows, from L2
// through L1, whose turns are what limits many tokens.
//
// Tried and lost (bench/lab/cuda_linear_bsr): x in a ring in shared memory that 64 rows share, also
// with clusters that split K; warps that share weights through L1 and have other tokens each; x of
// the next units asked for together with their weights.
#include "lacuna/kernels/linear_bsr/cuda_sm80_block.h"

#include <cuda_runtime.h>

#include <algorithm>
#include <cstring>
#include <iterator>
#include <type_traits>
#include <vector>

#include "lacuna/kernels/cuda/halves.cuh"
#include "lacuna/kernels/cuda/own_layout.h"
#include "lacuna/kernels/cuda/sm80_follow.cuh"
#include "lacuna/kernels/cuda/sm90_device.h"

namespace lacuna::kernels::linear_bsr {
namespace {

using cuda::Bf16;
using cuda::Fp16;

constexpr int kTileRows = 16, kUnitColumns = 32;
constexpr int kTileVectors = 64;  // of 16 bytes, in a tile of 16 x 32
constexpr int kTileBytes = kTileVectors * 16;
constexpr int kMostGroupTiles = 4;
constexpr int kMostSharedBytes = 96 * 1024;  // every card from 8.0 on has them

struct Params {
  const int4* lists;  // first unit, units, group
  const int* columns;
  const uint4* values;
  const uint4* x;
  unsigned short* y;
  int n, t, x_vectors;  // x_vectors: K / 8
  int columns_stride, group_tiles;
  int slices_log2;  // blocks of threads that share a group
};

__device__ __forceinline__ uint4 load_once(const uint4* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// Floats from one token of a warp's sums to the next: stores and loads meet few bank conflicts.
__host__ __device__ constexpr int sums_stride(int row_tiles) { return row_tiles * kTileRows + 4; }

// Sums take 4 registers a thread of each tile: more tiles, fewer warps.
__host__ __device__ constexpr int most_warps(int tiles) { return tiles >= 8 ? 8 : 16; }

// NT token tiles, MT row tiles, D units at one time.
template <class Half, int NT, int MT, int D>
__global__ void __launch_bounds__(32 * most_warps(NT * MT)) block_kernel(const Params p) {
  extern __shared__ __align__(16) float sums[];  // [warp][8 NT tokens][sums_stride(MT)]
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int warps = blockDim.x >> 5, step = D * warps;
  const int place = blockIdx.y >> p.slices_log2;                    // of the group in the lists
  const int tile = (blockIdx.y & ((1 << p.slices_log2) - 1)) * MT;  // of the group
  const int first_token = blockIdx.x * (8 * NT);
  const int* const columns = p.columns + static_cast<std::size_t>(place) * p.columns_stride;
  const int4 list = p.lists[place];
  const int unit_vectors = p.group_tiles * kTileVectors;
  const uint4* const values =
      p.values + (static_cast<std::size_t>(list.x) * p.group_tiles + tile) * kTileVectors + lane;

  struct Batch {
    uint4 w[D][MT][2];
    int column[D];
  };
  const auto load = [&](Batch& batch, int unit) {
#pragma unroll
    for (int d = 0; d < D; ++d)  // beyond the list, but inside the table: any column
      if (unit + d * warps < p.columns_stride) batch.column[d] = __ldg(columns + unit + d * warps);
#pragma unroll
    for (int d = 0; d < D; ++d, unit += warps) {
      if (unit >= list.y) continue;
      const uint4* from = values + static_cast<std::size_t>(unit) * unit_vectors;
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        batch.w[d][m][0] = load_once(from + m * kTileVectors);
        batch.w[d][m][1] = load_once(from + m * kTileVectors + 32);
      }
    }
  };

  float c[MT][NT][4];
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i) c[m][j][i] = 0.f;

  const int token = lane >> 2, quarter = lane & 3;
  const uint4* const x =
      p.x + static_cast<std::size_t>(first_token + token) * p.x_vectors + quarter;
  const std::size_t x_tile = static_cast<std::size_t>(8) * p.x_vectors;
  const int tokens = p.t - first_token - token;  // j-th tile is mine if 8 j < tokens
  const auto compute = [&](const Batch& batch, int unit) {
    uint4 b[D][NT];
#pragma unroll
    for (int d = 0; d < D; ++d) {
      if (unit + d * warps >= list.y) continue;
      const int at = batch.column[d] * 4;
      const bool inside = at + quarter < p.x_vectors;
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        b[d][j] = make_uint4(0, 0, 0, 0);
        if (inside && 8 * j < tokens) b[d][j] = x[j * x_tile + at];
      }
    }
#pragma unroll
    for (int d = 0; d < D; ++d) {
      if (unit + d * warps >= list.y) continue;
#pragma unroll
      for (int j = 0; j < NT; ++j)
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const uint4 top = batch.w[d][m][0], low = batch.w[d][m][1], v = b[d][j];
          Half::multiply(c[m][j], make_uint4(top.x, low.x, top.y, low.y), v.x, v.y);
          Half::multiply(c[m][j], make_uint4(top.z, low.z, top.w, low.w), v.z, v.w);
        }
    }
  };

  Batch even, odd;
  load(even, warp);
  cuda::follow();
#pragma unroll 1
  for (int unit = warp; unit < list.y; unit += 2 * step) {
    load(odd, unit + step);
    compute(even, unit);
    load(even, unit + 2 * step);
    compute(odd, unit + step);
  }

  constexpr int kStride = sums_stride(MT);
  float* const own = sums + (warp * 8 * NT + quarter * 2) * kStride + token;
#pragma unroll
  for (int m = 0; m < MT; ++m)
#pragma unroll
    for (int j = 0; j < NT; ++j)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        own[(8 * j + (i & 1)) * kStride + kTileRows * m + 8 * (i >> 1)] = c[m][j][i];
  __syncthreads();

  // Four rows of one token a thread.
  const int first_row = (list.z * p.group_tiles + tile) * kTileRows;
  constexpr int kFours = 4 * MT;
#pragma unroll 1
  for (int i = threadIdx.x; i < 8 * NT * kFours; i += blockDim.x) {
    const int to = i / kFours, row = first_row + 4 * (i % kFours);
    if (first_token + to >= p.t || row >= p.n) continue;
    const float* from = sums + to * kStride + 4 * (i % kFours);
    float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll 4
    for (int w = 0; w < warps; ++w, from += 8 * NT * kStride) {
      const float4 v = *reinterpret_cast<const float4*>(from);
      sum[0] += v.x;
      sum[1] += v.y;
      sum[2] += v.z;
      sum[3] += v.w;
    }
    cuda::store_four<Half>(p.y + static_cast<std::size_t>(first_token + to) * p.n + row, sum,
                           p.n - row, p.n % 4 == 0);
  }
}

// ---------- packing ----------

// Lane l of tile (row tile, unit along K): 16 columns of row l / 2.
__global__ void mark_kernel(const unsigned short* dense, int n, int k, int tiles,
                            unsigned char* marks) {
  const int lane = threadIdx.x & 31, unit = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  const int units = (k + kUnitColumns - 1) / kUnitColumns;
  if (unit >= units) return;
  for (int tile = blockIdx.y; tile < tiles; tile += gridDim.y) {
    const int row = tile * kTileRows + lane / 2, column = unit * kUnitColumns + lane % 2 * 16;
    unsigned any = 0;
    if (row < n) {
      for (int i = 0; i < 16 && column + i < k; i += 8) {
        const uint4 v =
            *reinterpret_cast<const uint4*>(dense + static_cast<std::size_t>(row) * k + column + i);
        any |= (v.x | v.y | v.z | v.w) & 0x7fff7fff;
      }
    }
    if (__any_sync(~0u, any != 0)) any = 1;
    if (lane == 0) marks[static_cast<std::size_t>(tile) * units + unit] = any != 0;
  }
}

// One block of threads a group: the weights of its units, to or from where they are stored.
template <bool kPack>
__global__ void move_kernel(const Params p, uint4* dense) {
  const int4 list = p.lists[blockIdx.x];
  const int* const columns = p.columns + static_cast<std::size_t>(blockIdx.x) * p.columns_stride;
  const int vectors = p.group_tiles * kTileVectors;
  uint4* const values = const_cast<uint4*>(p.values) + static_cast<std::size_t>(list.x) * vectors;
  for (std::size_t i = threadIdx.x; i < static_cast<std::size_t>(list.y) * vectors;
       i += blockDim.x) {
    const int unit = static_cast<int>(i / vectors), at = static_cast<int>(i % vectors);
    const int row = (list.z * p.group_tiles + at / kTileVectors) * kTileRows +
                    at % kTileVectors / 32 * 8 + at % 32 / 4;
    const int column = columns[unit] * 4 + at % 4;  // in vectors
    const bool inside = row < p.n && column < p.x_vectors;
    uint4* const there = dense + static_cast<std::size_t>(row) * p.x_vectors + column;
    if (kPack) {
      values[i] = inside ? *there : make_uint4(0, 0, 0, 0);
    } else if (inside) {
      *there = values[i];
    }
  }
}

// ---------- host ----------

template <class T>
T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

int row_tiles_of(std::int64_t n) { return static_cast<int>(ceil_div<std::int64_t>(n, kTileRows)); }
int units_of(std::int64_t k) { return static_cast<int>(ceil_div<std::int64_t>(k, kUnitColumns)); }
std::size_t marks_bytes(std::int64_t n, std::int64_t k) {
  return ceil_div<std::size_t>(static_cast<std::size_t>(row_tiles_of(n)) * units_of(k), 16) * 16;
}

bool aligned(const void* p, std::size_t bytes) {
  return p != nullptr && reinterpret_cast<std::uintptr_t>(p) % bytes == 0;
}

bool layout_ok(const BlockLayout& l) {
  return block_shape_refusal(l.n, l.k, 1) == nullptr && l.group_tiles >= 1 &&
         l.group_tiles <= kMostGroupTiles && l.packed_bytes > 0;
}

Params params_of(const BlockLayout& layout, const void* packed) {
  const auto* bytes = static_cast<const unsigned char*>(packed);
  Params p = {};
  p.lists = reinterpret_cast<const int4*>(bytes);
  p.columns = reinterpret_cast<const int*>(bytes + layout.columns_at);
  p.values = reinterpret_cast<const uint4*>(bytes + layout.values_at);
  p.n = static_cast<int>(layout.n);
  p.x_vectors = static_cast<int>(layout.k / 8);
  p.columns_stride = layout.columns_stride;
  p.group_tiles = layout.group_tiles;
  return p;
}

// Which units of each group hold anything, the group with most of them first.
struct Lists {
  std::vector<int4> lists;
  std::vector<int> columns;  // [groups][stride]
  int stride = 0;
  std::int64_t units = 0;
};
Lists lists_of(const std::vector<unsigned char>& marks, int tiles, int units, int group_tiles) {
  std::vector<std::vector<int>> kept;
  Lists made;
  for (int first = 0; first < tiles; first += group_tiles) {
    kept.emplace_back();
    for (int unit = 0; unit < units; ++unit) {
      bool any = false;
      for (int tile = first; tile < std::min(first + group_tiles, tiles); ++tile)
        any = any || marks[static_cast<std::size_t>(tile) * units + unit] != 0;
      if (any) kept.back().push_back(unit);
    }
    const int count = static_cast<int>(kept.back().size());
    made.lists.push_back(
        {static_cast<int>(made.units), count, static_cast<int>(kept.size()) - 1, 0});
    made.units += count;
    made.stride = std::max(made.stride, count);
  }
  std::stable_sort(made.lists.begin(), made.lists.end(),
                   [](const int4& a, const int4& b) { return a.y > b.y; });
  made.columns.resize(made.lists.size() * made.stride, 0);
  for (std::size_t i = 0; i < made.lists.size(); ++i)
    std::copy(kept[made.lists[i].z].begin(), kept[made.lists[i].z].end(),
              made.columns.begin() + i * made.stride);
  return made;
}

using Kernel = void (*)(const Params);
struct Variant {
  int token_tiles, row_tiles, depth;
  Kernel bf16, f16;
};
template <int NT, int MT, int D>
constexpr Variant variant() {
  return {NT, MT, D, block_kernel<Bf16, NT, MT, D>, block_kernel<Fp16, NT, MT, D>};
}
constexpr Variant kVariants[] = {
    variant<1, 1, 2>(), variant<1, 2, 2>(), variant<1, 4, 1>(), variant<2, 1, 1>(),
    variant<2, 2, 1>(), variant<2, 2, 2>(), variant<2, 4, 1>(), variant<4, 1, 1>(),
    variant<4, 2, 1>(), variant<8, 1, 1>(), variant<8, 2, 1>(),
};
const Variant* find_variant(const BlockPlan& plan) {
  for (const Variant& v : kVariants)
    if (v.token_tiles == plan.token_tiles && v.row_tiles == plan.row_tiles && v.depth == plan.depth)
      return &v;
  return nullptr;
}

// Cuts that a sweep found fastest (bench/lab/cuda_linear_bsr), by row tiles for a multiprocessor:
// few rows need many warps along K to keep every multiprocessor busy.
struct Cut {
  int token_tiles, row_tiles, depth, k_warps;
};
constexpr double kRowTilesBelow[] = {2.3, 5, 10};
constexpr Cut kCuts[5][4] = {
    // few rows ... many
    {{1, 1, 2, 12}, {1, 1, 2, 8}, {1, 1, 2, 4}, {1, 2, 2, 4}},  // up to 8 tokens
    {{2, 2, 2, 16}, {2, 2, 2, 8}, {2, 4, 1, 8}, {2, 4, 1, 8}},  // 16
    {{4, 1, 1, 16}, {4, 2, 1, 8}, {4, 2, 1, 8}, {4, 2, 1, 4}},  // 32
    {{4, 2, 1, 8}, {4, 2, 1, 8}, {4, 2, 1, 4}, {4, 2, 1, 2}},   // 64: two blocks of threads
    {{8, 1, 1, 8}, {8, 1, 1, 4}, {8, 2, 1, 4}, {8, 2, 1, 3}},   // 64 at a time
};

// Up to this share of stored tiles the kernel beats the dense product at 64 tokens (at a half it
// does at 32), and unpacking with the dense product at any number.
constexpr double kMostOf64Tokens = 0.3, kMostOfManyTokens = 0.22;

// Share of the tiles of W that are stored.
double density(const BlockLayout& layout) {
  return static_cast<double>(layout.units) * layout.group_tiles /
         (static_cast<double>(row_tiles_of(layout.n)) * units_of(layout.k));
}

}  // namespace

std::size_t block_scratch_bytes(std::int64_t n, std::int64_t k) {
  const auto tiles = static_cast<std::size_t>(row_tiles_of(n));
  return marks_bytes(n, k) + tiles * sizeof(int4) + tiles * units_of(k) * sizeof(int);
}

cudaError_t block_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                          BlockLayout* layout, cudaStream_t stream) {
  if (block_shape_refusal(n, k, 1) != nullptr || !aligned(dense, 16) || !aligned(scratch, 16) ||
      layout == nullptr || layout->group_tiles < 0 || layout->group_tiles > kMostGroupTiles) {
    return cudaErrorInvalidValue;
  }
  const int tiles = row_tiles_of(n), units = units_of(k);
  auto* const bytes = static_cast<unsigned char*>(scratch);
  mark_kernel<<<dim3(ceil_div(units, 8), std::min(tiles, 65535)), 256, 0, stream>>>(
      static_cast<const unsigned short*>(dense), static_cast<int>(n), static_cast<int>(k), tiles,
      bytes);
  std::vector<unsigned char> marks(static_cast<std::size_t>(tiles) * units);
  cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(marks.data(), bytes, marks.size(), cudaMemcpyDeviceToHost, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error != cudaSuccess) return error;

  // The largest groups that store hardly more: their warps share x.
  Lists best = lists_of(marks, tiles, units, std::max(1, layout->group_tiles));
  int group_tiles = std::max(1, layout->group_tiles);
  const std::int64_t least = best.units;
  for (int tried = 2; layout->group_tiles == 0 && tried <= kMostGroupTiles; tried *= 2) {
    Lists lists = lists_of(marks, tiles, units, tried);
    if (lists.units * tried * 64 > least * 65) continue;
    best = std::move(lists);
    group_tiles = tried;
  }
  BlockLayout l;
  l.n = n;
  l.k = k;
  l.group_tiles = group_tiles;
  l.groups = static_cast<int>(best.lists.size());
  l.units = best.units;
  l.columns_stride = best.stride;
  l.columns_at = best.lists.size() * sizeof(int4);
  l.values_at = ceil_div<std::size_t>(l.columns_at + best.columns.size() * sizeof(int), 128) * 128;
  l.packed_bytes = l.values_at + best.units * group_tiles * kTileBytes;
  unsigned char* const index = bytes + marks_bytes(n, k);
  error = cudaMemcpyAsync(index, best.lists.data(), l.columns_at, cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess && !best.columns.empty())
    error = cudaMemcpyAsync(index + l.columns_at, best.columns.data(),
                            best.columns.size() * sizeof(int), cudaMemcpyHostToDevice, stream);
  if (error == cudaSuccess) error = cudaStreamSynchronize(stream);
  if (error == cudaSuccess) *layout = l;
  return error;
}

cudaError_t block_pack(const void* dense, const void* scratch, const BlockLayout& layout,
                       void* packed, cudaStream_t stream) {
  if (!layout_ok(layout) || !aligned(dense, 16) || !aligned(scratch, 16) || !aligned(packed, 128))
    return cudaErrorInvalidValue;
  const std::size_t index = layout.columns_at + sizeof(int) * layout.groups * layout.columns_stride;
  cudaError_t error = cudaMemsetAsync(packed, 0, layout.values_at, stream);  // the gap behind it
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(
        packed, static_cast<const unsigned char*>(scratch) + marks_bytes(layout.n, layout.k), index,
        cudaMemcpyDeviceToDevice, stream);
  if (error != cudaSuccess) return error;
  move_kernel<true><<<layout.groups, 256, 0, stream>>>(
      params_of(layout, packed), static_cast<uint4*>(const_cast<void*>(dense)));
  return cudaGetLastError();
}

cudaError_t block_unpack(const void* packed, const BlockLayout& layout, void* dense,
                         cudaStream_t stream) {
  if (!layout_ok(layout) || !aligned(dense, 16) || !aligned(packed, 128))
    return cudaErrorInvalidValue;
  const cudaError_t error = cudaMemsetAsync(dense, 0, layout.n * layout.k * 2, stream);
  if (error != cudaSuccess) return error;
  move_kernel<false>
      <<<layout.groups, 256, 0, stream>>>(params_of(layout, packed), static_cast<uint4*>(dense));
  return cudaGetLastError();
}

std::size_t block_shared_bytes(const BlockLayout& layout, const BlockPlan& plan) {
  if (find_variant(plan) == nullptr || plan.row_tiles > layout.group_tiles || plan.k_warps < 1 ||
      plan.k_warps > most_warps(plan.token_tiles * plan.row_tiles)) {
    return 0;
  }
  const std::size_t bytes =
      sizeof(float) * plan.k_warps * 8 * plan.token_tiles * sums_stride(plan.row_tiles);
  return bytes <= kMostSharedBytes ? bytes : 0;
}

cudaError_t block_plan(const BlockLayout& layout, std::int64_t t, BlockPlan* plan) {
  if (!layout_ok(layout) || block_shape_refusal(layout.n, layout.k, t) != nullptr ||
      plan == nullptr) {
    return cudaErrorInvalidValue;
  }
  int multiprocessors = 0;
  const cudaError_t error = cuda::multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const double share = static_cast<double>(row_tiles_of(layout.n)) / multiprocessors;
  const auto rows = std::upper_bound(std::begin(kRowTilesBelow), std::end(kRowTilesBelow), share) -
                    std::begin(kRowTilesBelow);
  const int tokens = t <= 8 ? 0 : t <= 16 ? 1 : t <= 32 ? 2 : t <= 64 ? 3 : 4;
  const Cut& cut = kCuts[tokens][rows];
  BlockPlan p{cut.token_tiles, cut.row_tiles, cut.depth, cut.k_warps};
  while (p.row_tiles > layout.group_tiles) p.row_tiles /= 2;
  if (find_variant(p) == nullptr) p.depth = 1;
  *plan = p;
  return cudaSuccess;
}

template <class Half>
cudaError_t block_run(const void* packed, const BlockLayout& layout, const void* x, void* y,
                      std::int64_t t, const BlockPlan& plan, bool overlap_previous,
                      cudaStream_t stream) {
  const std::size_t shared = block_shared_bytes(layout, plan);
  if (!layout_ok(layout) || shared == 0 || block_shape_refusal(layout.n, layout.k, t) != nullptr ||
      !aligned(packed, 128) || !aligned(x, 16) || !aligned(y, layout.n % 4 == 0 ? 8 : 2)) {
    return cudaErrorInvalidValue;
  }
  Params p = params_of(layout, packed);
  p.x = static_cast<const uint4*>(x);
  p.y = static_cast<unsigned short*>(y);
  p.t = static_cast<int>(t);
  const int slices = layout.group_tiles / plan.row_tiles;
  p.slices_log2 = slices == 1 ? 0 : slices == 2 ? 1 : 2;
  const Variant& variant = *find_variant(plan);
  const dim3 blocks(static_cast<unsigned>(ceil_div<std::int64_t>(t, 8 * plan.token_tiles)),
                    static_cast<unsigned>(layout.groups * slices));
  return cuda::launch_following(std::is_same_v<Half, Fp16> ? variant.f16 : variant.bf16, p, blocks,
                                plan.k_warps * 32, shared, overlap_previous, stream);
}

namespace {

struct Call {
  std::int64_t t;
  BlockPlan plan;
};

template <class Half>
constexpr GpuLinearKernel kernel_of(const char* name) {
  return {
      .operation = "linear_bsr",
      .name = name,
      .scratch_bytes = [](int64_t n, int64_t k) -> size_t { return block_scratch_bytes(n, k); },
      .measure = cuda::OwnLayout<BlockLayout>::measure<block_measure>,
      .pack = cuda::OwnLayout<BlockLayout>::pack<block_pack>,
      .unpack = cuda::OwnLayout<BlockLayout>::unpack<block_unpack>,
      .max_tokens = [](const GpuLayout* layout) -> int64_t {
        return density(held<BlockLayout>(layout)) <= kMostOf64Tokens ? 64 : 32;
      },
      .many_tokens = [](const GpuLayout* layout) -> int64_t {
        return density(held<BlockLayout>(layout)) <= kMostOfManyTokens ? 65 : 0;
      },
      .plan = [](const GpuLayout* layout, int64_t tokens, GpuPlan* plan) -> int {
        Call call{tokens, {}};
        const cudaError_t error = block_plan(held<BlockLayout>(layout), tokens, &call.plan);
        if (error == cudaSuccess) hold(plan, call);
        return error;
      },
      .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
      .run = [](const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                void* y, void*, int overlap_previous, GpuStream stream) -> int {
        const auto call = held<Call>(plan);
        return block_run<Half>(packed, held<BlockLayout>(layout), x, y, call.t, call.plan,
                               overlap_previous != 0, static_cast<cudaStream_t>(stream));
      },
  };
}

}  // namespace

template cudaError_t block_run<Bf16>(const void*, const BlockLayout&, const void*, void*,
                                     std::int64_t, const BlockPlan&, bool, cudaStream_t);
template cudaError_t block_run<Fp16>(const void*, const BlockLayout&, const void*, void*,
                                     std::int64_t, const BlockPlan&, bool, cudaStream_t);

const GpuLinearKernel kBlock = kernel_of<Bf16>("cuda_sm80_block");
const GpuLinearKernel kBlockF16 = kernel_of<Fp16>("cuda_sm80_block_f16");

}  // namespace lacuna::kernels::linear_bsr
