// What cuda_sm80_cusparselt can do, for its candidate and its kernel.
#pragma once

#include <cstdint>

namespace lacuna::kernels::linear_nm {

/// Fewer tokens are for kernels that read the weight once.
inline constexpr int64_t kCusparseltFromTokens = 65;

/// Why the kernel can't do this shape, or null.
inline const char* cusparselt_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < kCusparseltFromTokens || t >= (1 << 24)) return "needs 65 to 2^24-1 tokens";
  if (n < 16 || n % 16 != 0 || n >= (1 << 25)) return "needs a multiple of 16 outputs below 2^25";
  if (k < 64 || k % 64 != 0 || k >= (1 << 20)) return "needs a multiple of 64 inputs below 2^20";
  return nullptr;
}

}  // namespace lacuna::kernels::linear_nm
