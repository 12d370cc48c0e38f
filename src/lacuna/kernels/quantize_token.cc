#include "lacuna/kernels/quantize_token.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "lacuna/core/cpu.h"
#include "lacuna/format/element.h"

namespace lacuna::kernels {

float quantize_token(DType dtype, const void* x, int64_t columns, int8_t* codes) {
#if defined(__x86_64__)
  static const QuantizeToken here =
      cpu_features().avx512 ? quantize_token_avx512 : quantize_token_portable;
#else
  static constexpr QuantizeToken here = quantize_token_portable;
#endif
  return here(dtype, x, columns, codes);
}

float quantize_token_portable(DType dtype, const void* x, int64_t columns, int8_t* codes) {
  if (columns <= 0) return 0.0f;
  // In pieces that the nearest cache holds, by loops that become vector code.
  constexpr int64_t kPiece = 1024;
  float piece[kPiece];
  const auto floats = [&](int64_t first, int64_t count) {
    for (int64_t k = 0; k < count; ++k) piece[k] = format::read_float(x, dtype, first + k);
  };
  const auto for_each_piece = [&](auto&& f) {
    for (int64_t first = 0; first < columns; first += kPiece) {
      const int64_t count = std::min(kPiece, columns - first);
      floats(first, count);
      f(first, count);
    }
  };
  // As integers, the bits of magnitudes have the order of their values, NaN above infinity.
  uint32_t largest_bits = 0;
  for_each_piece([&](int64_t, int64_t count) {
    for (int64_t k = 0; k < count; ++k)
      largest_bits = std::max(largest_bits, std::bit_cast<uint32_t>(piece[k]) & 0x7fffffffu);
  });
  if (largest_bits >= 0x7f800000u || largest_bits == 0) {
    std::fill(codes, codes + columns, int8_t{0});
    return largest_bits == 0 ? 0.0f : std::numeric_limits<float>::quiet_NaN();
  }
  const float scale =
      std::max(std::bit_cast<float>(largest_bits) / 127.0f, std::numeric_limits<float>::min());
  const float inverse = 1.0f / scale;
  for_each_piece([&](int64_t first, int64_t count) {
    // Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, into the low bits. The
    // largest magnitude times the inverse is 127 to within a rounding, so no code leaves its range.
    for (int64_t k = 0; k < count; ++k)
      codes[first + k] =
          static_cast<int8_t>(std::bit_cast<int32_t>(piece[k] * inverse + 0x1.8p23f));
  });
  return scale;
}

}  // namespace lacuna::kernels
