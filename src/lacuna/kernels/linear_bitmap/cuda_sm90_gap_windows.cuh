// Packing of windows (kWindowBits). First each row is cut into chunks of 16 places at most, each
// within 127 columns from the last place of the chunk before; a chunk with room keeps a zero at the
// 127th column where the row goes on beyond it. Then the 16 places of each lane get an order.
//
// Shared memory gives a gather of 8 bytes to 16 lanes at a time, as many turns as the fullest of 16
// pairs of banks has different columns: 2.8 if they lie anywhere, 1.4 to 1.7 in the order that is
// found here. One lane after the other puts its places, each where its pair of banks has the fewest
// columns so far (the same column counts once); where several have, rather beside itself, then
// where no other pair of banks has more.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_pack.cuh"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_units.cuh"

namespace lacuna::kernels::linear_bitmap {
namespace {

constexpr int kWindowPlaces = chunk_values(kWindowBits);
constexpr int kWindowReach = (1 << kWindowBits) - 1;  // columns
// The last column of a chunk stands in one of its last places: the next counts from there.
constexpr int kFirstEnd = 12;
constexpr int kOrderWarps = 8;

// One warp walks along a row that keeps `kept` weights: begin(chunk, column) with the column after
// the last place, then by the lanes that have one take(i, offset, value) for place i. A bridge has
// the value 0.
// Returns the chunks; `column` is the one after the last place.
template <class Begin, class Take>
__device__ __forceinline__ unsigned walk_windows(const unsigned short* from, int k, int top,
                                                 unsigned kept, int& column, const Begin& begin,
                                                 const Take& take) {
  const int lane = threadIdx.x & 31;
  const unsigned below = (1u << lane) - 1;
  unsigned done = 0, chunk = 0;
  for (column = 0; done < kept; ++chunk) {
    begin(chunk, column);
    const int end = column + kWindowReach;
    int taken = 0, last = column - 1;
    for (int at = column; taken < kWindowPlaces && at < min(end, k); at += 32) {
      const int own = at + lane;
      const unsigned value = load_weight(from, own, k);
      const bool there = value != 0 && fits(value, top) && own < end;
      const int place = taken + __popc(__ballot_sync(~0u, there) & below);
      const bool mine = there && place < kWindowPlaces;
      if (mine) take(place, own - column + 1, value);
      const unsigned all = __ballot_sync(~0u, mine);
      taken += __popc(all);
      if (all != 0) last = at + 31 - __clz(all);
    }
    done += taken;
    if (taken < kWindowPlaces && done < kept && last < end - 1) {
      last = end - 1;
      if (lane == 0) take(taken, kWindowReach, 0u);
    }
    column = last + 1;
  }
  return chunk;
}

__global__ void __launch_bounds__(256)
    window_count_kernel(const unsigned short* dense, int n, int k, int, const int* top_of_all,
                        RowCount* counts) {
  const int lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= n) return;
  const unsigned short* from = dense + static_cast<std::size_t>(row) * k;
  const int top = *top_of_all;
  unsigned kept = 0, strays = 0;
#pragma unroll 4
  for (int column = 0; column < k; column += 32) {
    const unsigned short value = load_weight(from, column + lane, k);
    const bool fit = fits(value, top);
    kept += __popc(__ballot_sync(~0u, value != 0 && fit));
    strays += __popc(__ballot_sync(~0u, value != 0 && !fit));
  }
  int column;
  const unsigned chunks = walk_windows(
      from, k, top, kept, column, [](unsigned, int) {}, [](int, int, unsigned) {});
  // A row without weights has a chunk too: unpacking writes the rows of chunks.
  const unsigned places = kWindowPlaces * max(chunks, 1u);
  if (lane == 0) counts[row] = {kept, {places, places}, strays};
}

// One warp packs one row, in the order of its columns.
__global__ void __launch_bounds__(256) window_pack_kernel(const PackParams p) {
  using Unit = GapUnit<GapValues::kBf16, kWindowBits>;
  const int lane = threadIdx.x & 31;
  const int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (row >= p.n) return;
  const unsigned short* from = p.dense + static_cast<std::size_t>(row) * p.k;
  const RowHome home = p.homes[row];
  const RowCount count = p.counts[row];
  const unsigned total = p.totals[home.block];
  const unsigned rows = 32 / p.lanes_per_row;
  unsigned to_lane = 0;
  unsigned char* to = nullptr;  // the chunk
  const auto begin = [&](unsigned place, int column) {
    const unsigned piece = place / home.chunks, in_piece = place % home.chunks;
    to_lane = (home.lane & 255) + piece * rows;
    const unsigned chunk = home.first_chunk + in_piece;
    const unsigned warp = (p.warps * (chunk + 1) - 1) / total;
    const unsigned own = chunk - warp * total / p.warps;
    const std::size_t stream = static_cast<std::size_t>(home.block) * p.warps + warp;
    to = p.packed + p.streams + stream * p.pitch + own * Unit::kChunkBytes;
    const auto start = [&](std::size_t at) {
      if (lane == 0) {
        reinterpret_cast<unsigned short*>(p.packed + at)[to_lane] =
            static_cast<unsigned short>(column);
      }
    };
    if (own == 0) start(p.warp_starts + stream * kStartBytes);
    if (in_piece == 0 && p.lanes_per_row > 1) {
      const std::size_t group =
          static_cast<std::size_t>(home.block) * p.groups_per_block + (home.lane >> 8);
      start(p.group_starts + group * kStartBytes);
    }
  };
  int column;
  unsigned chunk = walk_windows(
      from, p.k, p.top, count.kept, column, begin, [&](int i, int offset, unsigned value) {
        Unit::put(to, i, to_lane, value, static_cast<unsigned>(offset), p.top);
      });
  for (; chunk < home.chunks * p.lanes_per_row; ++chunk) begin(chunk, column);
  if (count.strays == 0) return;
  unsigned* stray = reinterpret_cast<unsigned*>(p.packed + p.strays) + home.stray;
  for (int column0 = 0; column0 < p.k; column0 += 32) {
    const unsigned value = load_weight(from, column0 + lane, p.k);
    const bool strays = value != 0 && !fits(value, p.top);
    const unsigned all = __ballot_sync(~0u, strays);
    if (strays) stray[__popc(all & ((1u << lane) - 1))] = value << 16 | (column0 + lane);
    stray += __popc(all);
  }
}

// 16 lanes: the least.
__device__ __forceinline__ unsigned least_of_half(unsigned key) {
#pragma unroll
  for (int d = 8; d > 0; d /= 2) key = min(key, __shfl_xor_sync(~0u, key, d));
  return key;
}

// The order of the places of 16 lanes each. `columns`: of the lane's places; `end`: which of them
// is the last column. Returns 4 bits a place, the lowest those of place 0: which place to put
// there. `sets`: 17 words a lane. While places are put, lane l stands for place l % 16 of all
// lanes, and its words for the pairs of banks: a bit for each column (the same for each 512th).
__device__ __forceinline__ unsigned long long order_of(const unsigned (&columns)[kWindowPlaces],
                                                       int end, unsigned* sets) {
  const int lane = threadIdx.x & 31, own = lane % 16;
  unsigned* const set = sets + lane * 17;
#pragma unroll
  for (int b = 0; b < 16; ++b) set[b] = 0;
  unsigned last_column = 0;
#pragma unroll
  for (int i = 0; i < kWindowPlaces; ++i) {
    if (i == end) last_column = columns[i];
  }
  unsigned long long order = 0;
  int most = 0;  // columns of a pair of banks
#pragma unroll 1
  for (int l = 0; l < 16; ++l) {
    bool used = false;
    const auto put = [&](unsigned column, int place, bool open, bool any) {
      const unsigned there = set[column % 16], bit = 1u << (column / 16 % 32);
      const int turns = __popc(there | bit);
      const int cost = 2 * turns + ((there & bit) == 0);
      const unsigned key = open && !used ? (cost << 5 | max(most - turns, 0)) << 4 | own : ~0u;
      const int winner = static_cast<int>(least_of_half(key) % 16);
      if (!any) return;
      if (own == winner) {
        used = true;
        most = max(most, turns);
        set[column % 16] = there | bit;
      }
      if (own == l) order |= static_cast<unsigned long long>(place) << (4 * winner);
    };
    put(__shfl_sync(~0u, last_column, l, 16), end, own >= kFirstEnd, true);
    const int their_end = __shfl_sync(~0u, end, l, 16);
#pragma unroll
    for (int i = 0; i < kWindowPlaces; ++i) {
      put(__shfl_sync(~0u, columns[i], l, 16), i, true, i != their_end);
    }
  }
  return order;
}

// One warp orders the chunks of one stream.
__global__ void __launch_bounds__(kOrderWarps * 32)
    window_order_kernel(const PackParams p, int streams) {
  using Unit = GapUnit<GapValues::kBf16, kWindowBits>;
  __shared__ unsigned sets[kOrderWarps][32 * 17];
  __shared__ unsigned held[kOrderWarps][kWindowPlaces][32];  // 16 bits of value and offset, offset
  const int lane = threadIdx.x & 31, own = threadIdx.x >> 5;
  const int stream = blockIdx.x * kOrderWarps + own;
  if (stream >= streams) return;
  const unsigned block = stream / p.warps, warp = stream % p.warps;
  const unsigned first_chunk =
      reinterpret_cast<const unsigned*>(p.packed + block * p.table_stride)[lane];
  const unsigned total = __shfl_sync(~0u, first_chunk, 31);
  const unsigned begin = warp * total / p.warps, end = (warp + 1) * total / p.warps;
  int group = __popc(__ballot_sync(~0u, first_chunk <= begin)) - 1;
  const auto starts = [&](std::size_t at) {
    return reinterpret_cast<const unsigned short*>(p.packed + at)[lane];
  };
  unsigned base = starts(p.warp_starts + static_cast<std::size_t>(stream) * kStartBytes);
  for (unsigned chunk = begin; chunk < end; ++chunk) {
    bool next_group = false;
    while (chunk >= __shfl_sync(~0u, first_chunk, group + 1)) ++group, next_group = true;
    if (next_group) {
      base = p.lanes_per_row == 1
                 ? 0
                 : starts(p.group_starts + (block * p.groups_per_block + group) * kStartBytes);
    }
    unsigned char* const at = p.packed + p.streams + static_cast<std::size_t>(stream) * p.pitch +
                              (chunk - begin) * Unit::kChunkBytes;
    Unit unit(at, lane);
    unit.load(0, 0, 1);
    unsigned columns[kWindowPlaces], most = 0;
    int last = 0;
#pragma unroll
    for (int q = 0; q < 4; ++q) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int i = 4 * q + j;
        const unsigned offset = unit.offsets(0, q) >> (j % 2 * 16 + j / 2 * 8) & kWindowReach;
        held[own][i][lane] = (unit.word(0, i / 2) >> (i % 2 * 16) & 0xffff) | offset << 16;
        columns[i] = base + offset;
        if (offset > most) last = i;
        most = max(most, offset);
      }
    }
    const unsigned long long order = order_of(columns, last, sets[own]);
    __syncwarp();
    unsigned words[kWindowPlaces / 2] = {}, upper[2] = {};
#pragma unroll
    for (int i = 0; i < kWindowPlaces; ++i) {
      const unsigned place = held[own][order >> (4 * i) & 15][lane];
      words[i / 2] |= (place & 0xffff) << (i % 2 * 16);
      upper[Unit::upper_at(i) / 32] |= place >> 19 << (Unit::upper_at(i) % 32);
    }
    uint4* const to = reinterpret_cast<uint4*>(at) + lane;
    to[0] = make_uint4(words[0], words[1], words[2], words[3]);
    to[kVectorBytes / 16] = make_uint4(words[4], words[5], words[6], words[7]);
    reinterpret_cast<uint2*>(at + 2 * kVectorBytes)[lane] = make_uint2(upper[0], upper[1]);
    __syncwarp();
    base += most;
  }
}

}  // namespace
}  // namespace lacuna::kernels::linear_bitmap
