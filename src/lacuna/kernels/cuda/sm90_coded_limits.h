// The shapes that the kernels of sm90_coded.cuh multiply, for the tool (which has no CUDA) and for
// them.
#pragma once

#include <cstdint>

namespace lacuna::kernels::cuda {

/// Null, or what the kernels need.
inline const char* coded_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < 1 || t > 64) return "needs 1 to 64 tokens";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 128 || k % 128 != 0 || k >= (1 << 20)) return "needs a multiple of 128 inputs below 2^20";
  return nullptr;
}

}  // namespace lacuna::kernels::cuda
