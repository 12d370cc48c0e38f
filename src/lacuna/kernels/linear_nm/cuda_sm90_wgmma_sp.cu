// The idea: wgmma.sp takes its sparse operand from registers in the very order in which
// cuda_sm90_mma_sp packs it (four warps, each 16 rows; the metadata in the same lanes), so many
// tokens read the weights that few tokens read: nothing is expanded or laid out anew.
//
// A block, one on each multiprocessor, walks over tiles of 128 rows x 256 (or 128) tokens:
//
//   warpgroup 0, 1   64 rows each: fragments of W from a stage into registers, wgmma.sp with a slot
//                    of x; then 64 rows x 16 (64) tokens at a time through shared memory into y
//   warpgroup 2      one warp fetches x: slots of 64 columns, swizzled by the copy engine; each of
//                    the two blocks of a cluster fetches half the tokens for both
//                    one warp fetches W: stages of 128 columns, one packed unit for each 16 rows
//
// What limits it: x is read from shared memory once for every 64 rows, at 128 bytes a cycle just as
// fast as the sparse tensor cores can take it, and writing x and W there comes on top. So tiles are
// as large as the registers allow (128 sums a thread).
//
// Tried and lost (bench/lab/cuda_linear_nm_prefill): blocks alone (up to 10 %) or in fours (4 to
// 10 %; 50 % where their number divides badly), 256 rows x 128 tokens (10 %), W from global memory
// straight into registers (up to 9 %), four slots of x (up to 12 %). Three warpgroups of 64 rows
// don't compile: 512 threads start with 128 registers.
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.h"

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <atomic>

#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_device.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp_limits.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.cuh"

