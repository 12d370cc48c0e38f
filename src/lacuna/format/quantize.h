// Kept values to codes of 8 or 4 bits, by rounding to nearest. The mask never changes.
#pragma once

#include <span>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/format/codes.h"

namespace lacuna::format {

/// The same matrix with codes for values (format/quantization.h says what a code stands for): every
/// kept weight stays kept, also one that rounds to zero, and every dropped one stays dropped.
///
/// Scales are chosen for the kept values of each group of a row, and codes for the scale as it is
/// stored, in bf16:
///
///   int8  s = max|w| / 127
///   fp8   s = max|w| / 448
///   int4  of a few scales, from the one whose range just holds all values down to 0.8 of it, the
///         one with the least squared error; with zero points likewise, around round(-min w / s)
///
/// A group without a kept non-zero has scale 0 (zero point 8), and the codes of 0. Where 127 (8,
/// 448) times a scale would overflow values_dtype, the next lower scale is taken.
///
/// |w - dequantised w| <= s/2 for int8 and int4 where the range of the codes holds w, and it holds
/// every w of an int8 group; beyond it the outermost code is taken.
/// @errors kBadInput: a NaN or an infinity (row and column named); a matrix that has codes already;
/// kUsage: no code asked for
/// @determinism the same bits for any executor
Result<CompactMatrix> quantize(const CompactMatrix& matrix, const Quantization& quantization,
                               const Executor& executor = Executor::serial());
/// A dense matrix of f32, bf16 or f16: every weight is kept (pattern dense).
Result<CompactMatrix> quantize(const Tensor& dense, const Quantization& quantization,
                               const Executor& executor = Executor::serial());

/// The codes of weights that lie on their grid already, under a mask that is given: what a solver
/// that knew of the codes made becomes a matrix without another rounding.
/// @param mask     unquantised; its values count for nothing but the type of the result's
/// @param weights  float32, dense; a kept one is what a code of its group stands for
/// @param scales   [rows, groups], each storable in bf16
/// @errors kBadInput: sizes that don't fit, NaN or infinity; kUsage: no code asked for;
/// kCheckFailed: a kept weight that is none of its grid
Result<CompactMatrix> encode(const CompactMatrix& mask, const Quantization& quantization,
                             const Tensor& weights, std::span<const CodeScale> scales,
                             const Executor& executor = Executor::serial());

/// Holds a quantised matrix against the dense form of what it was made from: the mask keeps every
/// non-zero and, where the pattern leaves it the choice, nothing else; every kept code is one of
/// those nearest to its weight. Empty when that is so.
std::vector<Violation> check_codes(const CompactMatrix& matrix, const Tensor& dense,
                                   size_t limit = 8);

}  // namespace lacuna::format
