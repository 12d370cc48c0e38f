// A chunk of 64 codes becomes one register of bytes (vpexpandb) and meets 64 bytes of x in one
// vpdpbusd, which adds four products to each of 16 integer sums.
//
//   stream  |masks of 4 rows|scales|codes of 4 rows|masks ...      read front to back
//   x       |64 bytes of token 0|, of token 1, ...                 once for 4 rows
//
// vpdpbusd wants one operand without sign: x + 128. What that adds, 128 times the sum of a row's
// codes, is known from packing. Grouped scales multiply the 16 sums of a chunk (converted, one
// fused multiply-add). Four-bit codes stay in the upper half of their byte, 16 times too large, so
// that they need no sign extension.
//
// Registers: 4 rows x 6 tokens of sums, x, a weight, masks. More tokens go over the tile again,
// which then lies in the nearest cache. What was tried and what lost: bench/lab/cpu_coded.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {
namespace {

using format::avx512::fresh_zero;

/// The mask goes from memory straight into its register: over a general register it takes half as
/// long again.
LACUNA_INLINE __m512i expand_u8(const uint8_t* mask, __m512i packed) {
  asm("" : "+v"(packed));  // the load stays apart (lanes_avx512.h)
  __mmask64 lanes;
  asm("kmovq %1, %0" : "=k"(lanes) : "m"(*reinterpret_cast<const uint64_t*>(mask)));
  return _mm512_mask_expand_epi8(fresh_zero(), lanes, packed);
}

LACUNA_INLINE int64_t count(const uint8_t* mask) {
  return static_cast<int64_t>(_mm_popcnt_u64(read_unaligned<uint64_t>(mask)));
}

/// The codes of the chunk's four rows, a register each, and how many bytes they took.
template <bool kMasked>
LACUNA_INLINE const uint8_t* take_int8(const uint8_t* codes, const uint8_t* masks,
                                       __m512i (&rows)[4]) {
#pragma GCC unroll 4
  for (int r = 0; r < 4; ++r) {
    const __m512i packed = _mm512_loadu_si512(codes);
    rows[r] = kMasked ? expand_u8(masks + 8 * r, packed) : packed;
    codes += kMasked ? count(masks + 8 * r) : 64;
  }
  return codes;
}

template <bool kMasked>
LACUNA_INLINE const uint8_t* take_int4(const uint8_t* codes, const uint8_t* masks,
                                       __m512i (&rows)[4]) {
  const __m512i upper = _mm512_set1_epi8(static_cast<char>(0xf0));
#pragma GCC unroll 2
  for (int r = 0; r < 4; r += 2) {
    const __m512i pairs = _mm512_loadu_si512(codes);
    const __m512i even = _mm512_and_si512(_mm512_slli_epi16(pairs, 4), upper);
    const __m512i odd = _mm512_and_si512(pairs, upper);
    if constexpr (kMasked) {
      rows[r] = expand_u8(masks + 8 * r, even);
      rows[r + 1] = expand_u8(masks + 8 * r + 8, odd);
      const int64_t a = count(masks + 8 * r), b = count(masks + 8 * r + 8);
      codes += a > b ? a : b;
    } else {
      rows[r] = even;
      rows[r + 1] = odd;
      codes += 64;
    }
  }
  return codes;
}

/// A scale in all lanes: the two bytes behind an address that is 2 short are the upper half of a
/// 32-bit load, so one broadcast and one `and` make a float of them.
LACUNA_INLINE __m512 broadcast_scale(const uint8_t* scale) {
  int32_t bits;
  std::memcpy(&bits, scale - 2, 4);
  return _mm512_castsi512_ps(
      _mm512_and_si512(_mm512_set1_epi32(bits), _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

template <format::Code kCode, bool kMasked, int kSets, int T>
LACUNA_INLINE void tile_of(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                           float* sums) {
  __m512i whole[T][4];
  __m512 scaled[T][4];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      if constexpr (kSets == 0) whole[t][r] = _mm512_setzero_si512();
      if constexpr (kSets != 0) scaled[t][r] = _mm512_setzero_ps();
    }
  const uint8_t* at = stream.tile(tile);
  const int64_t chunks = stream.chunks();
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const uint8_t* masks = at;
    const uint8_t* scales = at + (kMasked ? 32 : 0);
    const uint8_t* codes = scales + kSets * 8;
    __m512i w[4];
    if constexpr (kCode == format::Code::kInt8) {
      at = take_int8<kMasked>(codes, masks, w);
    } else {
      at = take_int4<kMasked>(codes, masks, w);
    }
    __m512 scale[4];
    if constexpr (kSets != 0) {
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        scale[r] = broadcast_scale(scales + 2 * r);
        if constexpr (kSets == 2)
          scale[r] = _mm512_mask_mov_ps(scale[r], 0xff00, broadcast_scale(scales + 8 + 2 * r));
      }
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      const __m512i input = _mm512_loadu_si512(x + t * x_stride + chunk * kChunk);
#pragma GCC unroll 4
      for (int r = 0; r < 4; ++r) {
        if constexpr (kSets == 0) {
          whole[t][r] = _mm512_dpbusd_epi32(whole[t][r], input, w[r]);
        } else {
          const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), input, w[r]);
          scaled[t][r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(sum), scale[r], scaled[t][r]);
        }
      }
    }
  }
  constexpr double kUnit = kCode == format::Code::kInt4 ? 1.0 / 16 : 1.0;
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t)
#pragma GCC unroll 4
    for (int r = 0; r < 4; ++r) {
      double sum;
      if constexpr (kSets == 0) {
        sum = _mm512_reduce_add_epi32(whole[t][r]);
      } else {
        sum = double{_mm512_reduce_add_ps(scaled[t][r])};
      }
      sums[t * kTileRows + r] =
          static_cast<float>(sum * kUnit - 128 * stream.row_sum(tile * kTileRows + r));
    }
}

