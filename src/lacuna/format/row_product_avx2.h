// Row products in AVX2: 8 columns at a time (row_product.h has the idea).
//
// 16 registers: R·T accumulators (at most 8), one chunk a row, one for x. More than 8 tokens take
// two turns over the rows of a tile, whose values then lie in the nearest cache.
// Lines are fetched a tile ahead, as row_product_avx512.h explains.
#pragma once

#include "lacuna/format/lanes_avx2.h"
#include "lacuna/format/row_product.h"

namespace lacuna::format::avx2 {

struct BF16 {
  using Raw = __m128i;
  static constexpr int64_t kWidth = 2;
  LACUNA_INLINE Raw load(const std::byte* at) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(at));
  }
  LACUNA_INLINE Raw load_before(const std::byte* at, const std::byte* end) {
    return load128(at, end);
  }
  LACUNA_INLINE Raw expand(uint8_t mask, Raw packed) { return expand_u16(mask, packed); }
  LACUNA_INLINE __m256 floats(Raw raw) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
  }
};

struct F16 : BF16 {
  LACUNA_INLINE __m256 floats(Raw raw) { return _mm256_cvtph_ps(raw); }
};

struct F32 {
  using Raw = __m256i;
  static constexpr int64_t kWidth = 4;
  LACUNA_INLINE Raw load(const std::byte* at) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
  }
  LACUNA_INLINE Raw load_before(const std::byte* at, const std::byte* end) {
    return load256(at, end);
  }
  LACUNA_INLINE Raw expand(uint8_t mask, Raw packed) { return expand_u32(mask, packed); }
  LACUNA_INLINE __m256 floats(Raw raw) { return _mm256_castsi256_ps(raw); }
};

/// An e4m3 in the upper bits of an f16's magnitude, which is 2^8 times too small (the cursors'
/// scales make up for it).
struct F8 {
  using Raw = __m128i;
  static constexpr int64_t kWidth = 1;
  LACUNA_INLINE Raw load(const std::byte* at) {
    return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(at));
  }
  LACUNA_INLINE Raw load_before(const std::byte* at, const std::byte* end) {
    alignas(8) std::byte copy[8] = {};
    std::memcpy(copy, at, static_cast<size_t>(end - at < 8 ? end - at : 8));
    return load(copy);
  }
  LACUNA_INLINE Raw expand(uint8_t mask, Raw packed) { return expand_u8(mask, packed); }
  LACUNA_INLINE __m256 floats(Raw raw) {
    return _mm256_cvtph_ps(_mm_and_si128(_mm_slli_epi16(_mm_cvtepi8_epi16(raw), 7),
                                         _mm_set1_epi16(static_cast<int16_t>(0xbfff))));
  }
};

/// Multiplies 8 weights of a row by their scale, if they have one.
template <class Values>
struct Scales {
  Scales(const RowsView&, int64_t) {}
  LACUNA_INLINE_MEMBER __m256 times(int64_t, __m256 weights) const { return weights; }
};
template <>
struct Scales<F8> {
  const std::byte* of_row;
  int shift;
  Scales(const RowsView& rows, int64_t row)
      : of_row(rows.row_scales(row)), shift(rows.scale_shift) {}
  LACUNA_INLINE_MEMBER __m256 times(int64_t group, __m256 weights) const {
    return _mm256_mul_ps(weights, _mm256_set1_ps(scale_at(of_row, group * 8, shift) * 0x1p8f));
  }
};

template <class Values>
struct DenseCursor {
  const std::byte *next, *end;
  int64_t ahead;
  Scales<Values> scales;
  DenseCursor(const RowsView& rows, int64_t row, int64_t height)
      : next(rows.row(row)),
        end(next + rows.columns * Values::kWidth),
        ahead(height * rows.columns * Values::kWidth),
        scales(rows, row) {}
  LACUNA_INLINE_MEMBER void prefetch(int64_t) const { _mm_prefetch(next + ahead, _MM_HINT_T0); }
  LACUNA_INLINE_MEMBER __m256 take(int64_t group) {
    const std::byte* at = next;
    next += 8 * Values::kWidth;
    return scales.times(group, Values::floats(Values::load(at)));
  }
  LACUNA_INLINE_MEMBER __m256 take_last(int64_t group) {
    return scales.times(group, Values::floats(Values::load_before(next, end)));
  }
};

