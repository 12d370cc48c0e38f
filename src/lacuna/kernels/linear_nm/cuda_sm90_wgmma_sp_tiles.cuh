// The kernel of cuda_sm90_wgmma_sp for weights of any element that wgmma.sp takes: 2:4, packed for
// the decode kernels in units of 16 rows x 128 columns. (That file has the idea and the picture.)
// Where few tiles would leave multiprocessors idle, blocks of a cluster may share K: each has a
// tile of sums for its columns, sends of every token's octet those that are another's to it, and
// stores the octets that are its own. What differs is the unit:
//
//   struct Unit {
//     using Sum;                         // float or int
//     using Half;                        // what y is, where it isn't scaled (halves.cuh)
//     static constexpr int kBytes;       // of 16 rows x 128 columns
//     static constexpr int kElementBytes;  // of x
//     static constexpr bool kScaled;     // rows of W and tokens of x have a factor each, and x is
//                                        // written by the kernel ahead, which this one may
//                                        overtake
//     static const std::array<TileVariant, ..> kTileVariants;  // the cuts that there are
//     // 64 rows x 128 bytes of x's columns of W: part kPart of the unit at this address.
//     struct Fragments;
//     struct Where;                      // what a lane reads of a unit
//     static __device__ Where where(int lane);
//     template <int kPart>
//     static __device__ void load(Fragments& f, unsigned unit, const Where& where);
//     // sums (+)= those times a slot of x (its descriptor).
//     template <int kSums>
//     static __device__ void multiply(Sum (&sums)[kSums], const Fragments& f, std::uint64_t x,
//                                     bool add);
//   };
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <type_traits>

#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_device.h"
#include "lacuna/kernels/cuda/sm90_stream.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.h"