namespace lacuna::kernels::linear_nm {
namespace {

constexpr int kTileRows = 16;  // of a packed unit (cuda_sm90_mma_sp.cu has its picture)
constexpr int kUnitColumns = kMmaSpUnitColumns;
constexpr int kMetadataBytes = 256;
constexpr int kStepBytes = 512;
constexpr int kUnitBytes = kMetadataBytes + 4 * kStepBytes;
constexpr int kSlotColumns = 64;  // of x: 128 bytes a token, which a copy swizzles
constexpr int kMaxSharedBytes = 227 * 1024;

struct Params {
  const unsigned char* weights;
  int n, t, row_tiles, units;
  int row_blocks, token_blocks, band;  // of a cluster's rows; of tokens
};

constexpr int kConsumers = 2;  // warpgroups that multiply, 64 rows each; one more fetches
constexpr int kRows = kConsumers * 64;
constexpr int kThreads = (kConsumers + 1) * 128;
constexpr int kCluster = 2;  // blocks with other rows and the same tokens
constexpr int kWStages = 3;
constexpr int kWBytes = kRows / kTileRows * kUnitBytes;  // of a stage of W: kRows x 128 columns

// How a block shares its memory.
template <int kTokens_, int kXSlots_, int kChunkTokens_>
struct Cut {
  static constexpr int kTokens = kTokens_;
  static constexpr int kXSlots = kXSlots_;
  static constexpr int kChunkTokens = kChunkTokens_;          // of y that leave together
  static constexpr int kXBytes = kTokens * 2 * kSlotColumns;  // of a slot of x
  static constexpr int kChunkBytes = kChunkTokens * 128;      // of 64 rows
  static constexpr int kYOffset = kXSlots * kXBytes;
  static constexpr int kWOffset = kYOffset + kConsumers * 2 * kChunkBytes;
  static constexpr int kBarrierOffset = kWOffset + kWStages * kWBytes;
  static constexpr int kSharedBytes = kBarrierOffset + 16 * (kXSlots + kWStages) + 1024;
  static_assert(kSharedBytes <= kMaxSharedBytes && kTokens % kChunkTokens == 0);
};

// Where a ring stands.
template <int kSlots>
struct Turn {
  int slot = 0;
  unsigned phase = 0;
  __device__ __forceinline__ void next() {
    if (++slot == kSlots) {
      slot = 0;
      phase ^= 1;
    }
  }
};

struct Place {
  int row_block, token_block;
};
// Bands of token blocks; in a band all rows, for each all its tokens: what runs at one time shares
// a piece of W and a band of x that the L2 holds.
__device__ __forceinline__ Place place_of(const Params& p, int tile) {
  const int band = tile / (p.row_blocks * p.band);
  const int rest = tile - band * p.row_blocks * p.band;
  const int width = min(p.band, p.token_blocks - band * p.band);
  return {rest / width, band * p.band + rest % width};
}

// Of a tile. The last one begins earlier instead of reaching beyond T, and both it and the one
// before write the same: to fill up a box with zeros takes the copy engine longer than to read it.
template <class C>
__device__ __forceinline__ int first_token(const Params& p, const Place& place) {
  return max(min(place.token_block * C::kTokens, p.t - C::kTokens), 0);
}

// 64 rows x 64 columns of W in the registers of a warpgroup.
struct Fragments {
  uint4 a[2];
  unsigned metadata;
};

template <class C>
__device__ __forceinline__ void produce_x(const Params& p, const CUtensorMap& map, unsigned shared,
                                          unsigned full, unsigned empty, int rank, int first,
                                          int tiles, int step) {
  constexpr int kShare = C::kTokens / kCluster;
  Turn<C::kXSlots> turn;
  for (int tile = first; tile < tiles; tile += step) {
    const int token = first_token<C>(p, place_of(p, tile)) + rank * kShare;
    for (int column = 0; column < p.units * kUnitColumns; column += kSlotColumns, turn.next()) {
      cuda::barrier_wait(empty + 8 * turn.slot, turn.phase ^ 1);
      cuda::barrier_expect(full + 8 * turn.slot, C::kXBytes);
      const unsigned to = shared + turn.slot * C::kXBytes + rank * kShare * 128;
      tile_copy_to_all(to, map, column, token, full + 8 * turn.slot, (1u << kCluster) - 1);
    }
  }
}

// Each lane copies one row tile of a stage, if there is one for it.
template <class C>
__device__ __forceinline__ void produce_w(const Params& p, unsigned shared, unsigned full,
                                          unsigned empty, int rank, int first, int tiles, int step,
                                          int lane) {
  constexpr int kCopies = kRows / kTileRows;
  static_assert(kCopies <= 32);
  Turn<kWStages> turn;
  for (int tile = first; tile < tiles; tile += step) {
    const int row_tile =
        min((place_of(p, tile).row_block * kCluster + rank) * kCopies + lane, p.row_tiles - 1);
    const unsigned char* from =
        p.weights + static_cast<std::size_t>(row_tile) * p.units * kUnitBytes;
    for (int unit = 0; unit < p.units; ++unit, turn.next()) {
      cuda::barrier_wait(empty + 8 * turn.slot, turn.phase ^ 1);
      if (lane == 0) cuda::barrier_expect(full + 8 * turn.slot, kWBytes);
      __syncwarp();
      if (lane < kCopies) {
        cuda::bulk_copy(shared + C::kWOffset + turn.slot * kWBytes + lane * kUnitBytes,
                        from + static_cast<std::size_t>(unit) * kUnitBytes, kUnitBytes,
                        full + 8 * turn.slot);
      }
    }
  }
}

template <class C>
struct Consumer {
  const Params& p;
  const unsigned shared, x_full, x_empty, w_full, w_empty;
  const int group, warp, lane, rank;  // warp of the warpgroup
  Turn<C::kXSlots> x, x_read;         // next to multiply, next to give back
  Turn<kWStages> w;

  // Columns 64 * kHalf .. + 63 of a stage.
  template <int kHalf>
  __device__ __forceinline__ void load(Fragments& f) {
    const unsigned unit = shared + C::kWOffset + w.slot * kWBytes + (group * 4 + warp) * kUnitBytes;
    const unsigned steps = unit + kMetadataBytes + 2 * kHalf * kStepBytes + lane * 16;
    f.metadata = load_shared1(unit + lane * 8 + kHalf * 4);
    f.a[0] = cuda::load_shared4(steps);
    f.a[1] = cuda::load_shared4(steps + kStepBytes);
  }

