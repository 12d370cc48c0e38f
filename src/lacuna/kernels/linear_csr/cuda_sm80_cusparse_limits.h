// What cuda_sm80_cusparse can do, for its candidate and its kernel.
#pragma once

#include <cstdint>

namespace lacuna::kernels::linear_csr {

/// Why the kernel can't do this shape, or null.
inline const char* cusparse_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < 1 || t >= (1 << 20)) return "needs 1 to 2^20-1 tokens";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 1 || k >= (1 << 25)) return "needs 1 to 2^25-1 inputs";
  if (n * k >= (int64_t{1} << 31)) return "needs a weight of fewer than 2^31 places";
  return nullptr;
}

}  // namespace lacuna::kernels::linear_csr
