#include "lacuna/format/expand.h"
#include "lacuna/format/lanes_avx2.h"

namespace lacuna::format {

using namespace avx2;

int64_t expand_row_u16_avx2(const uint8_t* bitmap, int64_t columns, const std::byte* values,
                            const std::byte* values_end, std::byte* out) {
  const std::byte* next = values;
  const auto take = [&](uint8_t mask) __attribute__((always_inline)) {
    const __m128i packed = load128(next, values_end);
    next += _mm_popcnt_u32(mask) * 2;
    return expand_u16(mask, packed);
  };
  int64_t column = 0;
  for (; column + 8 <= columns; column += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + column * 2), take(bitmap[column / 8]));
  if (column < columns) {
    alignas(16) std::byte last[16];
    _mm_store_si128(reinterpret_cast<__m128i*>(last), take(bitmap[column / 8]));
    std::memcpy(out + column * 2, last, static_cast<size_t>(columns - column) * 2);
  }
  return (next - values) / 2;
}

int64_t expand_row_u32_avx2(const uint8_t* bitmap, int64_t columns, const std::byte* values,
                            const std::byte* values_end, std::byte* out) {
  const std::byte* next = values;
  const auto take = [&](uint8_t mask) __attribute__((always_inline)) {
    const __m256i packed = load256(next, values_end);
    next += _mm_popcnt_u32(mask) * 4;
    return expand_u32(mask, packed);
  };
  int64_t column = 0;
  for (; column + 8 <= columns; column += 8)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + column * 4), take(bitmap[column / 8]));
  if (column < columns) {
    alignas(32) std::byte last[32];
    _mm256_store_si256(reinterpret_cast<__m256i*>(last), take(bitmap[column / 8]));
    std::memcpy(out + column * 4, last, static_cast<size_t>(columns - column) * 4);
  }
  return (next - values) / 4;
}

}  // namespace lacuna::format
