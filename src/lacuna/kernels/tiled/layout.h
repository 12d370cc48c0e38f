// Where packed x and the buffers of each thread lie in the workspace of a tiled product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::tiled {

inline constexpr int64_t kTile = 16;     // rows or tokens of a tile
inline constexpr int64_t kPair = 32;     // rows or tokens of a step: two tiles
inline constexpr int64_t kColumns = 32;  // bf16 columns of a tile, 64 bytes
inline constexpr int64_t kTileBytes = 1024;
inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
/// Bytes from an expanded row to the next: a line more than the columns take.
inline constexpr int64_t weight_stride(int64_t columns) {
  return (ceil_div(columns, kColumns) + 1) * 64;
}

struct Layout {
  int64_t chunks = 0;       // of K, 64 bytes a row each
  int64_t token_tiles = 0;  // of 16
  int64_t slots = 0;        // buffers, one for each thread that takes part
  int64_t x_bytes = 0, sums_bytes = 0;
  int64_t weight_bytes = kPair * weight_stride(kMostColumns);  // of 32 rows

  /// @param chunk_columns  that a tile of 64 bytes a row holds
  Layout(int64_t tokens, int64_t columns, int threads, int64_t chunk_columns = kColumns)
      : chunks(ceil_div(columns, chunk_columns)),
        token_tiles(ceil_div(tokens, kTile)),
        slots(threads),
        x_bytes(chunks * token_tiles * kTileBytes),
        sums_bytes(kMostRows * std::min(ceil_div(tokens, kPair) * kPair, kMostTokens) * 4) {}
  int64_t slot_bytes() const { return 2 * weight_bytes + sums_bytes; }
  int64_t bytes() const { return x_bytes + slots * slot_bytes(); }
};

/// Threads that a product may use: what the workspace was made for, however many are handed in.
int most_threads();

}  // namespace lacuna::kernels::tiled
