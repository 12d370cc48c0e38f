// y[T,N] = x[T,K] · W[N,K]^T for few tokens, straight from the rows of W, whichever layout they
// lie in. The linear_* operations of kernels/ are made of this.
//
//   W row n    |chunk of 32 columns|chunk of 32 columns| ...   read once, expanded in registers
//   x token t  |32 columns         |32 columns         | ...   prepared once, padded with zeros
//
// A tile takes R rows and all T tokens: each chunk of a row is expanded once and multiplied with
// the same chunk of every token. Every (row, token) pair has one vector accumulator that meets the
// chunks in order. So an output's bits depend neither on the other tokens of the call, nor on the
// number of threads, nor on where its row falls in a tile.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lacuna/core/executor.h"
#include "lacuna/format/rows.h"

namespace lacuna::format {

/// Most tokens of one row product; with more, a dense product of expanded rows is faster.
inline constexpr int64_t kMaxTokens = 16;
/// Columns that are expanded at a time; prepared x is padded to a multiple.
inline constexpr int64_t kChunk = 32;
/// Rows for which a kernel leaves its sums at a time.
inline constexpr int64_t kRowsAtOnce = 64;

/// The other operands. Strides count elements from one token to the next; nothing is aligned
/// beyond its element.
struct RowProduct {
  DType dtype = DType::kBF16;  ///< of x, y and bias: f32, bf16 or f16
  int64_t tokens = 0;          ///< 1..kMaxTokens
  const void* x = nullptr;     ///< [T,K]
  int64_t x_stride = 0;
  void* y = nullptr;  ///< [T,N]
  int64_t y_stride = 0;
  const void* bias = nullptr;  ///< [N] or null
};

/// How an implementation wants x.
enum class InputForm : uint8_t {
  kFloat,         ///< float32 in order
  kFloatEvenOdd,  ///< float32, in each chunk the 16 even columns before the 16 odd ones
  kBF16,          ///< bf16 as it came (x must be bf16)
};

/// Sums of rows [first, last), at most kRowsAtOnce of them, with each token:
/// sums[t * kRowsAtOnce + row - first]. `x` is prepared, tokens `x_stride_bytes` apart; `tokens` is
/// what padded_tokens() says.
using RowKernel = void (*)(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                           int64_t x_stride_bytes, int64_t tokens, float* sums);

struct RowImplementation {
  InputForm form = InputForm::kFloat;
  RowKernel kernel = nullptr;
};

/// One implementation for each type of the values; those of blocks and slices have none for fp8.
struct RowImplementations {
  RowImplementation f32, bf16, f16, fp8;
  const RowImplementation& for_values(DType dtype) const {
    return dtype == DType::kF32      ? f32
           : dtype == DType::kBF16   ? bf16
           : dtype == DType::kF8E4M3 ? fp8
                                     : f16;
  }
};

/// Tiles exist for some numbers of tokens; others are padded with zeros to the next.
inline int64_t padded_tokens(int64_t tokens) {
  return tokens <= 4 ? tokens : tokens <= 6 ? 6 : tokens <= 8 ? 8 : tokens <= 12 ? 12 : 16;
}

/// Bytes that run_row_product() needs for prepared x, in any form.
size_t row_product_workspace_bytes(int64_t tokens, int64_t columns);

/// Prepares x, splits the rows by their bytes over the executor, adds the bias, rounds to the type
/// of y. An infinite or NaN x meets dropped weights as zeros, as in a dense product.
void run_row_product(const RowImplementation& implementation, const RowsView& rows,
                     const RowProduct& product, void* workspace, const Executor& executor);

/// The same by definition, sums in float64 (bias included): sums [T,N].
/// @param weight_sums  if not null, sum of |W[n,k] x[t,k]| + |bias[n]|: what error bounds are
///                     measured in
void reference_row_product(const RowsView& rows, const RowProduct& product, double* sums,
                           double* weight_sums = nullptr);
/// The reference rounded to the type of y.
void run_reference_row_product(const RowsView& rows, const RowProduct& product);

}  // namespace lacuna::format
