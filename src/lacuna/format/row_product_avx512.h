// Row products in AVX-512: the tile, and how chunks become operands (row_product.h has the idea).
//
// Registers for R rows and T tokens: R·T accumulators, one or two a row for the expanded chunk, one
// for x. R is 4 up to 4 tokens, 2 up to 8, 1 up to 16: at most 16 accumulators, so at least as many
// independent sums as a fused multiply-add has latency on both ports, and x is read once for R
// rows.
//
// Four rows at once are four streams that end after a few KiB, where the hardware prefetcher starts
// anew each time. So each chunk fetches the line that the same row of the next tile will want, R
// rows ahead: 2.0 to 2.6 times faster from memory at one token (4096x4096 bf16, 50 to 80 % zeros,
// one core of Zen 5).
#pragma once

// g++ 12 warns of its own "undefined" operands inside its intrinsics, at whatever line inlines
// them.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/format/row_product.h"

namespace lacuna::format::avx512 {

/// 32 elements as they lie in memory.
struct Chunk16 {
  static constexpr int64_t kWidth = 2;
  __m512i all;
};
struct Chunk32 {
  static constexpr int64_t kWidth = 4;
  __m512i low, high;
};
/// fp8 codes, and the scale that they share.
struct Chunk8 {
  static constexpr int64_t kWidth = 1;
  __m256i all;
  float scale;
};

/// Where a row's scales are, if it has any.
template <class Chunk>
struct Scales {
  Scales(const RowsView&, int64_t) {}
};
template <>
struct Scales<Chunk8> {
  const std::byte* of_row;
  int shift;
  Scales(const RowsView& rows, int64_t row)
      : of_row(rows.row_scales(row)), shift(rows.scale_shift) {}
  LACUNA_INLINE_MEMBER float at(int64_t chunk) const {
    return scale_at(of_row, chunk * kChunk, shift);
  }
};

// --- Math: what a chunk is multiplied as -----------------------------------------------------

/// bf16 weights as float32: the even columns shifted up, the odd ones masked. Exact, denormals too.
struct BF16AsFloat {
  using Chunk = Chunk16;
  struct Operand {
    __m512 even, odd;
  };
  static constexpr InputForm kForm = InputForm::kFloatEvenOdd;
  static constexpr int64_t kInputBytes = kChunk * 4;
  LACUNA_INLINE Operand weights(Chunk16 chunk) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(chunk.all, 16)),
            _mm512_castsi512_ps(
                _mm512_and_si512(chunk.all, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  LACUNA_INLINE Operand input(const std::byte* x) {
    return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 64)};
  }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return _mm512_fmadd_ps(w.odd, x.odd, _mm512_fmadd_ps(w.even, x.even, sum));
  }
};

struct F16AsFloat {
  using Chunk = Chunk16;
  struct Operand {
    __m512 low, high;
  };
  static constexpr InputForm kForm = InputForm::kFloat;
  static constexpr int64_t kInputBytes = kChunk * 4;
  LACUNA_INLINE Operand weights(Chunk16 chunk) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(chunk.all)),
            _mm512_cvtph_ps(_mm512_extracti64x4_epi64(chunk.all, 1))};
  }
  LACUNA_INLINE Operand input(const std::byte* x) {
    return {_mm512_loadu_ps(x), _mm512_loadu_ps(x + 64)};
  }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return _mm512_fmadd_ps(w.high, x.high, _mm512_fmadd_ps(w.low, x.low, sum));
  }
};

struct F32 {
  using Chunk = Chunk32;
  using Operand = F16AsFloat::Operand;
  static constexpr InputForm kForm = InputForm::kFloat;
  static constexpr int64_t kInputBytes = kChunk * 4;
  LACUNA_INLINE Operand weights(Chunk32 chunk) {
    return {_mm512_castsi512_ps(chunk.low), _mm512_castsi512_ps(chunk.high)};
  }
  LACUNA_INLINE Operand input(const std::byte* x) { return F16AsFloat::input(x); }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return F16AsFloat::add_product(sum, w, x);
  }
};

/// An e4m3 moved to the upper bits of an f16's magnitude is 2^8 times too small, denormals too, and
/// widens exactly; times a bf16 scale it is still exact.
struct F8AsFloat {
  using Chunk = Chunk8;
  using Operand = F16AsFloat::Operand;
  static constexpr InputForm kForm = InputForm::kFloat;
  static constexpr int64_t kInputBytes = kChunk * 4;
  LACUNA_INLINE Operand weights(Chunk8 chunk) {
    const __m512i halves = _mm512_and_si512(_mm512_slli_epi16(_mm512_cvtepi8_epi16(chunk.all), 7),
                                            _mm512_set1_epi16(static_cast<int16_t>(0xbfff)));
    const __m512 scale = _mm512_set1_ps(chunk.scale * 0x1p8f);
    return {_mm512_mul_ps(_mm512_cvtph_ps(_mm512_castsi512_si256(halves)), scale),
            _mm512_mul_ps(_mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1)), scale)};
  }
  LACUNA_INLINE Operand input(const std::byte* x) { return F16AsFloat::input(x); }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return F16AsFloat::add_product(sum, w, x);
  }
};

