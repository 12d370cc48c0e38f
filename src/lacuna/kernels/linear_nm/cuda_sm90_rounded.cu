// The idea: where products count, x in codes halves them and what of x is read. wgmma.sp takes
// codes from registers, and the units that cuda_sm90_coded packs for mma.sp on bf16 nearly are its
// fragments:
//
//   lane 4g+t   mma.sp, two steps of 32 columns       wgmma.sp, 64 columns of bytes
//   values      of rows g and g+8, groups t and t+4   the same groups, but side by side (2t, 2t+1):
//               of each step, a row's codes apart     so x's columns are put into that order when
//                                                     they are rounded, and the codes of a row
//                                                     together (8 instructions for eight)
//   metadata    lanes 2h, 2h+1: 16 columns each of    lane 2h+i: row g+8i, 32 columns of step h:
//               step h, rows g and g+8                halves of both, interleaved by 4 bits (5)
//
// Two kernels: up to 64 tokens x lies in shared memory (cuda_sm90_wgmma_sp_resident.cuh), above it
// (and from 33 for matrices of many rows) it comes in tiles (cuda_sm90_wgmma_sp_tiles.cuh), the
// fewer tokens the smaller, or shared by blocks that split K.
#include "lacuna/kernels/linear_nm/cuda_sm90_rounded.h"

#include "lacuna/kernels/cuda/sm90_round_tokens.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_coded_unit.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp_resident.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp_tiles.cuh"

namespace lacuna::kernels::linear_nm {
namespace {

template <class Code>
struct CodedUnit {
  static constexpr bool kFloat = std::is_same_v<Code, cuda::Fp8>;
  using Sum = std::conditional_t<kFloat, float, int>;
  static constexpr int kBytes = kCodedUnitBytes;
  static constexpr int kElementBytes = 1;
  static constexpr bool kScaled = true;
  static const std::array<TileVariant, 5> kTileVariants;

  struct Fragments {  // of 128 columns
    uint4 a[2];
    unsigned metadata[2];
  };

  // Of a lane, in a unit.
  struct Where {
    unsigned places, row, codes;
  };
  static __device__ __forceinline__ Where where(int lane) {
    return {kept((lane & ~1) * 8), kept(lane & 1 ? 0x7362 : 0x5140),
            kept(kCodedMetadataBytes + lane * 16)};
  }

  template <int kPart>
  static __device__ __forceinline__ void load(Fragments& f, unsigned unit, const Where& at) {
    const uint4 places = cuda::load_shared4(unit + at.places);  // of both lanes of a step
    f.metadata[0] = interleaved(__byte_perm(places.x, places.z, at.row));
    f.metadata[1] = interleaved(__byte_perm(places.y, places.w, at.row));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint4 words = cuda::load_shared4(unit + at.codes + i * kCodedPairBytes);
      Code::rows(words.x, words.y, &f.a[i].x, &f.a[i].y);
      Code::rows(words.z, words.w, &f.a[i].z, &f.a[i].w);
    }
  }

  // Zeros in the first two places of every group.
  static __device__ __forceinline__ Fragments nothing() {
    return {{make_uint4(0, 0, 0, 0), make_uint4(0, 0, 0, 0)}, {0x44444444, 0x44444444}};
  }

  template <int kSums>
  static __device__ __forceinline__ void multiply(Sum (&sums)[kSums], const Fragments& f,
                                                  std::uint64_t x, bool add) {
    if constexpr (kFloat) {
      wgmma_sp_fp8<0>(sums, f.a[0], x, f.metadata[0], add);
      wgmma_sp_fp8<0>(sums, f.a[1], x + 4, f.metadata[1], true);  // 64 bytes on
    } else {
      wgmma_sp_int8<0>(sums, f.a[0], x, f.metadata[0], add);
      wgmma_sp_int8<0>(sums, f.a[1], x + 4, f.metadata[1], true);
    }
  }