namespace lacuna::kernels::linear_nm {

inline constexpr int kTileRows = 16;  // of a packed unit
inline constexpr int kUnitColumns = 128;
inline constexpr int kSlotBytes = 128;  // of each token in a slot of x: what a copy swizzles
// A map of W has packed units as numbers of 8 bytes, and copies at most 256 of them of a row tile.
inline constexpr int kMapElementBytes = 8;
inline constexpr int kMaxSharedBytes = 227 * 1024;

struct TileParams {
  const unsigned char* weights;
  const float *scales, *x_scales;  // of rows (up to a multiple of 16 of them) and tokens
  int n, t, row_tiles, units;
  int row_blocks, token_blocks, band;  // of a cluster's rows; of tokens
  int pair, parts;                     // WgmmaSpPlan, where Cut::kSplit
};

// Blocks with other rows and the same tokens, where nothing else is asked for.
inline constexpr int kPair = 2;

// How a block is cut: warpgroups that multiply, 64 rows each (one more fetches); how it shares its
// memory. kSplit: blocks of a cluster share K too, and each cluster has one tile.
template <class Unit_, int kConsumers_, int kTokens_, int kXSlots_, int kWStages_,
          int kChunkTokens_, bool kSplit_ = false>
struct Cut {
  using Unit = Unit_;
  static constexpr int kConsumers = kConsumers_;
  static constexpr int kRows = kConsumers * 64;
  static constexpr int kThreads = (kConsumers + 1) * 128;
  static constexpr bool kSplit = kSplit_;
  static constexpr int kTokens = kTokens_;
  static constexpr int kXSlots = kXSlots_;
  static constexpr int kChunkTokens = kChunkTokens_;      // of y that leave together
  static constexpr int kXBytes = kTokens * kSlotBytes;    // of a slot of x
  static constexpr int kChunkBytes = kChunkTokens * 128;  // of 64 rows
  static constexpr int kSlotColumns = kSlotBytes / Unit::kElementBytes;
  static constexpr int kParts = kUnitColumns / kSlotColumns;  // of a unit
  static constexpr int kWStages = kWStages_;
  static constexpr int kWBytes = kRows / kTileRows * Unit::kBytes;  // of a stage of W
  // Whether one copy fetches a stage: a copy for each row tile takes 86 cycles. With as many tokens
  // as take longer than those anyway it gains nothing (bf16 loses 4 %).
  static constexpr bool kMapped = Unit::kBytes <= 256 * kMapElementBytes && kTokens < 256;
  static constexpr int kWOffset = kXSlots * kXBytes;
  static constexpr int kYOffset = kWOffset + kWStages * kWBytes;
  static constexpr int kYBytes = 2 * kChunkBytes;  // of a warpgroup
  // Where blocks exchange sums: [warp][part][octet] of tokens.
  static constexpr int kOctets = kTokens / 8;
  template <int kParts>
  static constexpr int kMostOctets = (kOctets + kParts - 1) / kParts;
  static constexpr int kMostParts = kSplit ? 4 : 1;
  static constexpr int kSumsOffset = kYOffset + kConsumers * kYBytes;
  static constexpr int kSumsBytes =  // for 2, 3 or 4 parts
      kSplit ? kConsumers * 4 * 512 *
                   std::max({2 * kMostOctets<2>, 3 * kMostOctets<3>, 4 * kMostOctets<4>})
             : 0;
  static constexpr int kScaleOffset = kSumsOffset + kSumsBytes;  // of tokens, per warpgroup
  static constexpr int kBarrierOffset =
      kScaleOffset + (Unit::kScaled ? kConsumers * kTokens * 4 : 0);
  static constexpr int kBarriers =
      2 * (kXSlots + kWStages) + (kSplit ? kConsumers * 4 : 0);  // the last: of the exchange
  static constexpr int kSharedBytes = kBarrierOffset + 8 * kBarriers + 1024;
  // Threads that fetch give registers to those that multiply.
  static constexpr int kFetchRegisters = kConsumers == 2 ? 40 : 32;
  static constexpr int kMultiplyRegisters = kConsumers == 2 ? 232 : 112;
  static_assert(kSharedBytes <= kMaxSharedBytes && kTokens % kChunkTokens == 0);
  static_assert(kYOffset % 1024 == 0 && kWOffset % 1024 == 0);
  static_assert(kParts == 1 || kParts == 2);
  static_assert(!kSplit || (kParts == 1 && kMostOctets<2> * 8 * 128 <= kYBytes));
};

// Where a block stands in its cluster.
struct Member {
  int pair, parts;  // of the cluster
  int rank, part;   // of the block: its rows, its columns of W
  int first_unit, units;
  // The block of the same part that has other rows; of the same rows that has another part.
  __device__ __forceinline__ int beside(int other_rank) const { return part * pair + other_rank; }
  __device__ __forceinline__ int along(int other_part) const { return other_part * pair + rank; }
};
template <class C>
__device__ __forceinline__ Member member_of(const TileParams& p) {
  if constexpr (!C::kSplit) {
    return {kPair, 1, static_cast<int>(blockIdx.x) % kPair, 0, 0, p.units};
  } else {
    const int in_cluster = static_cast<int>(blockIdx.x) % (p.pair * p.parts);
    const int part = in_cluster / p.pair, first = part * p.units / p.parts;
    return {p.pair, p.parts, in_cluster % p.pair,
            part,   first,   (part + 1) * p.units / p.parts - first};
  }
}

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
__device__ __forceinline__ Place place_of(const TileParams& p, int tile) {
  const int band = tile / (p.row_blocks * p.band);
  const int rest = tile - band * p.row_blocks * p.band;
  const int width = min(p.band, p.token_blocks - band * p.band);
  return {rest / width, band * p.band + rest % width};
}

// Of a tile. The last one begins earlier instead of reaching beyond T, and both it and the one
// before write the same: to fill up a box with zeros takes the copy engine longer than to read it.
template <class C>
__device__ __forceinline__ int first_token(const TileParams& p, const Place& place) {
  return max(min(place.token_block * C::kTokens, p.t - C::kTokens), 0);
}

template <class C>
__device__ __forceinline__ void produce_x(const TileParams& p, const CUtensorMap& map,
                                          unsigned shared, unsigned full, unsigned empty,
                                          const Member& me, int first, int tiles, int step) {
  const int share = C::kTokens / me.pair;
  const unsigned blocks = ((1u << me.pair) - 1) << me.beside(0);
  Turn<C::kXSlots> turn;
  for (int tile = first; tile < tiles; tile += step) {
    const int token = first_token<C>(p, place_of(p, tile)) + me.rank * share;
    const int last = (me.first_unit + me.units) * kUnitColumns;
    for (int column = me.first_unit * kUnitColumns; column < last;
         column += C::kSlotColumns, turn.next()) {
      cuda::barrier_wait(empty + 8 * turn.slot, turn.phase ^ 1);
      cuda::barrier_expect(full + 8 * turn.slot, C::kXBytes);
      const unsigned to = shared + turn.slot * C::kXBytes + me.rank * share * kSlotBytes;
      tile_copy_to_all(to, map, column, token, full + 8 * turn.slot, blocks);
    }
  }
}

// By one warp. Where a map takes a unit, one lane copies a stage at a time; else each copies one
// row tile of it, if there is one for it.
template <class C>
__device__ __forceinline__ void produce_w(const TileParams& p, const CUtensorMap& map,
                                          unsigned shared, unsigned full, unsigned empty,
                                          const Member& me, int first, int tiles, int step,
                                          int lane) {
  constexpr int kRowTiles = C::kRows / kTileRows, kUnitBytes = C::Unit::kBytes;
  static_assert(kRowTiles <= 32);
  Turn<C::kWStages> turn;
  for (int tile = first; tile < tiles; tile += step) {
    const int row_tile = (place_of(p, tile).row_block * me.pair + me.rank) * kRowTiles;
    const unsigned char* from =
        p.weights + (static_cast<std::size_t>(min(row_tile + lane, p.row_tiles - 1)) * p.units +
                     me.first_unit) *
                        kUnitBytes;
    for (int unit = 0; unit < me.units; ++unit, turn.next()) {
      const unsigned to = shared + C::kWOffset + turn.slot * C::kWBytes;
      cuda::barrier_wait(empty + 8 * turn.slot, turn.phase ^ 1);
      if (lane == 0) cuda::barrier_expect(full + 8 * turn.slot, C::kWBytes);
      __syncwarp();  // also so that no lane falls behind by two phases of a barrier
      if constexpr (C::kMapped) {
        if (lane == 0) {
          tile_copy(to, map, (me.first_unit + unit) * (kUnitBytes / kMapElementBytes), row_tile,
                    full + 8 * turn.slot);
        }
      } else {
        if (lane < kRowTiles) {
          cuda::bulk_copy(to + lane * kUnitBytes,
                          from + static_cast<std::size_t>(unit) * kUnitBytes, kUnitBytes,
                          full + 8 * turn.slot);
        }
      }
    }
  }
}

template <class C>
struct Consumer {
  using Unit = typename C::Unit;
  using Fragments = typename Unit::Fragments;
  using Sums = typename Unit::Sum[C::kTokens / 2];
  static constexpr int kTokensPerThread = (C::kTokens + 127) / 128;
  const TileParams& p;
  const Member& me;
  const unsigned shared, x_full, x_empty, w_full, w_empty;
  const int group, warp, lane;  // warp of the warpgroup
  const typename Unit::Where where;
  Turn<C::kXSlots> x, x_read;  // next to multiply, next to give back
  Turn<C::kWStages> w;