/// bf16 weights times bf16 x in one instruction. Products of bf16 are exact in float32 and each of
/// the two additions rounds to nearest, so the relative bound is that of float32; but `vdpbf16ps`
/// takes denormal inputs as zero and flushes denormal sums, whatever the rounding mode says. Each
/// flush costs at most 2^-126 times the other factor.
struct BF16Dot {
  using Chunk = Chunk16;
  using Operand = __m512bh;
  static constexpr InputForm kForm = InputForm::kBF16;
  static constexpr int64_t kInputBytes = kChunk * 2;
  LACUNA_INLINE Operand weights(Chunk16 chunk) { return reinterpret_cast<__m512bh>(chunk.all); }
  LACUNA_INLINE Operand input(const std::byte* x) {
    return reinterpret_cast<__m512bh>(_mm512_loadu_si512(x));
  }
  LACUNA_INLINE __m512 add_product(__m512 sum, Operand w, Operand x) {
    return _mm512_dpbf16_ps(sum, w, x);
  }
};

// --- Cursors: where the chunks of a row come from ----------------------------------------------
// `height` is the number of rows of a tile; prefetch() may name addresses past the end.

template <class Chunk>
struct DenseCursor {
  const std::byte* next;
  int64_t ahead;
  Scales<Chunk> scales;
  DenseCursor(const RowsView& rows, int64_t row, int64_t height)
      : next(rows.row(row)), ahead(height * rows.columns * Chunk::kWidth), scales(rows, row) {}
  LACUNA_INLINE_MEMBER void prefetch(int64_t) const { _mm_prefetch(next + ahead, _MM_HINT_T0); }
  LACUNA_INLINE_MEMBER Chunk take([[maybe_unused]] int64_t chunk) {
    const std::byte* at = next;
    next += kChunk * Chunk::kWidth;
    if constexpr (Chunk::kWidth == 1) {
      return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(at)), scales.at(chunk)};
    } else if constexpr (Chunk::kWidth == 2) {
      return {_mm512_loadu_si512(at)};
    } else {
      return {_mm512_loadu_si512(at), _mm512_loadu_si512(at + 64)};
    }
  }
  LACUNA_INLINE_MEMBER Chunk take_last([[maybe_unused]] int64_t chunk, int64_t columns) {
    const __mmask32 lanes = first_lanes32(static_cast<unsigned>(columns));
    if constexpr (Chunk::kWidth == 1) {
      return {_mm256_maskz_loadu_epi8(lanes, next), scales.at(chunk)};
    } else if constexpr (Chunk::kWidth == 2) {
      return {_mm512_maskz_loadu_epi16(lanes, next)};
    } else {
      return {_mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes), next),
              _mm512_maskz_loadu_epi32(static_cast<__mmask16>(lanes >> 16), next + 64)};
    }
  }
};

/// A bitmap row. With kFixed, every 16 columns keep the same number of values (keep:of where `of`
/// divides 16), and where the next chunk lies needs no counting.
template <class Chunk, bool kFixed>
struct BitmapCursor {
  const uint8_t* bits;
  const std::byte* next;
  int64_t half_bytes = 0;  // kFixed: values of 16 columns
  int64_t ahead, bits_ahead;
  Scales<Chunk> scales;
  BitmapCursor(const RowsView& rows, int64_t row, int64_t height)
      : bits(rows.row_bits(row)),
        next(rows.row(row)),
        ahead(height * (rows.value_index(row + 1) - rows.value_index(row)) * Chunk::kWidth),
        bits_ahead(height * rows.bitmap_stride_bytes),
        scales(rows, row) {
    if constexpr (kFixed) half_bytes = 16 / rows.pattern.of * rows.pattern.keep * Chunk::kWidth;
  }
  LACUNA_INLINE_MEMBER void prefetch(int64_t chunk) const {
    _mm_prefetch(next + ahead, _MM_HINT_T0);
    if (chunk % 16 == 0) _mm_prefetch(bits + bits_ahead + chunk * 4, _MM_HINT_T0);
  }
  LACUNA_INLINE_MEMBER Chunk take(int64_t chunk) {
    return expand<kFixed>(chunk, load_mask(bits + chunk * 4));
  }
  /// Counts in any case: a whole chunk's share may lead past the values of a shorter one.
  LACUNA_INLINE_MEMBER Chunk take_last(int64_t chunk, int64_t columns) {
    return expand<false>(chunk, last_mask(bits + chunk * 4, columns));
  }
  template <bool kWhole>
  LACUNA_INLINE_MEMBER Chunk expand([[maybe_unused]] int64_t chunk, uint32_t mask) {
    const std::byte* at = next;
    if constexpr (Chunk::kWidth == 1) {
      next += kWhole ? 2 * half_bytes : static_cast<int64_t>(_mm_popcnt_u32(mask));
      return {expand_u8(mask, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))),
              scales.at(chunk)};
    } else if constexpr (Chunk::kWidth == 2) {
      next += kWhole ? 2 * half_bytes : static_cast<int64_t>(_mm_popcnt_u32(mask)) * 2;
      return {expand_u16(mask, _mm512_loadu_si512(at))};
    } else {
      const auto low = static_cast<uint16_t>(mask), high = static_cast<uint16_t>(mask >> 16);
      const std::byte* middle =
          at + (kWhole ? half_bytes : static_cast<int64_t>(_mm_popcnt_u32(low)) * 4);
      next = middle + (kWhole ? half_bytes : static_cast<int64_t>(_mm_popcnt_u32(high)) * 4);
      return {expand_u32(low, _mm512_loadu_si512(at)),
              expand_u32(high, _mm512_loadu_si512(middle))};
    }
  }
};

