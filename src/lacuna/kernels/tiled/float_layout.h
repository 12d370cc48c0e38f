// Where packed x and the buffers of each thread lie in the workspace of a product in float32.
#pragma once

#include "lacuna/kernels/tiled/layout.h"

namespace lacuna::kernels::tiled {

inline constexpr int64_t kFloatColumns = 256;  // of a block of K
/// Floats from a row of an expanded panel to the next: rows fall into different sets of a cache.
inline constexpr int64_t kFloatStride = kFloatColumns + 16;
inline constexpr int64_t kFloatRows = 96;       // most rows of a panel
inline constexpr int64_t kFloatTokens = 512;    // most tokens of a block
inline constexpr int64_t kMostStepTokens = 32;  // of any instruction set

struct FloatLayout {
  int64_t step_tokens = 0;
  int64_t groups = 0;  // of step_tokens tokens
  int64_t x_floats = 0;
  static constexpr int64_t kSlotFloats = kFloatRows * (kFloatStride + kFloatTokens);

  FloatLayout(int64_t tokens, int64_t columns, int64_t tokens_of_a_step)
      : step_tokens(tokens_of_a_step),
        groups(ceil_div(tokens, tokens_of_a_step)),
        x_floats(groups * tokens_of_a_step * columns) {}
  int64_t bytes(int threads) const { return (x_floats + threads * kSlotFloats) * 4; }
};

}  // namespace lacuna::kernels::tiled
