// The shapes that cuda_sm90_scatter multiplies, for the tool (which has no CUDA) and for the
// kernel.
#pragma once

#include <cstdint>

namespace lacuna::kernels::linear_bitmap {

inline constexpr int64_t kScatterMaxTokens = 64;

/// Null, or what the kernel needs.
inline const char* scatter_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < 1 || t > kScatterMaxTokens) return "needs 1 to 64 tokens";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 8 || k % 8 != 0 || k >= (1 << 20)) return "needs a multiple of 8 inputs below 2^20";
  return nullptr;
}

}  // namespace lacuna::kernels::linear_bitmap