template <format::Code kCode, bool kMasked, int kSets>
void tile_for(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
              int64_t tokens, float* sums) {
  switch (tokens) {
    case 1:
      return tile_of<kCode, kMasked, kSets, 1>(stream, tile, x, x_stride, sums);
    case 2:
      return tile_of<kCode, kMasked, kSets, 2>(stream, tile, x, x_stride, sums);
    case 3:
      return tile_of<kCode, kMasked, kSets, 3>(stream, tile, x, x_stride, sums);
    case 4:
      return tile_of<kCode, kMasked, kSets, 4>(stream, tile, x, x_stride, sums);
    case 5:
      return tile_of<kCode, kMasked, kSets, 5>(stream, tile, x, x_stride, sums);
    default:
      return tile_of<kCode, kMasked, kSets, 6>(stream, tile, x, x_stride, sums);
  }
}

}  // namespace

void tile_avx512_stream_dot(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                            int64_t tokens, float* sums) {
  using format::Code;
  const auto with_sets = [&]<Code kCode, bool kMasked>() {
    switch (stream.scale_sets()) {
      case 0:
        return tile_for<kCode, kMasked, 0>(stream, tile, x, x_stride, tokens, sums);
      case 1:
        return tile_for<kCode, kMasked, 1>(stream, tile, x, x_stride, tokens, sums);
      default:
        return tile_for<kCode, kMasked, 2>(stream, tile, x, x_stride, tokens, sums);
    }
  };
  const bool int8 = stream.code() == Code::kInt8;
  if (stream.masked()) {
    return int8 ? with_sets.operator()<Code::kInt8, true>()
                : with_sets.operator()<Code::kInt4, true>();
  }
  return int8 ? with_sets.operator()<Code::kInt8, false>()
              : with_sets.operator()<Code::kInt4, false>();
}

}  // namespace lacuna::kernels::linear_coded