 private:
  // Of every 16 bits the two in the middle of four nibbles change places.
  static __device__ __forceinline__ unsigned interleaved(unsigned v) {
    return cuda::select<0xf00ff00f>(v, cuda::select<0x00f000f0>(v >> 4, v << 4));
  }
};

// Warpgroups of 64 rows, tokens, slots of x, stages of W, tokens of y at a time.
template <class Code>
const std::array<TileVariant, 5> CodedUnit<Code>::kTileVariants = {
    tile_variant<Cut<CodedUnit, 2, 256, 5, 5, 16>>(),
    tile_variant<Cut<CodedUnit, 2, 128, 8, 5, 64>>(),
    tile_variant<Cut<CodedUnit, 4, 128, 5, 5, 32>>(),
    tile_variant<Cut<CodedUnit, 4, 64, 8, 6, 32>>(),
    tile_variant<Cut<CodedUnit, 2, 128, 5, 5, 32, true>>()};

bool tiles_take(std::int64_t n, std::int64_t k) {
  return n >= 8 && n % 8 == 0 && n < (1 << 25) && k >= 128 && k % 128 == 0 && k < (1 << 20);
}

// The cut from measured rules (bench/lab/cuda_linear_coded).
// @param at_once  (cluster, &count): clusters of blocks that the device holds at a time
template <class Unit, class AtOnce>
cudaError_t resident_cut(std::int64_t n, std::int64_t units, std::int64_t t, const AtOnce& at_once,
                         ResidentPlan* plan) {
  ResidentPlan p = {};
  p.tokens = t <= 32 ? 32 : 64;
  // Few blocks share K: each cut costs an exchange of sums. But of 64 tokens two thirds of shared
  // memory hold x, and four blocks start sooner on a fourth of it.
  const std::int64_t most_units = 128 * 1024 / (p.tokens * kSlotBytes);
  p.cluster = p.tokens == 32 ? 4 : 2;
  while (p.cluster < 8 && ceil_div(units, p.cluster) > most_units) p.cluster *= 2;
  while (p.cluster > units) p.cluster /= 2;
  int clusters = 0;
  if (const cudaError_t error = at_once(p.cluster, &clusters)) return error;
  const auto part = static_cast<int>(ceil_div(units, p.cluster));
  const auto row_tiles = static_cast<int>(ceil_div(ceil_div(n, kTileRows), clusters));
  const auto full_tiles = static_cast<int>(ceil_div(row_tiles, 4));
  p.groups = p.tokens == 32 ? std::min(part >= 24 ? 3 : 4, static_cast<int>(ceil_div(row_tiles, 3)))
                            : (full_tiles >= 5 ? 3 : std::min(full_tiles, 2));
  for (; p.groups >= 1; --p.groups) {
    const bool one_turn = full_tiles <= p.groups;
    for (p.stages = p.tokens == 32 && part >= 16 ? 3 : 2; p.stages >= 1; --p.stages) {
      p.ahead = one_turn ? p.stages : 1;
      if (resident_plan_ok<Unit>(p, units)) {
        *plan = p;
        return cudaSuccess;
      }
    }
  }
  return cudaErrorInvalidValue;
}

// What a block does with 128 columns costs what they move through its shared memory (x, read once
// by each warpgroup; x and W, written; W, read) and, on top, what all blocks ask of the L2 at one
// time. Fitted to a sweep of 64 to 1,024 tokens (bench/lab/cuda_linear_coded): 11 % off, but it
// finds the fastest cut.
constexpr double kSharedBytesPerUs = 242e3, kL2BytesPerUs = 18.5e6, kExchangeBytesPerUs = 13.2e3;

template <class Unit>
cudaError_t tile_cut(std::int64_t n, std::int64_t units, std::int64_t t, WgmmaSpPlan* plan) {
  double least = 0;
  for (int i = 0; i < static_cast<int>(Unit::kTileVariants.size()); ++i) {
    const TileVariant& v = Unit::kTileVariants[i];
    for (int pair = v.split ? 1 : kPair; pair <= kPair; ++pair) {
      for (int parts = v.split ? 2 : 1; parts <= std::min<std::int64_t>(v.most_parts, units);
           ++parts) {
        const int cluster = pair * parts;
        int at_once = 0;
        const cudaError_t error = tile_clusters_at_once<Unit>(i, cluster, &at_once);
        if (v.split && error == cudaErrorNotSupported) continue;  // (a part of a device)
        if (error != cudaSuccess) return error;
        const std::int64_t tiles = ceil_div(n, v.rows * pair) * ceil_div(t, v.tokens);
        const double turns = static_cast<double>(ceil_div(tiles, at_once) * ceil_div(units, parts));
        const auto blocks = static_cast<double>(std::min<std::int64_t>(tiles, at_once) * cluster);
        const double w = v.rows / kTileRows * Unit::kBytes, x = v.tokens * kSlotBytes;
        const double shared = (v.rows / 64 + 1) * x + 2.2 * w, l2 = blocks * (w + x / pair);
        const double exchanged = v.rows * v.tokens * 4. * (parts - 1) / parts;
        const double cost = turns * (shared / kSharedBytesPerUs + l2 / kL2BytesPerUs) +
                            exchanged / kExchangeBytesPerUs;
        if (least == 0 || cost < least) {
          least = cost;
          *plan = {v.tokens, kBand, v.rows, v.split, pair, parts};
        }
      }
    }
  }
  return least > 0 ? cudaSuccess : cudaErrorInvalidValue;
}

// Whether tiles of 256 rows x 64 tokens beat x in shared memory for 33 to 64 tokens: where nearly
// all multiprocessors have one.
template <class Unit>
cudaError_t tiles_of_64(std::int64_t n, std::int64_t t, bool* faster, WgmmaSpPlan* plan) {
  *plan = {64, kBand, 256};
  int at_once = 0;
  const cudaError_t error =
      tile_clusters_at_once<Unit>(tile_variant_of<Unit>(*plan), kPair, &at_once);
  if (error != cudaSuccess) return error;
  const std::int64_t tiles = ceil_div(n, 256 * kPair);
  *faster = tiles * 4 >= ceil_div(tiles, at_once) * at_once * 3;
  return cudaSuccess;
}

template <class Code>
struct OfCode {
  using Unit = CodedUnit<Code>;

