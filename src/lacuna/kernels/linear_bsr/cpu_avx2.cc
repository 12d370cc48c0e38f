// The rows of a block in pieces of 8 columns, float32 multiply-adds. The last piece of a block's
// row may be shorter: it is loaded by way of a copy, and x is masked with it.
#include "lacuna/format/row_product_avx2.h"
#include "lacuna/kernels/linear_bsr/cpu.h"

namespace lacuna::kernels::linear_bsr {
namespace {

using format::kRowsAtOnce;
using format::RowsView;
namespace avx2 = format::avx2;

/// The first `columns` < 8 lanes.
LACUNA_INLINE __m256i first_lanes(int64_t columns) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(columns)),
                            _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

/// R rows of one block row with T tokens.
template <class Values, int R, int T>
LACUNA_INLINE void tile(const RowsView& rows, int64_t row, const std::byte* x,
                        int64_t x_stride_bytes, float* sums) {
  const int64_t height = rows.pattern.block_rows, width = rows.pattern.block_columns;
  const int64_t row_bytes = width * Values::kWidth, block_bytes = height * row_bytes;
  const int64_t end = rows.blocks_before(row / height + 1);
  __m256 sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = _mm256_setzero_ps();
  for (int64_t block = rows.blocks_before(row / height); block < end; ++block) {
    const int64_t left = rows.block_column(block) * width;
    const int64_t columns = width < rows.columns - left ? width : rows.columns - left;
    const std::byte* values = rows.values + block * block_bytes + row % height * row_bytes;
    const auto multiply = [&](int64_t column, auto load, auto input)
        __attribute__((always_inline)) {
      __m256 w[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r)
        w[r] = Values::floats(load(values + r * row_bytes + column * Values::kWidth));
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m256 one =
            input(reinterpret_cast<const float*>(x + t * x_stride_bytes) + left + column);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) sum[r][t] = _mm256_fmadd_ps(w[r], one, sum[r][t]);
      }
    };
    int64_t column = 0;
    for (; column + 8 <= columns; column += 8)
      multiply(
          column, [](const std::byte* at) { return Values::load(at); },
          [](const float* at) { return _mm256_loadu_ps(at); });
    if (const int64_t rest = columns - column; rest > 0) {
      const __m256i lanes = first_lanes(rest);
      multiply(
          column,
          [&](const std::byte* at) { return Values::load_before(at, at + rest * Values::kWidth); },
          [&](const float* at) { return _mm256_maskload_ps(at, lanes); });
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[t * kRowsAtOnce + r] = avx2::sum_of(sum[r][t]);
}

template <class Values, int R, int T>
void tiles(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
           int64_t x_stride_bytes, float* sums) {
  const int64_t height = rows.pattern.block_rows;
  for (int64_t row = first; row < last;) {
    const int64_t below = row - row % height + height;
    const int64_t count = (below < last ? below : last) - row;
    float* at = sums + row - first;
    if (count >= R) {
      tile<Values, R, T>(rows, row, x, x_stride_bytes, at);
      row += R;
    } else {
      tile<Values, 1, T>(rows, row, x, x_stride_bytes, at);
      row += 1;
    }
  }
}

template <class Values>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return tiles<Values, 8, 1>(rows, first, last, x, x_stride_bytes, sums);
    case 2:
      return tiles<Values, 4, 2>(rows, first, last, x, x_stride_bytes, sums);
    case 3:
      return tiles<Values, 2, 3>(rows, first, last, x, x_stride_bytes, sums);
    case 4:
      return tiles<Values, 2, 4>(rows, first, last, x, x_stride_bytes, sums);
    case 6:
      return tiles<Values, 1, 6>(rows, first, last, x, x_stride_bytes, sums);
    case 8:
      return tiles<Values, 1, 8>(rows, first, last, x, x_stride_bytes, sums);
    default: {  // two turns over the rows
      tiles<Values, 1, 8>(rows, first, last, x, x_stride_bytes, sums);
      const std::byte* rest = x + 8 * x_stride_bytes;
      float* at = sums + 8 * kRowsAtOnce;
      return tokens == 12 ? tiles<Values, 2, 4>(rows, first, last, rest, x_stride_bytes, at)
                          : tiles<Values, 1, 8>(rows, first, last, rest, x_stride_bytes, at);
    }
  }
}

}  // namespace

const format::RowImplementations kAvx2PieceFma = {
    {format::InputForm::kFloat, row_kernel<avx2::F32>},
    {format::InputForm::kFloat, row_kernel<avx2::BF16>},
    {format::InputForm::kFloat, row_kernel<avx2::F16>}};

}  // namespace lacuna::kernels::linear_bsr
