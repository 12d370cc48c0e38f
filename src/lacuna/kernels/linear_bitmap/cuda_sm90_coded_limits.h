// The shapes that the kernels of cuda_sm90_coded multiply, for the tool (which has no CUDA) and for
// them.
#pragma once

#include <cstdint>

namespace lacuna::kernels::linear_bitmap {

inline constexpr int64_t kCodedMaxTokens = 64;
/// x of 16 tokens must fit in the shared memory of a cluster of blocks.
inline constexpr int64_t kCodedMaxInputs = 28672;

/// Null, or what the kernels need.
inline const char* coded_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < 1 || t > kCodedMaxTokens) return "needs 1 to 64 tokens";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 1 || k > kCodedMaxInputs) return "needs 1 to 28672 inputs";
  return nullptr;
}

}  // namespace lacuna::kernels::linear_bitmap
