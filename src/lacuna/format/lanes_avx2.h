// 8 columns of a row in AVX2 registers, from a mask of 8 bits and the values it counts.
//
// AVX2 has no expand: a table of 256 shuffles, one for each mask, does its work.
#pragma once

#include <immintrin.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>

namespace lacuna::format::avx2 {

#define LACUNA_INLINE static inline __attribute__((always_inline))
#define LACUNA_INLINE_MEMBER inline __attribute__((always_inline))

/// kShuffle16[mask]: pshufb control that puts the next 16-bit value where the mask has a 1 and
/// zero elsewhere. kShuffle32[mask]: index of the value for vpermd, 0x80 for zero.
struct ShuffleTables {
  alignas(64) uint8_t shuffle16[256][16];
  alignas(64) uint8_t shuffle32[256][8];
};

constexpr ShuffleTables make_tables() {
  ShuffleTables tables{};
  for (int mask = 0; mask < 256; ++mask) {
    int rank = 0;
    for (int lane = 0; lane < 8; ++lane) {
      const bool kept = mask >> lane & 1;
      tables.shuffle16[mask][2 * lane] = static_cast<uint8_t>(kept ? 2 * rank : 0x80);
      tables.shuffle16[mask][2 * lane + 1] = static_cast<uint8_t>(kept ? 2 * rank + 1 : 0x80);
      tables.shuffle32[mask][lane] = static_cast<uint8_t>(kept ? rank : 0x80);
      rank += kept;
    }
  }
  return tables;
}
static constexpr ShuffleTables kTables = make_tables();

LACUNA_INLINE __m128i expand_u16(uint8_t mask, __m128i packed) {
  return _mm_shuffle_epi8(
      packed, _mm_load_si128(reinterpret_cast<const __m128i*>(kTables.shuffle16[mask])));
}

/// 8 bytes: an index of kShuffle32 is one of bytes too.
LACUNA_INLINE __m128i expand_u8(uint8_t mask, __m128i packed) {
  return _mm_shuffle_epi8(
      packed, _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.shuffle32[mask])));
}

LACUNA_INLINE __m256i expand_u32(uint8_t mask, __m256i packed) {
  const __m256i index = _mm256_cvtepu8_epi32(
      _mm_loadl_epi64(reinterpret_cast<const __m128i*>(kTables.shuffle32[mask])));
  // Bit 7 of a dropped lane, moved to the sign, becomes all ones: the lanes to clear.
  const __m256i dropped = _mm256_srai_epi32(_mm256_slli_epi32(index, 24), 31);
  return _mm256_andnot_si256(dropped, _mm256_permutevar8x32_epi32(packed, index));
}

/// 16 or 32 bytes at `from`, of which only those before `end` are read.
LACUNA_INLINE __m128i load128(const std::byte* from, const std::byte* end) {
  if (end - from >= 16) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  alignas(16) std::byte copy[16] = {};
  if (end > from) std::memcpy(copy, from, static_cast<size_t>(end - from));
  return _mm_load_si128(reinterpret_cast<const __m128i*>(copy));
}
LACUNA_INLINE __m256i load256(const std::byte* from, const std::byte* end) {
  if (end - from >= 32) return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  alignas(32) std::byte copy[32] = {};
  if (end > from) std::memcpy(copy, from, static_cast<size_t>(end - from));
  return _mm256_load_si256(reinterpret_cast<const __m256i*>(copy));
}

}  // namespace lacuna::format::avx2
