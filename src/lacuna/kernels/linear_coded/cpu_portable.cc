// Chunks are expanded to bytes, dropped ones 0; no intrinsics.
#include <cmath>

#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {
namespace {

using Rows = int16_t[kTileRows][kChunk];

/// Row by row in 16 bits, of which compilers know how to make dot products.
void by_rows(const ChunkCodes& codes, Rows& rows) {
  for (int64_t b = 0; b < kBlocks; ++b)
    for (int64_t r = 0; r < kTileRows; ++r)
      for (int64_t c = 0; c < kBlockColumns; ++c)
        rows[r][b * kBlockColumns + c] = codes[b][r * kBlockColumns + c];
}

int32_t dot(const int16_t* a, const int16_t* b) {
  int32_t sum = 0;
  for (int64_t i = 0; i < kChunk / 2; ++i) sum += a[i] * b[i];
  return sum;
}

}  // namespace

void tile_portable(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                   int64_t tokens, float* sums) {
  const int64_t sets = stream.scale_sets(), chunks = stream.chunks();
  int32_t whole[kTokensAtOnce][kTileRows] = {};
  float scaled[kTokensAtOnce][kTileRows] = {};
  ChunkWalk walk(stream, tile);
  ChunkCodes codes;
  Rows rows;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    walk.take(codes);
    by_rows(codes, rows);
    for (int64_t t = 0; t < tokens; ++t) {
      int16_t input[kChunk];
      for (int64_t k = 0; k < kChunk; ++k) input[k] = x[t * x_stride + chunk * kChunk + k];
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int32_t low = dot(rows[r], input);
        const int32_t high = dot(rows[r] + kChunk / 2, input + kChunk / 2);
        const int32_t both = low + high;
        if (sets == 0) {
          whole[t][r] += both;
        } else {
          scaled[t][r] =
              std::fma(static_cast<float>(sets == 2 ? low : both), walk.scale(r, 0), scaled[t][r]);
          if (sets == 2)
            scaled[t][r] = std::fma(static_cast<float>(high), walk.scale(r, 1), scaled[t][r]);
        }
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < kTileRows; ++r)
      sums[t * kTileRows + r] =
          without_offset(stream, tile, r, sets ? double{scaled[t][r]} : double(whole[t][r]));
}

}  // namespace lacuna::kernels::linear_coded