// --- The tile ----------------------------------------------------------------------------------

template <class Math, class Cursor, int R, int T>
LACUNA_INLINE void tile(const RowsView& rows, int64_t row, int64_t last_row, const std::byte* x,
                        int64_t x_stride_bytes, float* sums) {
  // Rows past the end repeat the last one; their sums land where nobody looks.
  const auto cursor = [&](int64_t r) {
    return Cursor(rows, row + r < last_row ? row + r : last_row - 1, R);
  };
  Cursor cursors[4] = {cursor(0), cursor(R > 1 ? 1 : 0), cursor(R > 2 ? 2 : 0),
                       cursor(R > 3 ? 3 : 0)};
  __m512 sum[R][T];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) sum[r][t] = _mm512_setzero_ps();

  const auto multiply = [&](int64_t chunk, auto take) __attribute__((always_inline)) {
    typename Math::Operand w[R];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) w[r] = Math::weights(take(cursors[r]));
#pragma GCC unroll 16
    for (int t = 0; t < T; ++t) {
      const auto input = Math::input(x + t * x_stride_bytes + chunk * Math::kInputBytes);
#pragma GCC unroll 16
      for (int r = 0; r < R; ++r) sum[r][t] = Math::add_product(sum[r][t], w[r], input);
    }
  };
  const int64_t chunks = rows.columns / kChunk;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) cursors[r].prefetch(chunk);
    multiply(
        chunk, [&](Cursor & c) __attribute__((always_inline)) { return c.take(chunk); });
  }
  if (const int64_t left = rows.columns % kChunk)
    multiply(
        chunks, [&](Cursor & c)
                    __attribute__((always_inline)) { return c.take_last(chunks, left); });

#pragma GCC unroll 16
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) sums[t * kRowsAtOnce + r] = _mm512_reduce_add_ps(sum[r][t]);
}

template <class Math, class Cursor, int R, int T>
void tiles(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
           int64_t x_stride_bytes, float* sums) {
  for (int64_t row = first; row < last; row += R)
    tile<Math, Cursor, R, T>(rows, row, last, x, x_stride_bytes, sums + row - first);
}

/// The RowKernel of a Math and a Cursor.
template <class Math, class Cursor>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return tiles<Math, Cursor, 4, 1>(rows, first, last, x, x_stride_bytes, sums);
    case 2:
      return tiles<Math, Cursor, 4, 2>(rows, first, last, x, x_stride_bytes, sums);
    case 3:
      return tiles<Math, Cursor, 4, 3>(rows, first, last, x, x_stride_bytes, sums);
    case 4:
      return tiles<Math, Cursor, 4, 4>(rows, first, last, x, x_stride_bytes, sums);
    case 6:
      return tiles<Math, Cursor, 2, 6>(rows, first, last, x, x_stride_bytes, sums);
    case 8:
      return tiles<Math, Cursor, 2, 8>(rows, first, last, x, x_stride_bytes, sums);
    case 12:
      return tiles<Math, Cursor, 1, 12>(rows, first, last, x, x_stride_bytes, sums);
    default:
      return tiles<Math, Cursor, 1, 16>(rows, first, last, x, x_stride_bytes, sums);
  }
}

template <class Math, template <class> class Cursor>
constexpr RowImplementation implementation() {
  return {Math::kForm, row_kernel<Math, Cursor<typename Math::Chunk>>};
}

}  // namespace lacuna::format::avx512
