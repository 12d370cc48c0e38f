// The CPU implementations of linear_coded, one file for each instruction set.
#pragma once

#include "lacuna/kernels/linear_coded/stream.h"

namespace lacuna::kernels::linear_coded {

/// Tokens of one call of a tile kernel.
inline constexpr int64_t kTokensAtOnce = 8;

/// All give the same bits: sums of codes are exact integers; grouped scales multiply the sum of
/// their columns as float32, fused with the addition to the row's sum, group after group.
void tile_avx512_stream_dot(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                            int64_t tokens, float* sums);
void tile_avx2_buffer_dot(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                          int64_t tokens, float* sums);
void tile_avx2_vnni_buffer_dot(const Stream& stream, int64_t tile, const uint8_t* x,
                               int64_t x_stride, int64_t tokens, float* sums);
void tile_portable(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                   int64_t tokens, float* sums);

/// What a tile kernel hands on: x carried 128 too much, which the row's own sum takes back.
/// @param sum  Σ w (x + 128), exact or a float32
inline float without_offset(const Stream& stream, int64_t tile, int64_t row, double sum) {
  return static_cast<float>(sum - 128 * stream.row_sum(tile, row));
}

}  // namespace lacuna::kernels::linear_coded
