// bfloat16, float16 and fp8 as bit patterns; conversions round to nearest even.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace lacuna {

inline float bf16_to_float(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);  // NaN
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}

inline float f16_to_float(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16;
  const uint32_t exponent = (bits >> 10) & 0x1f;
  const uint32_t fraction = bits & 0x3ff;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (fraction << 13));
  if (exponent == 0) {  // zero and denormals: fraction * 2^-24
    const float magnitude = static_cast<float>(fraction) * 0x1p-24f;
    return std::bit_cast<float>(std::bit_cast<uint32_t>(magnitude) | sign);
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (fraction << 13));
}

inline uint16_t float_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000u) {  // below 2^-14: denormal or zero, in steps of 2^-24
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p24f;
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(scaled)));
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1) - 0x38000000u;
  return static_cast<uint16_t>(sign | (rounded >> 13));
}

/// fp8 e4m3 (fn: no infinities, NaN = 0x7f).
inline float f8e4m3_to_float(uint8_t bits) {
  const float sign = bits & 0x80 ? -1.0f : 1.0f;
  const int exponent = (bits >> 3) & 0xf;
  const int fraction = bits & 7;
  if (exponent == 15 && fraction == 7) return std::nanf("");
  if (exponent == 0) return sign * static_cast<float>(fraction) * 0x1p-9f;
  return sign * std::ldexp(1.0f + static_cast<float>(fraction) / 8, exponent - 7);
}

/// The nearest e4m3, ties to even; what lies past the largest (448) becomes it. NaN stays NaN.
inline uint8_t float_to_f8e4m3(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint8_t>(sign | 0x7f);   // NaN
  if (magnitude >= 0x43e00000u) return static_cast<uint8_t>(sign | 0x7e);  // 448 and more
  if (magnitude < 0x3c800000u) {  // below 2^-6: denormal or zero, in steps of 2^-9
    const float scaled = std::bit_cast<float>(magnitude) * 0x1p9f;
    return static_cast<uint8_t>(sign | static_cast<uint32_t>(std::nearbyintf(scaled)));
  }
  const uint32_t rounded = magnitude + 0x7ffffu + ((magnitude >> 20) & 1) - 0x3c000000u;
  return static_cast<uint8_t>(sign | (rounded >> 20));
}

/// fp8 e5m2 is the upper byte of a float16.
inline float f8e5m2_to_float(uint8_t bits) {
  return f16_to_float(static_cast<uint16_t>(uint16_t{bits} << 8));
}

}  // namespace lacuna
