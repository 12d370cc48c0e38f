#include "lacuna/format/expand.h"
#include "lacuna/format/lanes_avx512.h"

namespace lacuna::format {

using namespace avx512;

int64_t expand_row_u16_avx512(const uint8_t* bitmap, int64_t columns, const std::byte* values,
                              const std::byte* values_end, std::byte* out) {
  const std::byte* next = values;
  // A full load may reach past the last value of the matrix: there only the kept lanes are loaded.
  const auto take = [&](uint32_t mask) __attribute__((always_inline)) {
    const auto kept = static_cast<unsigned>(_mm_popcnt_u32(mask));
    const __m512i packed = values_end - next >= 64
                               ? _mm512_loadu_si512(next)
                               : _mm512_maskz_loadu_epi16(first_lanes32(kept), next);
    next += kept * 2;
    return expand_u16(mask, packed);
  };
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32)
    _mm512_storeu_si512(out + column * 2, take(load_mask(bitmap + column / 8)));
  if (column < columns) {
    const int64_t left = columns - column;
    _mm512_mask_storeu_epi16(out + column * 2, first_lanes32(static_cast<unsigned>(left)),
                             take(last_mask(bitmap + column / 8, left)));
  }
  return (next - values) / 2;
}

int64_t expand_row_u32_avx512(const uint8_t* bitmap, int64_t columns, const std::byte* values,
                              const std::byte* values_end, std::byte* out) {
  const std::byte* next = values;
  const auto take = [&](uint16_t mask) __attribute__((always_inline)) {
    const auto kept = static_cast<unsigned>(_mm_popcnt_u32(mask));
    const __m512i packed = values_end - next >= 64
                               ? _mm512_loadu_si512(next)
                               : _mm512_maskz_loadu_epi32(first_lanes16(kept), next);
    next += kept * 4;
    return expand_u32(mask, packed);
  };
  int64_t column = 0;
  for (; column + 32 <= columns; column += 32) {
    const uint32_t mask = load_mask(bitmap + column / 8);
    _mm512_storeu_si512(out + column * 4, take(static_cast<uint16_t>(mask)));
    _mm512_storeu_si512(out + column * 4 + 64, take(static_cast<uint16_t>(mask >> 16)));
  }
  for (; column < columns; column += 16) {
    const int64_t left = columns - column < 16 ? columns - column : 16;
    _mm512_mask_storeu_epi32(out + column * 4, first_lanes16(static_cast<unsigned>(left)),
                             take(static_cast<uint16_t>(last_mask(bitmap + column / 8, left))));
  }
  return (next - values) / 4;
}

}  // namespace lacuna::format
