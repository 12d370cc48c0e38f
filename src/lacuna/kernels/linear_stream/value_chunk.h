// One chunk of a tile on its way into the stream and out again: 16 rows by 64 columns and blocks.
#pragma once

#include <cstdint>
#include <span>

#include "lacuna/kernels/stream.h"

namespace lacuna::kernels::linear_stream {

using stream::kChunk;
using stream::kTileRows;

/// The rows of a chunk as a matrix has them. What lies outside the matrix keeps nothing.
struct ChunkRows {
  uint64_t masks[kTileRows];  ///< a bit a column
  /// The kept values of each row; 64 bytes may be read at any of them. Packing moves them on to the
  /// next chunk's.
  const uint8_t* values[kTileRows];
};

/// The weights of a chunk, row by row, 0 where dropped.
using ChunkWeights = uint16_t[kTileRows][kChunk];

/// Between those and a chunk as stream.h draws it. All implementations write the same bytes.
struct ChunkTool {
  const char* name;
  bool runs_here;  ///< this CPU has what it needs
  /// @return bytes of the chunk; up to kMostValueChunkBytes may be written
  int64_t (*pack)(ChunkRows& rows, uint8_t* chunk);
  /// @return bytes of the chunk; 64 behind it may be read
  int64_t (*unpack)(const uint8_t* chunk, ChunkWeights& out);
};

/// All of them, fastest first, the portable one last.
std::span<const ChunkTool> chunk_tools();
/// The first that runs here.
const ChunkTool& chunk_tool();

// The implementations, one file each.
int64_t pack_chunk_avx512(ChunkRows& rows, uint8_t* chunk);
int64_t unpack_chunk_avx512(const uint8_t* chunk, ChunkWeights& out);
int64_t unpack_chunk_portable(const uint8_t* chunk, ChunkWeights& out);

}  // namespace lacuna::kernels::linear_stream