  template <int kPart>
  __device__ __forceinline__ void load(Fragments& f) {
    if constexpr (kPart == 0) cuda::barrier_wait(w_full + 8 * w.slot, w.phase);
    Unit::template load<kPart>(
        f, shared + C::kWOffset + w.slot * C::kWBytes + (group * 4 + warp) * Unit::kBytes, where);
  }

  __device__ __forceinline__ void multiply(Sums& sums, const Fragments& f, bool add) {
    cuda::barrier_wait(x_full + 8 * x.slot, x.phase);
    const std::uint64_t b = swizzled_descriptor(shared + x.slot * C::kXBytes);
    x.next();
    wgmma_fence();
    Unit::multiply(sums, f, b, add);
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
    if (lane < me.pair) {
      const unsigned barrier = x_empty + 8 * x_read.slot;
      barrier_arrive_in_cluster(cuda::cluster_address(barrier, me.beside(lane)));
    }
    x_read.next();
  }

  __device__ __forceinline__ void multiply_tile(Sums& sums) {
    Fragments even, odd;
    const int slots = me.units * C::kParts;
    load<0>(even);
#pragma unroll 1
    for (int slot = 0;;) {
      multiply(sums, even, slot > 0);
      if constexpr (C::kParts == 1) give_back_w();
      if (slot > 0) give_back_x<1>();
      if (++slot == slots) break;
      load<C::kParts - 1>(odd);
      multiply(sums, odd, true);
      give_back_w();
      give_back_x<1>();
      if (++slot == slots) break;
      load<0>(even);
    }
    give_back_x<0>();
    hold_sums(sums);
  }

