// The shapes that cuda_sm90_gap multiplies, for the tool (which has no CUDA) and for the kernel.
#pragma once

#include <cstdint>

namespace lacuna::kernels::linear_bitmap {

inline constexpr int64_t kGapMaxTokens = 4;
/// Of windows.
inline constexpr int64_t kWindowMaxTokens = 8;
/// Of codes: beyond, the gathers of x take longer than dense codes.
inline constexpr int64_t kGapCodesMaxTokens = 2;
inline constexpr int64_t kGapMaxInputs = 65472;
/// From two tokens on, all of x must fit in shared memory.
inline constexpr int64_t kGapMaxInputsOfTokens = 53000;
inline constexpr int64_t kWindowMaxInputs = 24900;
inline constexpr int64_t kWindowMaxInputsOfMany = 10600;

/// Null, or what the kernel needs of bf16.
inline const char* gap_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < 1 || t > kGapMaxTokens) return "needs 1 to 4 tokens";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 1 || k > kGapMaxInputs) return "needs 1 to 65472 inputs";
  if (t > 1 && k > kGapMaxInputsOfTokens) return "needs at most 53000 inputs for 2 to 4 tokens";
  return nullptr;
}

/// Null, or what it needs of bf16 packed in windows: x of 4 or 8 tokens and their sums in shared
/// memory.
inline const char* window_shape_refusal(int64_t n, int64_t k, int64_t t) {
  if (t < 1 || t > kWindowMaxTokens) return "needs 1 to 8 tokens";
  if (n < 1 || n >= (1 << 25)) return "needs 1 to 2^25-1 outputs";
  if (k < 1 || k > kWindowMaxInputs) return "needs 1 to 24900 inputs";
  if (t > 4 && k > kWindowMaxInputsOfMany) return "needs at most 10600 inputs for 5 to 8 tokens";
  return nullptr;
}

/// Null, or what it needs of codes.
inline const char* gap_codes_shape_refusal(int64_t n, int64_t k, int64_t t) {
  return t > kGapCodesMaxTokens ? "needs 1 to 2 tokens" : gap_shape_refusal(n, k, t);
}

}  // namespace lacuna::kernels::linear_bitmap
