// How the codes of a block are walked, whether a stream is written or read.
#pragma once

#include <bit>
#include <cstdint>

#include "lacuna/kernels/linear_coded/stream.h"

namespace lacuna::kernels::linear_coded {

inline constexpr uint64_t kAllKept = ~uint64_t{0};

/// Masks of a chunk.
inline int64_t mask_count(Masks kind) {
  return kind == Masks::kNone ? 0 : kind == Masks::kOwn ? kBlocks : kPairs;
}

/// Calls f(code) for those of a block that a mask marks, in order.
template <class Codes, class F>
void for_each_kept(Codes&& codes, uint64_t mask, F&& f) {
  if (mask == kAllKept) {
    for (int64_t i = 0; i < kBlockWeights; ++i) f(codes[i]);
    return;
  }
  for (; mask != 0; mask &= mask - 1) f(codes[std::countr_zero(mask)]);
}

}  // namespace lacuna::kernels::linear_coded
