// Masks of rows turned into masks of blocks: a transposed matrix of 16 by 16 half bytes. For files
// whose instruction set has SSSE3.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace lacuna::kernels::stream {

/// @param rows  [16], bit 4b + c: column c of block b
/// @param blocks  [16], bit 4r + c: column c of row r
static inline __attribute__((always_inline)) void transpose_masks(const uint64_t* rows,
                                                                  uint64_t* blocks) {
  constexpr int kHalf = 8;
  __m128i from[kHalf], to[kHalf];
  for (int i = 0; i < kHalf; ++i)
    from[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows + 2 * i));
  // Each step joins bytes of rows that are half as far apart: 8, 4, 2, 1. First, two rows lie in
  // one register.
  for (int i = 0; i < 4; ++i) {
    to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 4]);
    to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 4]);
  }
  for (int i = 0; i < 4; ++i) {
    from[i] = _mm_unpacklo_epi8(to[i], to[i + 4]);      // bytes 0..3
    from[i + 4] = _mm_unpackhi_epi8(to[i], to[i + 4]);  // bytes 4..7
  }
  for (int half = 0; half < 8; half += 4)
    for (int i = 0; i < 2; ++i) {
      to[half + i] = _mm_unpacklo_epi8(from[half + i], from[half + i + 2]);
      to[half + i + 2] = _mm_unpackhi_epi8(from[half + i], from[half + i + 2]);
    }
  const __m128i low_half = _mm_set1_epi8(15), join = _mm_set1_epi16(0x1001);
  for (int i = 0; i < kHalf; ++i) {
    const __m128i &even = to[i / 2 * 2], &odd = to[i / 2 * 2 + 1];
    // Byte i of every row's mask: columns 0..3 of blocks 2i and 2i + 1.
    const __m128i bytes = i % 2 == 0 ? _mm_unpacklo_epi8(even, odd) : _mm_unpackhi_epi8(even, odd);
    const __m128i first = _mm_and_si128(bytes, low_half);
    const __m128i second = _mm_and_si128(_mm_srli_epi16(bytes, 4), low_half);
    _mm_storeu_si128(
        reinterpret_cast<__m128i*>(blocks + 2 * i),
        _mm_packus_epi16(_mm_maddubs_epi16(first, join), _mm_maddubs_epi16(second, join)));
  }
}

}  // namespace lacuna::kernels::stream
