// Activations as codes: a token's values rounded to 127 steps either way of the largest.
#pragma once

#include <cstdint>

#include "lacuna/core/dtype.h"

namespace lacuna::kernels {

/// x = scale times code, codes -127..127, nearest, ties to even. With a NaN or an infinity all
/// codes are 0 and the scale is NaN; of zeros all are 0.
/// @param x  [columns] f32, bf16 or f16
/// @param codes  [columns]
/// @return max |x| / 127, at least the least normal float32
/// @determinism the same bits on every CPU
float quantize_token(DType dtype, const void* x, int64_t columns, int8_t* codes);

// The implementations, one file for each instruction set.
using QuantizeToken = float (*)(DType dtype, const void* x, int64_t columns, int8_t* codes);
float quantize_token_portable(DType dtype, const void* x, int64_t columns, int8_t* codes);
float quantize_token_avx512(DType dtype, const void* x, int64_t columns, int8_t* codes);

}  // namespace lacuna::kernels