  // The factors of a tile: of this lane's rows, and of some tokens, which all lanes want.
  struct Factors {
    float row[2], token[kTokensPerThread];
  };
  __device__ __forceinline__ Factors load_factors(const Place& place) const {
    Factors f = {};
    if constexpr (Unit::kScaled) {
      const int row = first_row(place) + warp * 16 + (lane >> 2);
      const int last = p.row_tiles * kTileRows - 1;
      f.row[0] = p.scales[min(row, last)];
      f.row[1] = p.scales[min(row + 8, last)];
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int token = first_token<C>(p, place) + i * 128 + warp * 32 + lane;
        f.token[i] = p.x_scales[min(token, p.t - 1)];
      }
    }
    return f;
  }
  __device__ __forceinline__ int first_row(const Place& place) const {
    return (place.row_block * me.pair + me.rank) * C::kRows + group * 64;
  }

  // Before a barrier of the warpgroup, behind which all lanes may read them.
  __device__ __forceinline__ void share(const Factors& factors) const {
    if constexpr (Unit::kScaled) {
#pragma unroll
      for (int i = 0; i < kTokensPerThread; ++i) {
        const int token = i * 128 + warp * 32 + lane;
        if (C::kTokens % 128 != 0 && token >= C::kTokens) break;
        store_shared1(token_scales() + token * 4, factors.token[i]);
      }
    }
  }
  __device__ __forceinline__ unsigned token_scales() const {
    return shared + C::kScaleOffset + group * C::kTokens * 4;
  }

