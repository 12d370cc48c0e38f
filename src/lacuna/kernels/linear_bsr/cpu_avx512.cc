// A block row is read from front to back, block by block; each block meets the x of its columns.
//
//   values   |block: R rows of C      |block                  | ...     one stream of memory
//   x        |C columns of its place  |C columns of its place |
//   sums     R rows x T tokens of 16 lanes, in the nearest cache from block to block
//
// Where a block has more rows than registers, sums go through the cache: taking 16 of its rows from
// the first block to the last instead leaves holes in the stream, where prefetchers lose their way.
//
// Blocks of a multiple of 32 columns are read in whole registers (chunks). Rows of 1, 2, 4, 8 or 16
// columns fill a register together (flat), x repeated for each. Others are read in pieces of 16
// columns of which the last is masked.
#include <algorithm>

#include "lacuna/format/row_product_avx512.h"
#include "lacuna/kernels/linear_bsr/cpu.h"

namespace lacuna::kernels::linear_bsr {
namespace {

using format::InputForm;
using format::kRowsAtOnce;
using format::RowsView;
namespace avx512 = format::avx512;

constexpr int64_t kLanes = 16;
/// How far ahead of its loads the stream is fetched.
constexpr int64_t kAheadBytes = 2048;

// --- How a line of a block becomes operands. A line is a row, or the rows that fill a register.
// ----

/// 32 columns of a row at a time. A block that sticks out to the right is padded with zeros, and so
/// is x.
template <class M>
struct Chunks : M {
  static constexpr int64_t kColumns = format::kChunk;
  static constexpr int64_t kWidth = M::Chunk::kWidth;
  struct Lanes {};
  explicit Chunks(const format::Pattern&) {}
  static constexpr int64_t rows_of_line() { return 1; }
  LACUNA_INLINE Lanes lanes(int64_t) { return {}; }
  LACUNA_INLINE typename M::Operand weights(const std::byte* at, Lanes) {
    if constexpr (kWidth == 2) {
      return M::weights({_mm512_loadu_si512(at)});
    } else {
      return M::weights({_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64)});
    }
  }
  LACUNA_INLINE_MEMBER typename M::Operand input(const std::byte* x, int64_t column, Lanes) const {
    return M::input(x + column / kColumns * M::kInputBytes);
  }
};

/// Up to 16 columns of a row at a time, as float32.
template <DType kType>
struct Pieces {
  using Operand = __m512;
  using Lanes = __mmask16;
  static constexpr int64_t kColumns = 16;
  static constexpr int64_t kWidth = kType == DType::kF32 ? 4 : 2;
  static constexpr InputForm kForm = InputForm::kFloat;
  explicit Pieces(const format::Pattern&) {}
  static constexpr int64_t rows_of_line() { return 1; }
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
  LACUNA_INLINE_MEMBER Operand input(const std::byte* x, int64_t column, Lanes lanes) const {
    return _mm512_maskz_loadu_ps(lanes, x + column * 4);
  }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return _mm512_fmadd_ps(w, x, sum);
  }
};

/// All columns of as many rows as fill a register, as float32.
template <DType kType>
struct Flat : Pieces<kType> {
  using Base = Pieces<kType>;
  struct Lanes {};
  int64_t rows;
  __m512i repeat;  ///< lane modulo the columns of a block
  explicit Flat(const format::Pattern& pattern)
      : Base(pattern),
        rows(kLanes / pattern.block_columns),
        repeat(_mm512_and_si512(
            _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
            _mm512_set1_epi32(pattern.block_columns - 1))) {}
  int64_t rows_of_line() const { return rows; }
  LACUNA_INLINE Lanes lanes(int64_t) { return {}; }
  LACUNA_INLINE typename Base::Operand weights(const std::byte* at, Lanes) {
    return Base::weights(at, 0xffff);
  }
  /// Reads 16 columns, of which prepared x has that many behind the last.
  LACUNA_INLINE_MEMBER typename Base::Operand input(const std::byte* x, int64_t column,
                                                    Lanes) const {
    return _mm512_permutexvar_ps(repeat, _mm512_loadu_ps(x + column * 4));
  }
};

// --- The walk
// --------------------------------------------------------------------------------------

/// Some lines of some blocks of one block row.
template <class Step>
struct Part {
  const Step& step;
  const RowsView& rows;
  int64_t first_block, last_block;
  int64_t first_line, line_bytes;
};

