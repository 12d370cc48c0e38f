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

#include <type_traits>

#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_pack.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp_limits.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp_tiles.cuh"

namespace lacuna::kernels::linear_nm {
namespace {

// A unit as cuda_sm80_mma_sp_pack.cu draws it.
template <class Half_>
struct Unit16 {
  using Half = Half_;
  using Sum = float;
  static constexpr int kMetadataBytes = kMmaSpMetadataBytes, kStepBytes = kMmaSpStepBytes;
  static constexpr int kBytes = kMetadataBytes + 4 * kStepBytes;
  static constexpr int kElementBytes = 2;
  static constexpr bool kScaled = false;
  static const std::array<TileVariant, 2> kTileVariants;

  struct Fragments {  // of 64 columns
    uint4 a[2];
    unsigned metadata;
  };

  template <int kSelector, int kSums>
  static __device__ __forceinline__ void part(float (&sums)[kSums], const uint4& a, std::uint64_t x,
                                              unsigned metadata, bool add) {
    if constexpr (std::is_same_v<Half, cuda::Fp16>) {
      wgmma_sp_f16<kSelector>(sums, a, x, metadata, add);
    } else {
      wgmma_sp_bf16<kSelector>(sums, a, x, metadata, add);
    }
  }

  using Where = int;  // the lane
  static __device__ __forceinline__ Where where(int lane) { return lane; }

  template <int kPart>
  static __device__ __forceinline__ void load(Fragments& f, unsigned unit, Where lane) {
    const unsigned steps = unit + kMetadataBytes + 2 * kPart * kStepBytes + lane * 16;
    f.metadata = load_shared1(unit + lane * 8 + kPart * 4);
    f.a[0] = cuda::load_shared4(steps);
    f.a[1] = cuda::load_shared4(steps + kStepBytes);
  }

  template <int kSums>
  static __device__ __forceinline__ void multiply(float (&sums)[kSums], const Fragments& f,
                                                  std::uint64_t x, bool add) {
    part<0>(sums, f.a[0], x, f.metadata, add);
    part<1>(sums, f.a[1], x + 4, f.metadata, true);  // 64 bytes on
  }
};

template <class Half_>
const std::array<TileVariant, 2> Unit16<Half_>::kTileVariants = {
    tile_variant<Cut<Unit16, 2, 256, 5, 3, 16>>(), tile_variant<Cut<Unit16, 2, 128, 8, 3, 64>>()};
template struct Unit16<cuda::Bf16>;
template struct Unit16<cuda::Fp16>;
using Bf16Unit = Unit16<cuda::Bf16>;
// Cost of a tile, in tiles of 256 tokens: measured where all multiprocessors are busy.
constexpr double kTileCost[] = {1, 0.58};

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
  for (int i = 0; i < 2; ++i) {
    const TileVariant& v = Bf16Unit::kTileVariants[i];
    int clusters = 0;
    if (const cudaError_t error = tile_clusters_at_once<Bf16Unit>(i, kPair, &clusters)) {
      return error;
    }
    const std::int64_t tiles = ceil_div(n, v.rows * kPair) * ceil_div(t, v.tokens);
    const double cost = static_cast<double>(ceil_div(tiles, clusters)) * kTileCost[i];
    if (i == 0 || cost < least) {
      least = cost;
      *plan = {v.tokens, kBand};
    }
  }
  return cudaSuccess;
}

template <class Half>
cudaError_t wgmma_sp_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                         std::int64_t t, const WgmmaSpPlan& plan, cudaStream_t stream) {
  if (!wgmma_sp_takes(n, k)) return cudaErrorInvalidValue;
  return tile_run<Unit16<Half>>(packed, nullptr, x, nullptr, y, n, k, t, plan, stream);
}
template cudaError_t wgmma_sp_run<cuda::Bf16>(const void*, const void*, void*, std::int64_t,
                                              std::int64_t, std::int64_t, const WgmmaSpPlan&,
                                              cudaStream_t);
template cudaError_t wgmma_sp_run<cuda::Fp16>(const void*, const void*, void*, std::int64_t,
                                              std::int64_t, std::int64_t, const WgmmaSpPlan&,
                                              cudaStream_t);

}  // namespace lacuna::kernels::linear_nm