  __device__ __forceinline__ void multiply(float (&sums)[C::kTokens / 2], const Fragments& f,
                                           bool add) {
    cuda::barrier_wait(x_full + 8 * x.slot, x.phase);
    const std::uint64_t b = swizzled_descriptor(shared + x.slot * C::kXBytes);
    x.next();
    wgmma_fence();
    wgmma_sp<0>(sums, f.a[0], b, f.metadata, add);
    wgmma_sp<1>(sums, f.a[1], b + 4, f.metadata, true);  // 64 bytes on
    wgmma_commit();
  }

  // The stage has been read. Not before wgmma has taken what was loaded: an arrival overtakes loads
  // that wait behind the tensor cores.
  __device__ __forceinline__ void give_back_w() {
    if (lane == 0) cuda::barrier_arrive(w_empty + 8 * w.slot);
    w.next();
  }

  // All but the last kLeft multiplications are done: their slot of x may be filled again, by every
  // block of the cluster.
  template <int kLeft>
  __device__ __forceinline__ void give_back_x() {
    wgmma_wait<kLeft>();
    if (lane < kCluster) {
      const unsigned barrier = x_empty + 8 * x_read.slot;
      barrier_arrive_in_cluster(cuda::cluster_address(barrier, lane));
    }
    x_read.next();
  }

  __device__ __forceinline__ void multiply_tile(float (&sums)[C::kTokens / 2]) {
    Fragments even, odd;
    cuda::barrier_wait(w_full + 8 * w.slot, w.phase);
    load<0>(even);
#pragma unroll 1
    for (int unit = 0; unit < p.units; ++unit) {
      multiply(sums, even, unit > 0);
      if (unit > 0) give_back_x<1>();
      load<1>(odd);
      multiply(sums, odd, true);
      give_back_w();
      give_back_x<1>();
      if (unit + 1 < p.units) {
        cuda::barrier_wait(w_full + 8 * w.slot, w.phase);
        load<0>(even);
      }
    }
    give_back_x<0>();
  }

  // The sums are [row][token] over the lanes; y wants rows side by side. stmatrix turns 8 x 8 of
  // them at a time into a chunk of tokens x 64 rows, which one copy stores.
  __device__ __forceinline__ void store_tile(const float (&sums)[C::kTokens / 2],
                                             const CUtensorMap& map, const Place& place) {
    const unsigned buffers = shared + C::kYOffset + group * 2 * C::kChunkBytes;
    const int token_of_lane = (lane & 7) + (lane >> 4) * 8;  // of 16
    const unsigned piece = (warp * 2 + (lane >> 3 & 1)) ^ (lane & 7);
    const bool leader = warp == 0 && lane == 0;
    const int row = (place.row_block * kCluster + rank) * kRows + group * 64;
#pragma unroll
    for (int c = 0; c < C::kTokens / C::kChunkTokens; ++c) {
      const unsigned buffer = buffers + (c & 1) * C::kChunkBytes;
      if (leader) stores_read<1>();
      barrier_of_group(1 + group);
      const unsigned to = buffer + token_of_lane * 128 + piece * 16;
#pragma unroll
      for (int j = 0; j < C::kChunkTokens / 16; ++j) {
        const float* d = &sums[(c * (C::kChunkTokens / 8) + 2 * j) * 4];
        store_matrices_turned(to + j * 16 * 128, pack(d[0], d[1]), pack(d[2], d[3]),
                              pack(d[4], d[5]), pack(d[6], d[7]));
      }
      async_proxy_fence();
      barrier_of_group(1 + group);
      const int token = first_token<C>(p, place) + c * C::kChunkTokens;
      if (leader) {
        if (row < p.n && token < p.t) tile_store(map, row, token, buffer);
        stores_commit();
      }
    }
  }
};

template <class C>
__global__ void __launch_bounds__(kThreads, 1)
    wgmma_sp_kernel(const Params p, const __grid_constant__ CUtensorMap x_map,
                    const __grid_constant__ CUtensorMap y_map) {
  extern __shared__ unsigned char memory[];
  // Swizzled tiles begin at multiples of 1,024 bytes, at the same place in all blocks of a cluster.
  const unsigned shared = (cuda::shared_address(memory) + 1023) & ~1023u;
  const unsigned x_full = shared + C::kBarrierOffset, x_empty = x_full + 8 * C::kXSlots,
                 w_full = x_empty + 8 * C::kXSlots, w_empty = w_full + 8 * kWStages;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int rank = static_cast<int>(blockIdx.x) % kCluster;
  const int first = static_cast<int>(blockIdx.x) / kCluster;
  const int step = static_cast<int>(gridDim.x) / kCluster;
  const int tiles = p.row_blocks * p.token_blocks;

  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kXSlots; ++i) {
      cuda::barrier_init(x_full + 8 * i, 1);
      cuda::barrier_init(x_empty + 8 * i, kCluster * kConsumers * 4);
    }
    for (int i = 0; i < kWStages; ++i) {
      cuda::barrier_init(w_full + 8 * i, 1);
      cuda::barrier_init(w_empty + 8 * i, kConsumers * 4);
    }
    cuda::barrier_init_fence();
  }
  __syncthreads();
  cuda::cluster_arrive();
  cuda::cluster_wait();