  // The sums are [row][token] over the lanes; y wants rows side by side. stmatrix turns 8 x 8 of
  // them at a time into a chunk of tokens x 64 rows, which one copy stores.
  __device__ __forceinline__ void store_tile(const Sums& sums, const Factors& factors,
                                             const CUtensorMap& map, const Place& place) {
    const unsigned buffers = shared + C::kYOffset + group * C::kYBytes;
    const int token_of_lane = (lane & 7) + (lane >> 4) * 8;  // of 16
    const unsigned piece = (warp * 2 + (lane >> 3 & 1)) ^ (lane & 7);
    const bool leader = warp == 0 && lane == 0;
    const int row = first_row(place);
    const unsigned scales = token_scales();
    share(factors);
#pragma unroll
    for (int c = 0; c < C::kTokens / C::kChunkTokens; ++c) {
      const unsigned buffer = buffers + (c & 1) * C::kChunkBytes;
      if (leader) stores_read<1>();
      barrier_of_group(1 + group);
      const unsigned to = buffer + token_of_lane * 128 + piece * 16;
#pragma unroll
      for (int j = 0; j < C::kChunkTokens / 8; j += 2) {
        unsigned v[4];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const auto* d = &sums[(c * (C::kChunkTokens / 8) + j + i) * 4];
          if constexpr (Unit::kScaled) {
            const float2 token = load_shared_floats(
                scales + (c * C::kChunkTokens + (j + i) * 8 + (lane & 3) * 2) * 4);
            v[2 * i] = scaled_pack(d[0], d[1], factors.row[0], token);
            v[2 * i + 1] = scaled_pack(d[2], d[3], factors.row[1], token);
          } else {
            v[2 * i] = Unit::Half::round(d[0], d[1]);
            v[2 * i + 1] = Unit::Half::round(d[2], d[3]);
          }
        }
        store_matrices_turned(to + j * 8 * 128, v[0], v[1], v[2], v[3]);
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

  // The same of a tile whose parts are in several blocks: the block of part j % kParts gets octet j
  // of the tokens from all others and adds the parts up in their order, so that a token that two
  // tiles share has the same bits in both. `received`: the barrier of this warp's sums.
  template <int kParts>
  __device__ __forceinline__ void exchange_and_store(const Sums& sums, const Factors& factors,
                                                     const CUtensorMap& map, const Place& place,
                                                     unsigned received) {
    constexpr int kMost = C::template kMostOctets<kParts>;
    const int mine = static_cast<int>(kept(me.part));  // (what follows is worked out here)
    const int own = (C::kOctets - mine + kParts - 1) / kParts;
    const unsigned slots =
        shared + C::kSumsOffset + (group * 4 + warp) * kParts * kMost * 512 + lane * 16;
    if (lane == 0) cuda::barrier_expect(received, (kParts - 1) * own * 512);
    share(factors);
    barrier_of_group(1 + group);
#pragma unroll
    for (int d = 0; d < kParts; ++d) {  // each begins with another block
      const int owner = mine + d < kParts ? mine + d : mine + d - kParts;
      const unsigned to = cuda::cluster_address(slots + mine * kMost * 512, me.along(owner));
      const unsigned barrier = cuda::cluster_address(received, me.along(owner));
#pragma unroll
      for (int i = 0; i < kMost; ++i) {
        float v[4];
#pragma unroll
        for (int q = 0; q < 4; ++q) {
          auto sum = sums[4 * i * kParts + q];
#pragma unroll
          for (int part = 1; part < kParts; ++part) {
            const int j = i * kParts + part;
            if (j < C::kOctets) sum = owner == part ? sums[4 * j + q] : sum;
          }
          v[q] = static_cast<float>(sum);
        }
        if (C::kOctets % kParts != 0 && i * kParts + owner >= C::kOctets) continue;
        if (d == 0) {
          cuda::store_shared4(slots + (mine * kMost + i) * 512, v);
        } else {
          cuda::store_cluster4(to + i * 512, v, barrier);
        }
      }
    }
    cuda::barrier_wait_cluster(received, 0);
    const unsigned buffer = shared + C::kYOffset + group * C::kYBytes;
    const unsigned to =
        buffer + (lane & 7) * 128 + (((warp * 2 + (lane >> 3 & 1)) ^ (lane & 7)) * 16);
    const unsigned scales = token_scales() + (mine * 8 + (lane & 3) * 2) * 4;
#pragma unroll
    for (int i = 0; i < kMost; ++i) {
      if (C::kOctets % kParts != 0 && i * kParts + mine >= C::kOctets) continue;
      float v[4] = {-0.f, -0.f, -0.f, -0.f};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        const uint4 sum = cuda::load_shared4(slots + (part * kMost + i) * 512);
        v[0] += __uint_as_float(sum.x);
        v[1] += __uint_as_float(sum.y);
        v[2] += __uint_as_float(sum.z);
        v[3] += __uint_as_float(sum.w);
      }
      const float2 token = load_shared_floats(scales + i * kParts * 8 * 4);
      store_matrices_turned(to + i * 1024, scaled_pack(v[0], v[1], factors.row[0], token),
                            scaled_pack(v[2], v[3], factors.row[1], token));
    }
    async_proxy_fence();
    barrier_of_group(1 + group);
    const int row = first_row(place);
    if (lane == 0 && row < p.n) {
#pragma unroll 1
      for (int i = warp; i < own; i += 4) {
        const int token = first_token<C>(p, place) + (mine + i * kParts) * 8;
        if (token < p.t) tile_store(map, row, token, buffer + i * 1024);
      }
      stores_commit();
    }
  }
};

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    wgmma_sp_kernel(const TileParams p, const __grid_constant__ CUtensorMap x_map,
                    const __grid_constant__ CUtensorMap w_map,
                    const __grid_constant__ CUtensorMap y_map) {
  extern __shared__ unsigned char memory[];
  // Swizzled tiles begin at multiples of 1,024 bytes, at the same place in all blocks of a cluster.
  const unsigned shared = (cuda::shared_address(memory) + 1023) & ~1023u;
  const unsigned x_full = shared + C::kBarrierOffset, x_empty = x_full + 8 * C::kXSlots,
                 w_full = x_empty + 8 * C::kXSlots, w_empty = w_full + 8 * C::kWStages,
                 received = w_empty + 8 * C::kWStages;
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const Member me = member_of<C>(p);
  const int first = static_cast<int>(blockIdx.x) / (me.pair * me.parts);
  const int step = static_cast<int>(gridDim.x) / (me.pair * me.parts);
  const int tiles = p.row_blocks * p.token_blocks;

  if (threadIdx.x == 0) {
    for (int i = 0; i < C::kXSlots; ++i) {
      cuda::barrier_init(x_full + 8 * i, 1);
      cuda::barrier_init(x_empty + 8 * i, me.pair * C::kConsumers * 4);
    }
    for (int i = 0; i < C::kWStages; ++i) {
      cuda::barrier_init(w_full + 8 * i, 1);
      cuda::barrier_init(w_empty + 8 * i, C::kConsumers * 4);
    }
    if constexpr (C::kSplit) {
      for (int i = 0; i < C::kConsumers * 4; ++i) cuda::barrier_init(received + 8 * i, 1);
    }
    cuda::barrier_init_fence();
  }
  __syncthreads();
  cuda::cluster_arrive();
  if constexpr (C::Unit::kScaled) cuda::launch_next();
  cuda::cluster_wait();

  if (warp >= C::kConsumers * 4) {
    give_registers<C::kFetchRegisters>();
    if (warp == C::kConsumers * 4) {
      if (lane == 0) {
        if constexpr (C::Unit::kScaled) {
          fetch_map(x_map);
          cuda::await_previous();
        }
        produce_x<C>(p, x_map, shared, x_full, x_empty, me, first, tiles, step);
      }
    } else if (warp == C::kConsumers * 4 + 1) {
      produce_w<C>(p, w_map, shared, w_full, w_empty, me, first, tiles, step, lane);
    } else if (warp == C::kConsumers * 4 + 2) {
      if (C::Unit::kScaled && lane == 0) fetch_map(y_map);
    }
    __syncwarp();
  } else {
    take_registers<C::kMultiplyRegisters>();
    Consumer<C> consumer{p,
                         me,
                         shared,
                         x_full,
                         x_empty,
                         w_full,
                         w_empty,
                         warp / 4,
                         warp % 4,
                         lane,
                         C::Unit::where(lane)};
    typename Consumer<C>::Sums sums;
    if constexpr (C::Unit::kScaled) cuda::await_previous();
#pragma unroll 1
    for (int tile = first; tile < tiles; tile += step) {
      const auto factors = consumer.load_factors(place_of(p, tile));
      consumer.multiply_tile(sums);
      if constexpr (C::kSplit) {
        const auto exchange = [&](auto parts) {
          consumer.template exchange_and_store<decltype(parts)::value>(
              sums, factors, y_map, place_of(p, tile), received + 8 * warp);
        };
        if (me.parts == 2) exchange(std::integral_constant<int, 2>());
        if (me.parts == 3) exchange(std::integral_constant<int, 3>());
        if (me.parts == 4) exchange(std::integral_constant<int, 4>());
      } else {
        consumer.store_tile(sums, factors, y_map, place_of(p, tile));
      }
    }
    if (lane == 0) stores_read<0>();
  }
  // No block leaves while another may still write into its memory.
  cuda::cluster_arrive();
  cuda::cluster_wait();
}

// ---------- host ----------

struct TileVariant {
  int rows, tokens;
  bool split, mapped;
  void (*kernel)(const TileParams, const CUtensorMap, const CUtensorMap, const CUtensorMap);
  int most_parts, threads, shared_bytes, chunk_tokens;
};
template <class C>
constexpr TileVariant tile_variant() {
  return {C::kRows,    C::kTokens,         C::kSplit,
          C::kMapped,  wgmma_sp_kernel<C>, C::kMostParts,
          C::kThreads, C::kSharedBytes,    C::kSplit ? 8 : C::kChunkTokens};
}
inline constexpr int kMostTileVariants = 8;
// Token tiles that are walked for the same rows before the next rows.
inline constexpr int kBand = 8;

// How a launch looks.
struct TileLaunch {
  cudaLaunchConfig_t config = {};
  cudaLaunchAttribute attributes[2] = {};

