// The shapes that cuda_sm90_stream multiplies, for the tool (which has no CUDA) and for the kernel.
#pragma once

#include <cstdint>

namespace lacuna::kernels::linear_dense {

inline constexpr int64_t kStreamMaxInputs = 32768;

/// Null, or what the kernel needs.
inline const char* stream_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t != 1) return "needs 1 token";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 8 || k % 8 != 0 || k > kStreamMaxInputs)
    return "needs a multiple of 8 inputs, at most 32768";
  return nullptr;
}

}  // namespace lacuna::kernels::linear_dense
