// Weights as streams: what all who write or read one agree on (linear_coded, linear_stream, tiled).
//
// Rows go in tiles of 16, a tile in chunks of 64 columns, a chunk in blocks that one 512-bit
// register holds: 16 lanes of 32 bits, lane r for row r. A thread reads its tiles from front to
// back, and a row's sum stays in its lane.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lacuna/format/element.h"
#include "lacuna/format/task_split.h"

namespace lacuna::kernels::stream {

/// Rows of a tile, and columns of a chunk.
inline constexpr int64_t kTileRows = 16;
inline constexpr int64_t kChunk = 64;
inline constexpr int64_t tile_count(int64_t rows) { return format::ceil_div(rows, kTileRows); }
inline constexpr int64_t chunk_count(int64_t columns) { return format::ceil_div(columns, kChunk); }

/// Lines are asked for twice, from far for the second-level cache, from near for the first: few
/// may be on their way to the first at a time. The prefetchers of the hardware stop at every 4 KiB.
inline constexpr int64_t kNear = 1024, kFar = 6144;
inline void ask_near(const uint8_t* at) { __builtin_prefetch(at + kNear, 0, 3); }
inline void ask_far(const uint8_t* at) { __builtin_prefetch(at + kFar, 0, 2); }

/// Runs of tiles that threads take one after the other, each time half of what is left until a
/// sixteenth is: a thread loses time where it begins a run (no line has been asked for yet), and
/// the others wait for the last one.
class Tasks {
 public:
  Tasks(int64_t tiles, int64_t most_threads)
      : tiles_(tiles), threads_(std::clamp<int64_t>(tiles / 2, 1, most_threads)) {}
  int64_t count() const { return threads_ == 1 ? 1 : kRounds * threads_; }
  /// @param bytes_before  of a tile
  template <class BytesBefore>
  int64_t first_tile(int64_t task, BytesBefore&& bytes_before) const {
    if (threads_ == 1) return task == 0 ? 0 : tiles_;
    const int64_t round = task / threads_, share = kUnits >> std::min(round + 1, kRounds - 1);
    const int64_t before = round < kRounds ? kUnits - (kUnits >> round) : kUnits;
    return format::first_of_task(tiles_, before * threads_ + task % threads_ * share,
                                 kUnits * threads_, bytes_before);
  }

 private:
  static constexpr int64_t kRounds = 5, kUnits = 16;  // a thread's share, 8 + 4 + 2 + 1 + 1
  int64_t tiles_, threads_;
};

// --- Values of 16 bits ---------------------------------------------------------------------------
//
// A chunk, in what format::RowsView::stream points to:
//
//     |masks|   u32 each, of blocks 0..31; bit 2r + c: column c of row r in the block
//     |values|  of the kept weights, block after block, in the order of the mask's bits
//
// Lane r of block b stands for columns 2b and 2b + 1 of row r. 16 blocks one after the other are a
// tile of AMX as its second operand wants it.

inline constexpr int64_t kValueBlockColumns = 2;
inline constexpr int64_t kValueBlocks = kChunk / kValueBlockColumns;
inline constexpr int64_t kValueMaskBytes = kValueBlocks * 4;
inline constexpr int64_t kValueBlockBytes = 64;
inline constexpr int64_t kMostValueChunkBytes = kValueMaskBytes + kValueBlocks * kValueBlockBytes;

}  // namespace lacuna::kernels::stream
