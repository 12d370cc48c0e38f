// 16 values at a time, in two walks over a token that the nearest cache holds.
// g++ 12 warns of its own "undefined" operands inside its intrinsics.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <algorithm>
#include <bit>
#include <limits>

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/quantize_token.h"

namespace lacuna::kernels {
namespace {

template <DType kType>
LACUNA_INLINE __m512 load(const void* x, int64_t at, __mmask16 lanes) {
  if constexpr (kType == DType::kF32)
    return _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(x) + at);
  const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(x) + at);
  if constexpr (kType == DType::kBF16)
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
  return _mm512_cvtph_ps(bits);
}

LACUNA_INLINE __mmask16 lanes_from(int64_t at, int64_t columns) {
  return columns - at >= 16 ? static_cast<__mmask16>(0xffff)
                            : format::avx512::first_lanes16(static_cast<unsigned>(columns - at));
}

template <DType kType>
float quantize(const void* x, int64_t columns, int8_t* codes) {
  // As integers, the bits of magnitudes have the order of their values, NaN above infinity.
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i largest = _mm512_setzero_si512();
  for (int64_t at = 0; at < columns; at += 16)
    largest = _mm512_max_epu32(
        largest, _mm512_and_si512(
                     magnitude, _mm512_castps_si512(load<kType>(x, at, lanes_from(at, columns)))));
  const uint32_t largest_bits = _mm512_reduce_max_epu32(largest);
  const bool none = largest_bits == 0 || largest_bits >= 0x7f800000u;
  const float scale = none ? 1.0f
                           : std::max(std::bit_cast<float>(largest_bits) / 127.0f,
                                      std::numeric_limits<float>::min());
  const __m512 inverse = _mm512_set1_ps(none ? 0.0f : 1.0f / scale);
  for (int64_t at = 0; at < columns; at += 16) {
    const __mmask16 lanes = lanes_from(at, columns);
    // Of NaN and infinities, 0 times which isn't 0, nothing is taken.
    const __m512 values = none ? _mm512_setzero_ps() : load<kType>(x, at, lanes);
    __m128i sixteen = _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(_mm512_mul_ps(values, inverse)));
    asm("" : "+v"(sixteen));  // narrowing into memory under a mask is microcoded
    if (columns - at >= 16)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + at), sixteen);
    else
      _mm_mask_storeu_epi8(codes + at, lanes, sixteen);
  }
  if (!none) return scale;
  return largest_bits == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
}

}  // namespace

float quantize_token_avx512(DType dtype, const void* x, int64_t columns, int8_t* codes) {
  if (dtype == DType::kF32) return quantize<DType::kF32>(x, columns, codes);
  if (dtype == DType::kBF16) return quantize<DType::kBF16>(x, columns, codes);
  return quantize<DType::kF16>(x, columns, codes);
}

}  // namespace lacuna::kernels
