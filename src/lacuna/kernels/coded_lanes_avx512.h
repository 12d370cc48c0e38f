// Codes of a stream in AVX-512 registers (coded_stream.h has the layout).
#pragma once

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/coded_stream.h"
#include "lacuna/kernels/stream_lanes_avx512.h"

namespace lacuna::kernels::stream {

using format::Code;
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

/// The low half of each byte moved to the upper half: one operation of bit matrices.
LACUNA_INLINE __m512i low_halves(__m512i bytes) {
  __m512i out;
  asm("vgf2p8affineqb $0, %2, %1, %0"
      : "=v"(out)
      : "v"(bytes), "v"(_mm512_set1_epi64(0x0000000001020408)));
  return out;
}

LACUNA_INLINE __m512i high_halves(__m512i bytes) {
  return _mm512_and_si512(bytes, _mm512_set1_epi8(static_cast<char>(0xf0)));
}

/// Four-bit codes stay in the upper half of their byte, so that they need no sign extension.
template <Code kCode>
inline constexpr double kUnit = kCode == Code::kInt4 ? 1.0 / 16 : 1.0;

/// Where the codes of the two blocks of a pair are taken from.
struct Cursor {
  const uint8_t *low, *high;
};

/// The next two blocks as bytes with sign, four-bit codes 1 / kUnit times too large.
template <Code kCode, Masks kMasks>
LACUNA_INLINE void take_pair(const uint8_t* masks, int pair, Cursor& at, __m512i& low,
                             __m512i& high) {
  const uint8_t* const low_mask = masks + 8 * pair;
  const uint8_t* const high_mask = low_mask + 8 * kPairs;
  if constexpr (kMasks == Masks::kNone) {
    const __m512i bytes = _mm512_loadu_si512(at.low);
    low = kCode == Code::kInt8 ? bytes : low_halves(bytes);
    high = kCode == Code::kInt8 ? _mm512_loadu_si512(at.low + 64) : high_halves(bytes);
    at.low += kCode == Code::kInt8 ? 128 : 64;
  } else if constexpr (kMasks == Masks::kShared) {
    const __m512i bytes = expand_u8(low_mask, _mm512_loadu_si512(at.low));
    low = low_halves(bytes);
    high = high_halves(bytes);
    at.low += count(low_mask);
  } else if constexpr (kCode == Code::kInt8) {
    low = expand_u8(low_mask, _mm512_loadu_si512(at.low));
    at.low += count(low_mask);
    high = expand_u8(high_mask, _mm512_loadu_si512(at.low));
    at.low += count(high_mask);
  } else {
    low = expand_u8(low_mask, low_halves(_mm512_loadu_si512(at.low)));
    at.low += count(low_mask);
    high = expand_u8(high_mask, high_halves(_mm512_loadu_si512(at.high)));
    at.high += count(high_mask);
  }
}

/// The scales of 16 rows.
LACUNA_INLINE __m512 scales_of(const uint8_t* scales) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

}  // namespace lacuna::kernels::stream