/// With kFixed, every 8 columns keep the same number of values (keep:of where `of` divides 8).
template <class Values, bool kFixed>
struct BitmapCursor {
  const uint8_t* bits;
  const std::byte* next;
  int64_t step_bytes = 0;
  int64_t ahead, bits_ahead;
  Scales<Values> scales;
  BitmapCursor(const RowsView& rows, int64_t row, int64_t height)
      : bits(rows.row_bits(row)),
        next(rows.row(row)),
        ahead(height * (rows.value_index(row + 1) - rows.value_index(row)) * Values::kWidth),
        bits_ahead(height * rows.bitmap_stride_bytes),
        scales(rows, row) {
    if constexpr (kFixed) step_bytes = 8 / rows.pattern.of * rows.pattern.keep * Values::kWidth;
  }
  LACUNA_INLINE_MEMBER void prefetch(int64_t group) const {
    _mm_prefetch(next + ahead, _MM_HINT_T0);
    if (group % 64 == 0) _mm_prefetch(bits + bits_ahead + group, _MM_HINT_T0);
  }
  LACUNA_INLINE_MEMBER __m256 take(int64_t group) {
    const std::byte* at = next;
    const uint8_t mask = bits[group];
    next += kFixed ? step_bytes : static_cast<int64_t>(_mm_popcnt_u32(mask)) * Values::kWidth;
    return scales.times(group, Values::floats(Values::expand(mask, Values::load(at))));
  }
  LACUNA_INLINE_MEMBER __m256 take_last(int64_t group) { return take(group); }
};

LACUNA_INLINE float sum_of(__m256 lanes) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

template <class Cursor, int R, int T>
LACUNA_INLINE void tile(const RowsView& rows, int64_t row, int64_t last_row, const std::byte* x,
                        int64_t x_stride_bytes, float* sums) {
  const auto cursor = [&](int64_t r) {
    return Cursor(rows, row + r < last_row ? row + r : last_row - 1, R);
  };
  Cursor cursors[4] = {cursor(0), cursor(R > 1 ? 1 : 0), cursor(R > 2 ? 2 : 0),
                       cursor(R > 3 ? 3 : 0)};
  __m256 sum[R][T];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) sum[r][t] = _mm256_setzero_ps();
  const auto multiply = [&](int64_t group, auto take) __attribute__((always_inline)) {
    __m256 w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) w[r] = take(cursors[r]);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m256 input =
          _mm256_loadu_ps(reinterpret_cast<const float*>(x + t * x_stride_bytes + group * 32));
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) sum[r][t] = _mm256_fmadd_ps(w[r], input, sum[r][t]);
    }
  };
  const int64_t groups = rows.columns / 8;
  for (int64_t group = 0; group < groups; ++group) {
    if (group % 4 == 0)  // a line of 16-bit values
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) cursors[r].prefetch(group);
    multiply(
        group, [&](Cursor & c) __attribute__((always_inline)) { return c.take(group); });
  }
  if (rows.columns % 8)
    multiply(
        groups, [&](Cursor & c) __attribute__((always_inline)) { return c.take_last(groups); });
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[t * kRowsAtOnce + r] = sum_of(sum[r][t]);
}

template <class Cursor, int R, int T>
void tiles(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
           int64_t x_stride_bytes, float* sums) {
  for (int64_t row = first; row < last; row += R)
    tile<Cursor, R, T>(rows, row, last, x, x_stride_bytes, sums + row - first);
}

/// The RowKernel of a Cursor.
template <class Cursor>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return tiles<Cursor, 4, 1>(rows, first, last, x, x_stride_bytes, sums);
    case 2:
      return tiles<Cursor, 4, 2>(rows, first, last, x, x_stride_bytes, sums);
    case 3:
      return tiles<Cursor, 2, 3>(rows, first, last, x, x_stride_bytes, sums);
    case 4:
      return tiles<Cursor, 2, 4>(rows, first, last, x, x_stride_bytes, sums);
    case 6:
      return tiles<Cursor, 1, 6>(rows, first, last, x, x_stride_bytes, sums);
    case 8:
      return tiles<Cursor, 1, 8>(rows, first, last, x, x_stride_bytes, sums);
    default:
      for (int64_t row = first; row < last; ++row) {
        float* at = sums + row - first;
        tile<Cursor, 1, 8>(rows, row, row + 1, x, x_stride_bytes, at);
        const std::byte* rest = x + 8 * x_stride_bytes;
        if (tokens == 12) {
          tile<Cursor, 1, 4>(rows, row, row + 1, rest, x_stride_bytes, at + 8 * kRowsAtOnce);
        } else {
          tile<Cursor, 1, 8>(rows, row, row + 1, rest, x_stride_bytes, at + 8 * kRowsAtOnce);
        }
      }
  }
}

template <template <class> class Cursor>
constexpr RowImplementations implementations() {
  return {{InputForm::kFloat, row_kernel<Cursor<F32>>},
          {InputForm::kFloat, row_kernel<Cursor<BF16>>},
          {InputForm::kFloat, row_kernel<Cursor<F16>>},
          {InputForm::kFloat, row_kernel<Cursor<F8>>}};
}

}  // namespace lacuna::format::avx2