  static cudaError_t plan(std::int64_t n, std::int64_t k, std::int64_t t, RoundedPlan* plan) {
    if (t < 1 || n < 1 || n >= (1 << 25) || k < 128 || k % 128 != 0 || k >= (1 << 20)) {
      return cudaErrorInvalidValue;
    }
    if (t <= 64) {
      bool tiles = false;
      WgmmaSpPlan of_64;
      if (t > 32 && tiles_take(n, k)) {
        if (const cudaError_t error = tiles_of_64<Unit>(n, t, &tiles, &of_64)) return error;
      }
      if (tiles) {
        *plan = of_64;
        return cudaSuccess;
      }
      const auto at_once = [&](int cluster, int* count) {
        return resident_clusters_at_once<Unit>(t <= 32 ? 32 : 64, cluster, count);
      };
      const cudaError_t error =
          resident_cut<Unit>(n, k / kUnitColumns, t, at_once, &plan->emplace<ResidentPlan>());
      if (error != cudaErrorInvalidValue) return error;
    }
    if (!tiles_take(n, k)) return cudaErrorInvalidValue;
    return tile_cut<Unit>(n, k / kUnitColumns, t, &plan->emplace<WgmmaSpPlan>());
  }

  static cudaError_t run(const RoundedOperands& o, std::int64_t n, std::int64_t k, std::int64_t t,
                         const RoundedPlan& plan, bool overlap_previous, cudaStream_t stream) {
    const auto* tiles = std::get_if<WgmmaSpPlan>(&plan);
    if (t < 1 || t >= (1 << 28) || n < 1 || n >= (1 << 25) || k < 128 || k % 128 != 0 ||
        k >= (1 << 20) || (tiles != nullptr && !tiles_take(n, k)) || !aligned(o.x) ||
        !aligned(o.workspace)) {
      return cudaErrorInvalidValue;
    }
    auto* const codes = static_cast<unsigned char*>(o.workspace);
    auto* const x_scales = reinterpret_cast<float*>(codes + t * k);
    const cudaError_t error = cuda::round_tokens<Code, cuda::ColumnOrder::kWgmmaSp>(
        o.x, t, k, codes, x_scales, overlap_previous, stream);
    if (error != cudaSuccess) return error;
    if (tiles != nullptr) {
      return tile_run<Unit>(o.units, o.scales, codes, x_scales, o.y, n, k, t, *tiles, stream);
    }
    return resident_run<Unit>(o.units, o.scales, codes, x_scales, o.y, n, k,
                              static_cast<int>(std::min<std::int64_t>(t, 1 << 20)),
                              std::get<ResidentPlan>(plan), stream);
  }
};

}  // namespace

std::int64_t rounded_from_tokens(std::int64_t n, std::int64_t k) {
  if (!tiles_take(n, k)) return 0;
  // x of 64 tokens, split by eight blocks, has to leave room for W in shared memory. Small weights
  // are read sooner than x is rounded.
  if (k > 16 * 8 * kUnitColumns) return 65;
  return n * k > 20'000'000 ? 17 : 33;
}

std::size_t rounded_workspace_bytes(std::int64_t k, std::int64_t t) {
  return static_cast<std::size_t>(t) * (k + sizeof(float));
}

const Rounded kRoundedFp8 = {OfCode<cuda::Fp8>::plan, OfCode<cuda::Fp8>::run};
const Rounded kRoundedInt8 = {OfCode<cuda::Int8>::plan, OfCode<cuda::Int8>::run};

}  // namespace lacuna::kernels::linear_nm
