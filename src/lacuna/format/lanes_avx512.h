// 32 columns of a row in AVX-512 registers, from a mask of 32 bits and the values it counts.
//
// `vpexpandw` spreads packed values to the lanes whose mask bit is 1. Two habits of today's cores
// decide its speed. With a memory source it is microcoded or split (0.7 of the speed of a dense row
// on Zen 5), so the load is kept apart, and the empty asm keeps g++ from folding it back. With zero
// masking it waits for the old contents of its destination (a false dependency on Zen 4 and 5), so
// it merges into a register that was just zeroed.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace lacuna::format::avx512 {

#define LACUNA_INLINE static inline __attribute__((always_inline))
#define LACUNA_INLINE_MEMBER inline __attribute__((always_inline))

/// A register zeroed here and now; g++ would keep one zero for all and copy it twice a use.
LACUNA_INLINE __m512i fresh_zero() {
  __m512i zero;
  asm("vpxor %x0, %x0, %x0" : "=x"(zero));
  return zero;
}

LACUNA_INLINE __m512i expand_u16(uint32_t mask, __m512i packed) {
  asm("" : "+v"(packed));
  return _mm512_mask_expand_epi16(fresh_zero(), mask, packed);
}

LACUNA_INLINE __m512i expand_u32(uint16_t mask, __m512i packed) {
  asm("" : "+v"(packed));
  return _mm512_mask_expand_epi32(fresh_zero(), mask, packed);
}

LACUNA_INLINE __m256i expand_u8(uint32_t mask, __m256i packed) {
  asm("" : "+v"(packed));
  return _mm256_mask_expand_epi8(_mm512_castsi512_si256(fresh_zero()), mask, packed);
}

/// Mask of the lowest `count` lanes of 32.
LACUNA_INLINE __mmask32 first_lanes32(unsigned count) { return _bzhi_u32(~0u, count); }
LACUNA_INLINE __mmask16 first_lanes16(unsigned count) {
  return static_cast<__mmask16>(_bzhi_u32(0xffffu, count));
}

/// The mask bits of the last `columns` < 32 columns of a row; nothing past the row is read.
LACUNA_INLINE uint32_t last_mask(const uint8_t* bits, int64_t columns) {
  uint32_t mask = 0;
  std::memcpy(&mask, bits, static_cast<size_t>((columns + 7) / 8));
  return mask;
}

LACUNA_INLINE uint32_t load_mask(const uint8_t* bits) {
  uint32_t mask;
  std::memcpy(&mask, bits, 4);
  return mask;
}

}  // namespace lacuna::format::avx512
