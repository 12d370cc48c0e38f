// What a tiled product of codes keeps beside Layout, and how an expanded chunk lies.
#pragma once

#include "lacuna/kernels/tiled/layout.h"

namespace lacuna::kernels::tiled {

inline constexpr int64_t kCodedColumns = 64;  // of a tile of bytes

/// 32 rows: two tiles, then the scales of each as float32.
inline constexpr int64_t coded_chunk_bytes(int64_t scale_sets) {
  return 2 * (kTileBytes + scale_sets * kTile * 4);
}
static_assert(kMostColumns / kCodedColumns * coded_chunk_bytes(2) <=
              kPair * weight_stride(kMostColumns));  // fits Layout's buffer

/// Scales of all tokens, then a token as codes for each thread.
inline constexpr int64_t scale_bytes(int64_t tokens) { return ceil_div(tokens, kTile) * 64; }
inline constexpr int64_t token_bytes(int64_t columns) {
  return ceil_div(columns, kCodedColumns) * kCodedColumns;
}

}  // namespace lacuna::kernels::tiled
