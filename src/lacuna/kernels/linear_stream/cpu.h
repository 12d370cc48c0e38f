// The CPU implementations of linear_stream, one file for each instruction set.
#pragma once

#include "lacuna/format/rows.h"
#include "lacuna/kernels/linear_stream/value_chunk.h"

namespace lacuna::kernels::linear_stream {

/// Most tokens and most tiles of one call of any kernel.
inline constexpr int64_t kMostTokens = 32, kMostTiles = 4;

/// Sums of a tile's 16 rows with each token: sums[token * 16 + row]; of the tiles after it, each
/// kTileSums on.
inline constexpr int64_t kTileSums = kMostTokens * kTileRows;
using TileKernel = void (*)(const format::RowsView& rows, int64_t tile, int64_t tiles,
                            const void* x, int64_t tokens, float* sums);

/// One kernel for each type of the values, and what they want. x has zeros up to a multiple of
/// kChunk columns, and comes as
///   float32  a token after the other, x_stride(columns) apart
///   bf16     32 columns of every token, then the next 32 columns
struct TileKernels {
  TileKernel bf16, f16;  ///< null: not for these values
  DType x = DType::kF32;
  int64_t tokens = 8, tiles = 1;  ///< at most, of a call
  TileKernel for_values(DType dtype) const { return dtype == DType::kBF16 ? bf16 : f16; }
};

/// Between tokens of float32; not a power of two, which would put all tokens into one cache set.
inline int64_t x_stride(int64_t columns) { return stream::chunk_count(columns) * kChunk + 16; }

/// bf16 alone, two tokens or more: the sums of up to 32 lie in tiles.
extern const TileKernels kAmxDot;
extern const TileKernels kAvx512Fma;
extern const TileKernels kAvx2BufferFma;
extern const TileKernels kPortable;

}  // namespace lacuna::kernels::linear_stream
