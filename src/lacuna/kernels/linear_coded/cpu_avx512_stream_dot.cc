// A block of 64 codes, 16 rows by 4 columns, becomes one register of bytes (vpexpandb) and meets
// the 4 bytes of x for its columns, in every lane, in one vpdpbusd: a row's sum grows in its lane.
//
//   stream  |masks|scales|codes|masks ...                  read front to back
//   block   |r0: c0 c1 c2 c3|r1: c0 c1 c2 c3| ... |r15|    after expanding
//   x       |x0 x1 x2 x3|x0 x1 x2 x3| ...                  vpbroadcastd, which no port minds
//
// vpdpbusd wants one operand without sign: x + 128. What that adds, 128 times the sum of a row's
// codes, is known from packing. Grouped scales cost one conversion and one fused multiply-add for
// 16 rows. Four-bit codes stay in the upper half of their byte, 16 times too large, so that they
// need no sign extension.
//
// Cores with three 512-bit ports or two spend most on expanding (two operations of one port on
// Intel's, 1.5 cycles on Zen 5) and on moving masks (one more). Codes of shared masks are expanded
// once for two blocks. What was tried and what lost: bench/lab/cpu_coded.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lacuna/kernels/coded_lanes_avx512.h"
#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::Code;
using stream::ask_far;
using stream::ask_near;
using stream::Cursor;
using stream::kUnit;
using stream::scales_of;
using stream::take_pair;

LACUNA_INLINE __m512i broadcast_x(const uint8_t* x) {
  return _mm512_set1_epi32(read_unaligned<int32_t>(x));
}

template <Code kCode, Masks kMasks, bool kGrouped, int T>
LACUNA_INLINE void tile_of(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                           float* sums) {
  constexpr int kMaskBytes =
      static_cast<int>(kMasks == Masks::kNone ? 0 : 8 * (kMasks == Masks::kOwn ? kBlocks : kPairs));
  __m512i low_sums[T], high_sums[T];
  __m512 scaled[T];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    low_sums[t] = high_sums[t] = _mm512_setzero_si512();
    scaled[t] = _mm512_setzero_ps();
  }
  const uint8_t* at = stream.chunks_of(tile);
  const int64_t chunks = stream.chunks(), sets = stream.scale_sets();
  for (int64_t chunk = 0; chunk < chunks; ++chunk, x += kChunk) {
    const uint8_t* const masks = at;
    const uint8_t* const scales = at + kMaskBytes;
    Cursor cursor;
    cursor.low = cursor.high = scales + 2 * kTileRows * sets;
    for (int line = 0; line < kMaskBytes; line += 64) {
      ask_near(masks + line);
      ask_far(masks + line);
    }
    if constexpr (kMaskBytes > 0) {
      ask_near(scales);
      ask_far(scales);
    }
    if constexpr (kGrouped) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) low_sums[t] = high_sums[t] = _mm512_setzero_si512();
    }
#pragma GCC unroll 8
    for (int pair = 0; pair < kPairs; ++pair) {
      // A pair takes two lines of dense int8 codes, one of others, half a line of sparse int4.
      constexpr bool kTwoLines = kMasks == Masks::kNone && kCode == Code::kInt8;
      constexpr bool kHalfLine = kMasks != Masks::kNone && kCode == Code::kInt4;
      ask_near(cursor.low);
      if (!kHalfLine || pair % 2 == 0) ask_far(cursor.low);
      if constexpr (kTwoLines) {
        ask_near(cursor.low + 64);
        ask_far(cursor.low + 64);
      }
      __m512i low, high;
      take_pair<kCode, kMasks>(masks, pair, cursor, low, high);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const uint8_t* const input = x + t * x_stride + kBlockColumns * pair;
        low_sums[t] = _mm512_dpbusd_epi32(low_sums[t], broadcast_x(input), low);
        high_sums[t] = _mm512_dpbusd_epi32(high_sums[t], broadcast_x(input + kChunk / 2), high);
      }
    }
    at = cursor.low > cursor.high ? cursor.low : cursor.high;
    if constexpr (kGrouped) {
      __m512 scale = scales_of(scales);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const __m512i sum = sets == 2 ? low_sums[t] : _mm512_add_epi32(low_sums[t], high_sums[t]);
        scaled[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale, scaled[t]);
      }
      if (sets == 2) {
        scale = scales_of(scales + 2 * kTileRows);
#pragma GCC unroll 8
        for (int t = 0; t < T; ++t)
          scaled[t] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high_sums[t]), scale, scaled[t]);
      }
    }
  }
  // Unrolled like the others: an index known only at run time would move the sums to memory.
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    alignas(64) int32_t whole[kTileRows];
    alignas(64) float groups[kTileRows];
    _mm512_store_si512(whole, _mm512_add_epi32(low_sums[t], high_sums[t]));
    _mm512_store_ps(groups, scaled[t]);
    for (int64_t r = 0; r < kTileRows; ++r)
      sums[t * kTileRows + r] = without_offset(
          stream, tile, r, (kGrouped ? double{groups[r]} : double(whole[r])) * kUnit<kCode>);
  }
}

template <Code kCode, Masks kMasks, bool kGrouped>
void tile_for(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
              int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return tile_of<kCode, kMasks, kGrouped, 1>(stream, tile, x, x_stride, sums);
    case 2:
      return tile_of<kCode, kMasks, kGrouped, 2>(stream, tile, x, x_stride, sums);
    case 3:
      return tile_of<kCode, kMasks, kGrouped, 3>(stream, tile, x, x_stride, sums);
    case 4:
      return tile_of<kCode, kMasks, kGrouped, 4>(stream, tile, x, x_stride, sums);
    case 5:
      return tile_of<kCode, kMasks, kGrouped, 5>(stream, tile, x, x_stride, sums);
    case 6:
      return tile_of<kCode, kMasks, kGrouped, 6>(stream, tile, x, x_stride, sums);
    case 7:
      return tile_of<kCode, kMasks, kGrouped, 7>(stream, tile, x, x_stride, sums);
    default:
      return tile_of<kCode, kMasks, kGrouped, 8>(stream, tile, x, x_stride, sums);
  }
}

}  // namespace

void tile_avx512_stream_dot(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                            int64_t tokens, float* sums) {
  const auto with = [&]<Code kCode, Masks kMasks, bool kGrouped>() {
    tile_for<kCode, kMasks, kGrouped>(stream, tile, x, x_stride, tokens, sums);
  };
  const bool masked = stream.masks() != Masks::kNone;
  if (stream.code() == Code::kInt4) {
    if (!masked) return with.operator()<Code::kInt4, Masks::kNone, true>();
    return stream.masks() == Masks::kOwn ? with.operator()<Code::kInt4, Masks::kOwn, true>()
                                         : with.operator()<Code::kInt4, Masks::kShared, true>();
  }
  if (stream.scale_sets() == 0)
    return masked ? with.operator()<Code::kInt8, Masks::kOwn, false>()
                  : with.operator()<Code::kInt8, Masks::kNone, false>();
  return masked ? with.operator()<Code::kInt8, Masks::kOwn, true>()
                : with.operator()<Code::kInt8, Masks::kNone, true>();
}

}  // namespace lacuna::kernels::linear_coded
