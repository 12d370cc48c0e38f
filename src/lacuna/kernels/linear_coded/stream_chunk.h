// One chunk of a tile on its way into the stream: 16 rows by 64 columns turned into blocks.
#pragma once

#include <cstdint>
#include <span>

#include "lacuna/kernels/linear_coded/stream.h"

namespace lacuna::kernels::linear_coded {

/// Bytes that may be read behind the first code of a row's chunk, however many there are.
inline constexpr int64_t kCodeRoom = 64;

/// The rows of a chunk as a matrix has them. What lies outside the matrix keeps nothing.
struct ChunkRows {
  const uint64_t* masks;  ///< [16], a bit a column
  /// The kept codes of each row: int8 a byte each, int4 two a byte, 8 standing for 0. kCodeRoom
  /// bytes may be read. Packing moves them on to the next chunk's.
  const uint8_t* codes[kTileRows];
};

/// Sums of the codes of each row in the lower and the upper half of the columns.
using ChunkSums = int32_t[2][kTileRows];

/// The most bytes that the codes of a chunk take, and that packing may write.
inline constexpr int64_t kMostCodeBytes = kBlocks * kBlockWeights + 64;

/// Writes masks (16, 8 or none of them) and codes of a chunk as stream.h draws them.
/// @return bytes of the codes; of those behind them up to `kMostCodeBytes` may be anything
using PackChunk = int64_t (*)(format::Code code, Masks kind, ChunkRows& rows, uint8_t* masks,
                              uint8_t* codes, ChunkSums& sums);

/// One implementation. All write the same bytes.
struct ChunkPacker {
  const char* name;
  bool runs_here;  ///< this CPU has what it needs
  PackChunk pack;
};

/// All of them, fastest first, the portable one last.
std::span<const ChunkPacker> chunk_packers();
/// The first that runs here.
const ChunkPacker& chunk_packer();

// The implementations, one file each.
int64_t pack_chunk_avx512(format::Code, Masks, ChunkRows&, uint8_t*, uint8_t*, ChunkSums&);
int64_t pack_chunk_avx2(format::Code, Masks, ChunkRows&, uint8_t*, uint8_t*, ChunkSums&);

}  // namespace lacuna::kernels::linear_coded