  if (warp >= kConsumers * 4) {
    give_registers<40>();
    if (warp == kConsumers * 4) {
      if (lane == 0) {
        produce_x<C>(p, x_map, shared, x_full, x_empty, rank, first, tiles, step);
      }
    } else if (warp == kConsumers * 4 + 1) {
      produce_w<C>(p, shared, w_full, w_empty, rank, first, tiles, step, lane);
    }
    __syncwarp();
  } else {
    take_registers<232>();
    Consumer<C> consumer{p,       shared,   x_full,   x_empty, w_full,
                         w_empty, warp / 4, warp % 4, lane,    rank};
    float sums[C::kTokens / 2];
#pragma unroll 1
    for (int tile = first; tile < tiles; tile += step) {
      consumer.multiply_tile(sums);
      consumer.store_tile(sums, y_map, place_of(p, tile));
    }
    if (threadIdx.x % 128 == 0) stores_read<0>();
  }
  // No block leaves while another may still write into its memory.
  cuda::cluster_arrive();
  cuda::cluster_wait();
}

struct Variant {
  int tokens;
  void (*kernel)(const Params, const CUtensorMap, const CUtensorMap);
  int shared_bytes, chunk_tokens;
  double cost;  // of a tile, in tiles of 256 tokens: measured where all multiprocessors are busy
};
template <class C>
constexpr Variant variant(double cost) {
  return {C::kTokens, wgmma_sp_kernel<C>, C::kSharedBytes, C::kChunkTokens, cost};
}
constexpr Variant kVariants[] = {variant<Cut<256, 5, 16>>(1), variant<Cut<128, 8, 64>>(0.58)};
// Token tiles that are walked for the same rows before the next rows.
constexpr int kBand = 8;
constexpr int kVariantCount = sizeof(kVariants) / sizeof(kVariants[0]);

int find_variant(int tokens) {
  for (int i = 0; i < kVariantCount; ++i) {
    if (kVariants[i].tokens == tokens) return i;
  }
  return -1;
}

// How a launch looks that fills the device.
struct Launch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attribute = {};

  Launch(const Variant& v, int clusters, cudaStream_t stream) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {static_cast<unsigned>(kCluster), 1, 1};
    config.gridDim = static_cast<unsigned>(clusters * kCluster);
    config.blockDim = kThreads;
    config.dynamicSmemBytes = static_cast<std::size_t>(v.shared_bytes);
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
  }
};

// Clusters that the current device holds at one time, asked for once (with what a launch needs).
cudaError_t clusters_at_once(int variant, int* count) {
  static std::atomic<int> known[16][kVariantCount];  // [device]
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>* remembered = device < 16 ? &known[device][variant] : nullptr;
  if (remembered != nullptr && (*count = remembered->load()) > 0) return cudaSuccess;
  if (cuda::sm90_refusal(device) != nullptr) return cudaErrorNotSupported;
  const Variant& v = kVariants[variant];
  error =
      cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared_bytes);
  if (error != cudaSuccess) return error;
  const Launch launch(v, 1, nullptr);
  error = cudaOccupancyMaxActiveClusters(count, v.kernel, &launch.config);
  if (error != cudaSuccess) return error;
  if (*count < 1) return cudaErrorNotSupported;
  if (remembered != nullptr) remembered->store(*count);
  return cudaSuccess;
}

