// The CPU implementations of linear_stream, one file for each instruction set.
#pragma once

#include "lacuna/format/rows.h"
#include "lacuna/kernels/linear_stream/value_chunk.h"

namespace lacuna::kernels::linear_stream {

/// Most tokens of one call of a kernel.
inline constexpr int64_t kTokensAtOnce = 8;

/// Sums of a tile's 16 rows with each token: sums[token * 16 + row]. A row has two or three sums,
/// which its columns meet in turn; then they are added.
/// @param x  float32, zeros up to a multiple of kChunk; tokens `x_stride` floats apart
using TileKernel = void (*)(const format::RowsView& rows, int64_t tile, const float* x,
                            int64_t x_stride, int64_t tokens, float* sums);

/// One kernel for each type of the values.
struct TileKernels {
  TileKernel bf16, f16;
  TileKernel for_values(DType dtype) const { return dtype == DType::kBF16 ? bf16 : f16; }
};

extern const TileKernels kAvx512Fma;
extern const TileKernels kAvx2BufferFma;
extern const TileKernels kPortable;

}  // namespace lacuna::kernels::linear_stream