/// Adds R lines of the blocks, with T tokens, to their sums [R][T][16].
template <class Step, int R, int T>
LACUNA_INLINE void add_lines(const Part<Step>& part, const std::byte* x, int64_t x_stride_bytes,
                             float* sums) {
  const RowsView& rows = part.rows;
  const int64_t height = rows.pattern.block_rows, width = rows.pattern.block_columns;
  __m512 sum[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_load_ps(sums + (r * T + t) * kLanes);
  for (int64_t block = part.first_block; block < part.last_block; ++block) {
    const int64_t left = rows.block_column(block) * width;
    const int64_t columns = width < rows.columns - left ? width : rows.columns - left;
    const std::byte* lines =
        rows.values + block * height * width * Step::kWidth + part.first_line * part.line_bytes;
    for (int64_t column = 0; column < columns; column += Step::kColumns) {
      const std::byte* at = lines + column * Step::kWidth;
      const auto lanes = Step::lanes(columns - column);
      const auto weights = [&](int r) __attribute__((always_inline)) {
        _mm_prefetch(at + r * part.line_bytes + kAheadBytes, _MM_HINT_T0);
        return Step::weights(at + r * part.line_bytes, lanes);
      };
      if constexpr (T == 1) {  // x stays, lines come and go
        const auto input = part.step.input(x, left + column, lanes);
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) sum[r][0] = Step::add_product(sum[r][0], weights(r), input);
      } else {
        typename Step::Operand w[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) w[r] = weights(r);
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) {
          const auto input = part.step.input(x + t * x_stride_bytes, left + column, lanes);
#pragma GCC unroll 16
          for (int r = 0; r < R; ++r) sum[r][t] = Step::add_product(sum[r][t], w[r], input);
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) _mm512_store_ps(sums + (r * T + t) * kLanes, sum[r][t]);
}

/// Rows [first, last) of one block row, R lines at a time.
template <class Step, int R, int T>
void block_row(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
               int64_t x_stride_bytes, float* out) {
  constexpr int kSome = R >= 8 ? R / 4 : 1;
  const Step step(rows.pattern);
  const int64_t height = rows.pattern.block_rows, width = rows.pattern.block_columns;
  const int64_t rows_of_line = step.rows_of_line();
  const int64_t first_line = first % height / rows_of_line;
  const int64_t lines = ((last - 1) % height) / rows_of_line + 1 - first_line;
  alignas(64) float sums[kRowsAtOnce * T * kLanes];
  std::fill(sums, sums + lines * T * kLanes, 0.0f);
  Part<Step> part{step,
                  rows,
                  rows.blocks_before(first / height),
                  rows.blocks_before(first / height + 1),
                  first_line,
                  rows_of_line * width * Step::kWidth};
  const auto add = [&]<int kLines>(int64_t & line) __attribute__((always_inline)) {
    for (; line + kLines <= lines; line += kLines) {
      part.first_line = first_line + line;
      add_lines<Step, kLines, T>(part, x, x_stride_bytes, sums + line * T * kLanes);
    }
  };
  const auto add_all = [&] {
    int64_t line = 0;
    add.template operator()<R>(line);
    if constexpr (kSome > 1) add.template operator()<kSome>(line);
    if constexpr (R > 1) add.template operator()<1>(line);
  };
  if (lines == R || lines == kSome || lines == 1) {  // the sums stay in registers all along
    add_all();
  } else {
    const int64_t end = part.last_block;
    for (int64_t block = part.first_block; block < end; ++block) {
      part.first_block = block;
      part.last_block = block + 1;
      add_all();
    }
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t in_block = row % height;
    const float* line = sums + (in_block / rows_of_line - first_line) * T * kLanes;
    for (int t = 0; t < T; ++t, line += kLanes) {
      float* sum = out + t * kRowsAtOnce + row - first;
      if (rows_of_line == 1) {
        *sum = _mm512_reduce_add_ps(_mm512_load_ps(line));
      } else {
        *sum = 0;
        for (int64_t i = 0; i < width; ++i) *sum += line[in_block % rows_of_line * width + i];
      }
    }
  }
}

template <class Step, int R, int T>
void block_rows(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, float* sums) {
  const int64_t height = rows.pattern.block_rows;
  for (int64_t row = first; row < last;) {
    const int64_t end = std::min(row - row % height + height, last);
    block_row<Step, R, T>(rows, row, end, x, x_stride_bytes, sums + row - first);
    row = end;
  }
}

template <class Step>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return block_rows<Step, 16, 1>(rows, first, last, x, x_stride_bytes, sums);
    case 2:
      return block_rows<Step, 8, 2>(rows, first, last, x, x_stride_bytes, sums);
    case 3:
      return block_rows<Step, 4, 3>(rows, first, last, x, x_stride_bytes, sums);
    case 4:
      return block_rows<Step, 4, 4>(rows, first, last, x, x_stride_bytes, sums);
    case 6:
      return block_rows<Step, 2, 6>(rows, first, last, x, x_stride_bytes, sums);
    case 8:
      return block_rows<Step, 2, 8>(rows, first, last, x, x_stride_bytes, sums);
    case 12:
      return block_rows<Step, 1, 12>(rows, first, last, x, x_stride_bytes, sums);
    default:
      return block_rows<Step, 1, 16>(rows, first, last, x, x_stride_bytes, sums);
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
const format::RowImplementations kAvx512FlatFma = {implementation<Flat<DType::kF32>>(),
                                                   implementation<Flat<DType::kBF16>>(),
                                                   implementation<Flat<DType::kF16>>()};
const format::RowImplementations kAvx512PieceFma = {implementation<Pieces<DType::kF32>>(),
                                                    implementation<Pieces<DType::kBF16>>(),
                                                    implementation<Pieces<DType::kF16>>()};

}  // namespace lacuna::kernels::linear_bsr