// The driver's function, which the runtime finds: the library is not linked against libcuda.
decltype(&cuTensorMapEncodeTiled) encoder() {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult status;
    const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found,
                                                               12000, cudaEnableDefault, &status);
    if (error != cudaSuccess || status != cudaDriverEntryPointSuccess) found = nullptr;
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  }();
  return function;
}

// A row-major bf16 matrix, copied in boxes of 64 columns.
cudaError_t make_map(const void* matrix, std::int64_t rows, std::int64_t columns, int box_rows,
                     CUtensorMap* map) {
  if (encoder() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * 2};
  const cuuint32_t box[] = {kSlotColumns, static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  const CUresult result =
      encoder()(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void*>(matrix), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

bool aligned(const void* p) {
  return p != nullptr && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace

bool wgmma_sp_takes(std::int64_t n, std::int64_t k) {
  return mma_sp_shape_refusal(n, k, 1) == nullptr && n % 8 == 0;
}

std::int64_t wgmma_sp_from_tokens(std::int64_t n, std::int64_t k) {
  return wgmma_sp_takes(n, k) ? 65 : 0;
}

cudaError_t wgmma_sp_plan(std::int64_t n, std::int64_t k, std::int64_t t, WgmmaSpPlan* plan) {
  if (!wgmma_sp_takes(n, k) || t < 1 || plan == nullptr) return cudaErrorInvalidValue;
  double least = 0;
  for (int i = 0; i < kVariantCount; ++i) {
    int clusters = 0;
    if (const cudaError_t error = clusters_at_once(i, &clusters)) return error;
    const std::int64_t tiles = ceil_div(n, kRows * kCluster) * ceil_div(t, kVariants[i].tokens);
    const double cost = static_cast<double>(ceil_div(tiles, clusters)) * kVariants[i].cost;
    if (i == 0 || cost < least) {
      least = cost;
      *plan = {kVariants[i].tokens, kBand};
    }
  }
  return cudaSuccess;
}

cudaError_t wgmma_sp_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                         std::int64_t t, const WgmmaSpPlan& plan, cudaStream_t stream) {
  const int index = find_variant(plan.tokens);
  if (!wgmma_sp_takes(n, k) || t < 1 || t >= (1 << 28) || index < 0 || plan.band < 1 ||
      !aligned(packed) || !aligned(x) || !aligned(y)) {
    return cudaErrorInvalidValue;
  }
  const Variant& v = kVariants[index];
  Params p = {};
  p.weights = static_cast<const unsigned char*>(packed);
  p.n = static_cast<int>(n);
  p.t = static_cast<int>(t);
  p.row_tiles = static_cast<int>(ceil_div(n, kTileRows));
  p.units = static_cast<int>(k / kUnitColumns);
  p.row_blocks = static_cast<int>(ceil_div(n, kRows * kCluster));
  p.token_blocks = static_cast<int>(ceil_div(t, v.tokens));
  p.band = plan.band;
  const std::int64_t tiles = static_cast<std::int64_t>(p.row_blocks) * p.token_blocks;
  if (tiles > (1 << 30)) return cudaErrorInvalidValue;
  CUtensorMap x_map, y_map;
  cudaError_t error = make_map(x, t, k, v.tokens / kCluster, &x_map);
  if (error == cudaSuccess) error = make_map(y, t, n, v.chunk_tokens, &y_map);
  int clusters = 0;
  if (error == cudaSuccess) error = clusters_at_once(index, &clusters);
  if (error != cudaSuccess) return error;
  const Launch launch(v, static_cast<int>(std::min<std::int64_t>(clusters, tiles)), stream);
  return cudaLaunchKernelEx(&launch.config, v.kernel, p, x_map, y_map);
}

}  // namespace lacuna::kernels::linear_nm
