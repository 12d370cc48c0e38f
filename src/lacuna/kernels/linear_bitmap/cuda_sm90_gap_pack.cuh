// Counting what a weight keeps, and packing it for cuda_sm90_gap: gaps.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_units.cuh"

namespace lacuna::kernels::linear_bitmap {
namespace {

constexpr int kStartBytes = 64;  // one 16-bit column a lane

// Of one row, found by counting.
struct RowCount {
  unsigned kept;       // without strays
  unsigned places[2];  // with gaps of 3 and 4 bits; of windows both the same
  unsigned strays;
};

// Where a row goes.
struct RowHome {
  unsigned block;
  unsigned first_chunk;  // of its group, in its block
  unsigned chunks;       // of each lane of its group
  unsigned lane;         // first lane | group of the block << 8
  unsigned stray;        // its first
};

// The places of 32 columns: kept values and, in runs of zeros, every 2^bits-th zero.
struct Stretch {
  unsigned kept, places;
};

// `run`: zeros directly before the stretch, updated.
template <int kBits>
__device__ __forceinline__ Stretch stretch_of(unsigned kept, unsigned valid, int lane, int& run) {
  const unsigned before = kept & ((1u << lane) - 1);
  const int zeros = before ? lane - 32 + __clz(before) : run + lane;  // before this column
  const bool bridge = !(kept >> lane & 1) && (valid >> lane & 1) &&
                      (zeros & ((1 << kBits) - 1)) == (1 << kBits) - 1;
  Stretch w;
  w.kept = kept;
  w.places = kept | __ballot_sync(~0u, bridge);
  run = kept ? __clz(kept) : run + 32;
  return w;
}

__device__ __forceinline__ unsigned short load_weight(const unsigned short* row, int column,
                                                      int k) {
  const unsigned short v = column < k ? row[column] : 0;
  return (v & 0x7fff) ? v : 0;
}

// The largest exponent of W that may be `top`.
__global__ void __launch_bounds__(256)
    gap_top_kernel(const unsigned short* dense, std::size_t size, int* top) {
  int most = 1;
  const std::size_t all = static_cast<std::size_t>(gridDim.x) * blockDim.x;
#pragma unroll 8
  for (std::size_t i = blockIdx.x * static_cast<std::size_t>(blockDim.x) + threadIdx.x; i < size;
       i += all) {
    const int e = exponent_of(dense[i]);
    if (e <= kMostTop) most = max(most, e);
  }
  most = __reduce_max_sync(~0u, most);
  if ((threadIdx.x & 31) == 0) atomicMax(top, most);
}

__global__ void __launch_bounds__(256)
    gap_count_kernel(const unsigned short* dense, int n, int k, int k_padded, const int* top_of_all,
                     RowCount* counts) {
  const int lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= n) return;
  const unsigned short* from = dense + static_cast<std::size_t>(row) * k;
  const int top = *top_of_all;
  int run3 = 0, run4 = 0;
  unsigned kept_count = 0, places3 = 0, places4 = 0, strays = 0;
#pragma unroll 4
  for (int column = 0; column < k_padded; column += 32) {
    const unsigned short value = load_weight(from, column + lane, k);
    const bool fit = fits(value, top);
    const unsigned kept = __ballot_sync(~0u, value != 0 && fit);
    strays += __popc(__ballot_sync(~0u, value != 0 && !fit));
    const unsigned valid = k_padded - column >= 32 ? ~0u : (1u << (k_padded - column)) - 1;
    kept_count += __popc(kept);
    places3 += __popc(stretch_of<3>(kept, valid, lane, run3).places);
    places4 += __popc(stretch_of<4>(kept, valid, lane, run4).places);
  }
  if (lane == 0) counts[row] = {kept_count, {places3, places4}, strays};
}

struct PackParams {
  const unsigned short* dense;
  const RowCount* counts;
  const RowHome* homes;
  const unsigned* totals;
  unsigned char* packed;
  int n, k, k_padded, top;
  int lanes_per_row, warps, groups_per_block;
  std::size_t table_stride, warp_starts, group_starts, streams, pitch, strays;
};

// One warp packs one row. Beside the places that gaps need, zeros spread evenly over the row fill
// its lanes up to the length of its group.
template <GapValues kValues, int kBits>
__global__ void __launch_bounds__(256) gap_pack_kernel(const PackParams p) {
  const int lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= p.n) return;
  const unsigned short* from = p.dense + static_cast<std::size_t>(row) * p.k;
  const RowHome home = p.homes[row];
  const unsigned places = p.counts[row].places[kBits - 3];
  const unsigned lane_places = home.chunks * chunk_values(kBits);
  const unsigned extra = lane_places * p.lanes_per_row - places;  // zeros to add
  const unsigned free_places = p.k_padded - places;
  const unsigned total = p.totals[home.block];
  const unsigned rows = 32 / p.lanes_per_row;
  int run = 0;
  unsigned done = 0, passed = 0;  // places taken and free columns passed
  int last = -1;                  // column of the last place
  unsigned* stray = reinterpret_cast<unsigned*>(p.packed + p.strays) + home.stray;
  for (int column0 = 0; column0 < p.k_padded; column0 += 32) {
    const int column = column0 + lane;
    unsigned value = load_weight(from, column, p.k);
    const bool strays = value != 0 && !fits(value, p.top);
    const unsigned all_strays = __ballot_sync(~0u, strays);
    if (strays) {
      stray[__popc(all_strays & ((1u << lane) - 1))] = value << 16 | column;
      value = 0;
    }
    stray += __popc(all_strays);
    const unsigned kept = __ballot_sync(~0u, value != 0);
    const unsigned valid = p.k_padded - column0 >= 32 ? ~0u : (1u << (p.k_padded - column0)) - 1;
    const Stretch w = stretch_of<kBits>(kept, valid, lane, run);
    const unsigned below = (1u << lane) - 1;
    const unsigned open = valid & ~w.places;
    bool take = w.places >> lane & 1;
    if (open >> lane & 1) {
      const unsigned j = passed + __popc(open & below);
      take = (j + 1) * extra / free_places > j * extra / free_places;
    }
    passed += __popc(open);
    const unsigned taken = __ballot_sync(~0u, take);
    if (take) {
      const unsigned before = taken & below;
      const int previous = before ? column0 + 31 - __clz(before) : last;
      const unsigned place = done + __popc(before);
      const unsigned piece = place / lane_places, in_piece = place % lane_places;
      const unsigned to_lane = (home.lane & 255) + piece * rows;
      const unsigned i = in_piece % chunk_values(kBits);
      const unsigned chunk = home.first_chunk + in_piece / chunk_values(kBits);
      const unsigned warp = (p.warps * (chunk + 1) - 1) / total;
      const unsigned own = chunk - warp * total / p.warps;
      const std::size_t stream = static_cast<std::size_t>(home.block) * p.warps + warp;
      unsigned char* unit =
          p.packed + p.streams + stream * p.pitch +
          static_cast<std::size_t>(own / unit_chunks(kBits)) * unit_bytes(kValues, kBits);
      GapUnit<kValues, kBits>::put(unit, own % unit_chunks(kBits), i, to_lane, value,
                                   column - previous - 1, p.top);
      if (i == 0) {
        if (own == 0) {
          reinterpret_cast<unsigned short*>(p.packed + p.warp_starts +
                                            stream * kStartBytes)[to_lane] =
              static_cast<unsigned short>(previous + 1);
        }
        if (chunk == home.first_chunk && p.lanes_per_row > 1) {
          const std::size_t group =
              static_cast<std::size_t>(home.block) * p.groups_per_block + (home.lane >> 8);
          reinterpret_cast<unsigned short*>(p.packed + p.group_starts +
                                            group * kStartBytes)[to_lane] =
              static_cast<unsigned short>(previous + 1);
        }
      }
    }
    done += __popc(taken);
    if (taken) last = column0 + 31 - __clz(taken);
  }
}

}  // namespace
}  // namespace lacuna::kernels::linear_bitmap
