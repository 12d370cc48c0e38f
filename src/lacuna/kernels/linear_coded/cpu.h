// The CPU implementations of linear_coded, one file for each instruction set.
#pragma once

#include "lacuna/kernels/linear_coded/stream.h"

namespace lacuna::kernels::linear_coded {

/// Tokens of one call of a tile kernel.
inline constexpr int64_t kTokensAtOnce = 6;

void tile_avx512_stream_dot(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                            int64_t tokens, float* sums);
void tile_portable(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                   int64_t tokens, float* sums);

}  // namespace lacuna::kernels::linear_coded