  TileLaunch(const TileVariant& v, int cluster, std::int64_t clusters, bool after_rounding,
             cudaStream_t stream) {
    attributes[0].id = cudaLaunchAttributeClusterDimension;
    attributes[0].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
    attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[1].val.programmaticStreamSerializationAllowed = 1;
    config.gridDim = static_cast<unsigned>(clusters * cluster);
    config.blockDim = static_cast<unsigned>(v.threads);
    config.dynamicSmemBytes = static_cast<std::size_t>(v.shared_bytes);
    config.stream = stream;
    config.attrs = attributes;
    config.numAttrs = after_rounding ? 2 : 1;
  }
};

// Clusters that the current device holds at one time, asked for once (with what a launch needs).
// @param cluster  blocks of each, up to 8
template <class Unit>
cudaError_t tile_clusters_at_once(int variant, int cluster, int* count) {
  static std::atomic<int> known[16][kMostTileVariants][9];  // [device]
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  std::atomic<int>* remembered = device < 16 ? &known[device][variant][cluster] : nullptr;
  if (remembered != nullptr && (*count = remembered->load()) > 0) return cudaSuccess;
  if (cuda::sm90_refusal(device) != nullptr) return cudaErrorNotSupported;
  const TileVariant& v = Unit::kTileVariants[variant];
  error =
      cudaFuncSetAttribute(v.kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, v.shared_bytes);
  if (error != cudaSuccess) return error;
  const TileLaunch launch(v, cluster, 1, false, nullptr);
  error = cudaOccupancyMaxActiveClusters(count, v.kernel, &launch.config);
  if (error != cudaSuccess) return error;
  if (*count < 1) return cudaErrorNotSupported;
  if (remembered != nullptr) remembered->store(*count);
  return cudaSuccess;
}

// The driver's function, which the runtime finds: the library is not linked against libcuda.
inline decltype(&cuTensorMapEncodeTiled) encoder() {
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

// A row-major matrix, copied in boxes of 128 bytes of columns. @param element_bytes  2: bf16 or
// f16, which a copy only moves
inline cudaError_t make_map(const void* matrix, std::int64_t rows, std::int64_t columns,
                            int element_bytes, int box_rows, CUtensorMap* map) {
  if (encoder() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns * element_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kSlotBytes / element_bytes),
                            static_cast<cuuint32_t>(box_rows)},
                   steps[] = {1, 1};
  const CUresult result = encoder()(
      map, element_bytes == 2 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_UINT8, 2,
      const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

// Packed units [row tile][unit], copied in boxes of one unit of some row tiles.
inline cudaError_t make_weight_map(const void* weights, std::int64_t row_tiles, std::int64_t units,
                                   int unit_bytes, int box_row_tiles, CUtensorMap* map) {
  if (encoder() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(units * unit_bytes / kMapElementBytes),
                              static_cast<cuuint64_t>(row_tiles)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(units * unit_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(unit_bytes / kMapElementBytes),
                            static_cast<cuuint32_t>(box_row_tiles)},
                   steps[] = {1, 1};
  const CUresult result =
      encoder()(map, CU_TENSOR_MAP_DATA_TYPE_FLOAT64, 2, const_cast<void*>(weights), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? cudaSuccess : cudaErrorInvalidValue;
}

inline bool aligned(const void* p) {
  return p != nullptr && reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// The variant of a plan, or a number past the last.
template <class Unit>
int tile_variant_of(const WgmmaSpPlan& plan) {
  const auto& all = Unit::kTileVariants;
  const auto fits = [&](const TileVariant& v) {
    return v.rows == plan.rows && v.tokens == plan.tokens && v.split == plan.split;
  };
  return static_cast<int>(std::find_if(all.begin(), all.end(), fits) - all.begin());
}

// y = x W^T. @param scales, x_scales  where Unit::kScaled, the kernel ahead having written x and
// x_scales
template <class Unit>
cudaError_t tile_run(const void* packed, const float* scales, const void* x, const float* x_scales,
                     void* y, std::int64_t n, std::int64_t k, std::int64_t t,
                     const WgmmaSpPlan& plan, cudaStream_t stream) {
  const int index = tile_variant_of<Unit>(plan);
  const std::int64_t units = k / kUnitColumns;
  if (t < 1 || t >= (1 << 28) || index == static_cast<int>(Unit::kTileVariants.size()) ||
      plan.band < 1 || !aligned(packed) || !aligned(x) || !aligned(y)) {
    return cudaErrorInvalidValue;
  }
  const TileVariant& v = Unit::kTileVariants[index];
  const int cluster = plan.pair * plan.parts;
  if ((plan.pair != 1 && plan.pair != 2) || (!v.split && plan.pair != kPair) ||
      plan.parts < (v.split ? 2 : 1) || plan.parts > v.most_parts || plan.parts > units) {
    return cudaErrorInvalidValue;
  }
  TileParams p = {};
  p.weights = static_cast<const unsigned char*>(packed);
  p.scales = scales;
  p.x_scales = x_scales;
  p.n = static_cast<int>(n);
  p.t = static_cast<int>(t);
  p.row_tiles = static_cast<int>(ceil_div(n, kTileRows));
  p.units = static_cast<int>(units);
  p.row_blocks = static_cast<int>(ceil_div(n, v.rows * plan.pair));
  p.token_blocks = static_cast<int>(ceil_div(t, v.tokens));
  p.band = plan.band;
  p.pair = plan.pair;
  p.parts = plan.parts;
  const std::int64_t tiles = static_cast<std::int64_t>(p.row_blocks) * p.token_blocks;
  if (tiles > (1 << 27)) return cudaErrorInvalidValue;
  CUtensorMap x_map, w_map = {}, y_map;
  cudaError_t error = make_map(x, t, k, Unit::kElementBytes, v.tokens / plan.pair, &x_map);
  if (error == cudaSuccess && v.mapped) {
    error = make_weight_map(packed, p.row_tiles, units, Unit::kBytes, v.rows / kTileRows, &w_map);
  }
  if (error == cudaSuccess) error = make_map(y, t, n, 2, v.chunk_tokens, &y_map);
  int clusters = 0;
  if (error == cudaSuccess) error = tile_clusters_at_once<Unit>(index, cluster, &clusters);
  if (error != cudaSuccess) return error;
  // Without parts every cluster stays and walks over tiles.
  const TileLaunch launch(v, cluster, v.split ? tiles : std::min<std::int64_t>(clusters, tiles),
                          Unit::kScaled, stream);
  return cudaLaunchKernelEx(&launch.config, v.kernel, p, x_map, w_map, y_map);
}

}  // namespace lacuna::kernels::linear_nm
