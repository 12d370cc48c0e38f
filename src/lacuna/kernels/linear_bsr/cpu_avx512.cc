// The rows of a block row meet the columns of each of its blocks in turn; their sums stay in
// registers from the first block to the last.
//
//   block row   |block: R rows of C |block           | ...     16 rows of each at one token: 1 KiB
//   x           |C columns of the block's place|                in one piece for C = 32
//
// Blocks of a multiple of 32 columns are read in whole registers (chunks), others in pieces of 16
// columns of which the last is masked. Registers: R·T sums for R rows and T tokens, at most 16.
// More rows go over the block row again, whose other lines the prefetchers brought along.
//
// Bytes: each value once, a block's index once a pass. bench/lab/cpu_high_sparsity has figures.
#include "lacuna/format/row_product_avx512.h"
#include "lacuna/kernels/linear_bsr/cpu.h"

namespace lacuna::kernels::linear_bsr {
namespace {

using format::InputForm;
using format::kRowsAtOnce;
using format::RowsView;
namespace avx512 = format::avx512;

/// 32 columns at a time. A block that sticks out to the right is padded with zeros, and so is x.
template <class M>
struct Chunks : M {
  static constexpr int64_t kColumns = format::kChunk;
  static constexpr int64_t kWidth = M::Chunk::kWidth;
  struct Lanes {};
  LACUNA_INLINE Lanes lanes(int64_t) { return {}; }
  LACUNA_INLINE typename M::Operand weights(const std::byte* at, Lanes) {
    if constexpr (kWidth == 2) {
      return M::weights({_mm512_loadu_si512(at)});
    } else {
      return M::weights({_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64)});
    }
  }
  LACUNA_INLINE typename M::Operand input(const std::byte* x, int64_t column, Lanes) {
    return M::input(x + column / kColumns * M::kInputBytes);
  }
};

/// Up to 16 columns at a time, as float32.
template <DType kType>
struct Pieces {
  using Operand = __m512;
  using Lanes = __mmask16;
  static constexpr int64_t kColumns = 16;
  static constexpr int64_t kWidth = kType == DType::kF32 ? 4 : 2;
  static constexpr InputForm kForm = InputForm::kFloat;
  LACUNA_INLINE Lanes lanes(int64_t columns) {
    return avx512::first_lanes16(static_cast<unsigned>(columns < 16 ? columns : 16));
  }
  LACUNA_INLINE Operand weights(const std::byte* at, Lanes lanes) {
    if constexpr (kType == DType::kF32) {
      return _mm512_maskz_loadu_ps(lanes, at);
    } else {
      const __m256i raw = _mm256_maskz_loadu_epi16(lanes, at);
      if constexpr (kType == DType::kF16) return _mm512_cvtph_ps(raw);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16));
    }
  }
  LACUNA_INLINE Operand input(const std::byte* x, int64_t column, Lanes lanes) {
    return _mm512_maskz_loadu_ps(lanes, x + column * 4);
  }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return _mm512_fmadd_ps(w, x, sum);
  }
};

/// R rows of one block row with T tokens.
template <class Step, int R, int T>
LACUNA_INLINE void tile(const RowsView& rows, int64_t row, const std::byte* x,
                        int64_t x_stride_bytes, float* sums) {
  const int64_t height = rows.pattern.block_rows, width = rows.pattern.block_columns;
  const int64_t row_bytes = width * Step::kWidth, block_bytes = height * row_bytes;
  const int64_t end = rows.blocks_before(row / height + 1);
  __m512 sum[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();
  for (int64_t block = rows.blocks_before(row / height); block < end; ++block) {
    const int64_t left = rows.block_column(block) * width;
    const int64_t columns = width < rows.columns - left ? width : rows.columns - left;
    const std::byte* values = rows.values + block * block_bytes + row % height * row_bytes;
    for (int64_t column = 0; column < columns; column += Step::kColumns) {
      const std::byte* at = values + column * Step::kWidth;
      const auto lanes = Step::lanes(columns - column);
      const auto input = [&](int t) __attribute__((always_inline)) {
        return Step::input(x + t * x_stride_bytes, left + column, lanes);
      };
      if constexpr (T == 1) {  // x stays, rows come and go
        const auto only = input(0);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
          _mm_prefetch(at + r * row_bytes + block_bytes, _MM_HINT_T0);
          sum[r][0] = Step::add_product(sum[r][0], Step::weights(at + r * row_bytes, lanes), only);
        }
      } else {
        typename Step::Operand w[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) w[r] = Step::weights(at + r * row_bytes, lanes);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          const auto one = input(t);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) sum[r][t] = Step::add_product(sum[r][t], w[r], one);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[t * kRowsAtOnce + r] = _mm512_reduce_add_ps(sum[r][t]);
}

/// As many rows at a time as there are registers for, fewer where the block row ends.
template <class Step, int R, int T>
void tiles(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
           int64_t x_stride_bytes, float* sums) {
  constexpr int kSome = R >= 8 ? R / 4 : 1;
  const int64_t height = rows.pattern.block_rows;
  for (int64_t row = first; row < last;) {
    const int64_t below = row - row % height + height;
    const int64_t count = (below < last ? below : last) - row;
    float* at = sums + row - first;
    if (count >= R) {
      tile<Step, R, T>(rows, row, x, x_stride_bytes, at);
      row += R;
    } else if (count >= kSome) {
      tile<Step, kSome, T>(rows, row, x, x_stride_bytes, at);
      row += kSome;
    } else {
      tile<Step, 1, T>(rows, row, x, x_stride_bytes, at);
      row += 1;
    }
  }
}

template <class Step>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return tiles<Step, 16, 1>(rows, first, last, x, x_stride_bytes, sums);
    case 2:
      return tiles<Step, 8, 2>(rows, first, last, x, x_stride_bytes, sums);
    case 3:
      return tiles<Step, 4, 3>(rows, first, last, x, x_stride_bytes, sums);
    case 4:
      return tiles<Step, 4, 4>(rows, first, last, x, x_stride_bytes, sums);
    case 6:
      return tiles<Step, 2, 6>(rows, first, last, x, x_stride_bytes, sums);
    case 8:
      return tiles<Step, 2, 8>(rows, first, last, x, x_stride_bytes, sums);
    case 12:
      return tiles<Step, 1, 12>(rows, first, last, x, x_stride_bytes, sums);
    default:
      return tiles<Step, 1, 16>(rows, first, last, x, x_stride_bytes, sums);
  }
}

template <class Step>
constexpr format::RowImplementation implementation() {
  return {Step::kForm, row_kernel<Step>};
}

}  // namespace

const format::RowImplementations kAvx512ChunkFma = {implementation<Chunks<avx512::F32>>(),
                                                    implementation<Chunks<avx512::BF16AsFloat>>(),
                                                    implementation<Chunks<avx512::F16AsFloat>>()};
const format::RowImplementations kAvx512ChunkDot = {
    {}, implementation<Chunks<avx512::BF16Dot>>(), {}};
const format::RowImplementations kAvx512PieceFma = {implementation<Pieces<DType::kF32>>(),
                                                    implementation<Pieces<DType::kBF16>>(),
                                                    implementation<Pieces<DType::kF16>>()};

}  // namespace lacuna::kernels::linear_bsr
