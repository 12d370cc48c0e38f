// Chunks are expanded to bytes, dropped ones 0; no intrinsics.
#include <cmath>

#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {
namespace {

/// sums[r] += Σ codes[4 r + c] x[c], in a form that compilers make vector code of.
void add_block(const int8_t (&codes)[kBlockWeights], const uint8_t* x, int32_t (&sums)[kTileRows]) {
  const auto x0 = int16_t{x[0]}, x1 = int16_t{x[1]}, x2 = int16_t{x[2]}, x3 = int16_t{x[3]};
  for (int64_t r = 0; r < kTileRows; ++r)
    sums[r] +=
        codes[4 * r] * x0 + codes[4 * r + 1] * x1 + codes[4 * r + 2] * x2 + codes[4 * r + 3] * x3;
}

}  // namespace

void tile_portable(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                   int64_t tokens, float* sums) {
  const int64_t sets = stream.scale_sets(), chunks = stream.chunks();
  int32_t whole[kTokensAtOnce][kTileRows] = {};
  float scaled[kTokensAtOnce][kTileRows] = {};
  ChunkWalk walk(stream, tile);
  ChunkCodes codes;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    walk.take(codes);
    for (int64_t t = 0; t < tokens; ++t) {
      const uint8_t* input = x + t * x_stride + chunk * kChunk;
      int32_t halves[2][kTileRows] = {};
      for (int64_t b = 0; b < kBlocks; ++b)
        add_block(codes[b], input + b * kBlockColumns, halves[b / kPairs]);
      for (int64_t r = 0; r < kTileRows; ++r) {
        const int32_t both = halves[0][r] + halves[1][r];
        if (sets == 0) {
          whole[t][r] += both;
        } else {
          scaled[t][r] = std::fma(static_cast<float>(sets == 2 ? halves[0][r] : both),
                                  walk.scale(r, 0), scaled[t][r]);
          if (sets == 2)
            scaled[t][r] =
                std::fma(static_cast<float>(halves[1][r]), walk.scale(r, 1), scaled[t][r]);
        }
      }
    }
  }
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t r = 0; r < kTileRows; ++r)
      sums[t * kTileRows + r] = without_offset(stream, tile * kTileRows + r,
                                               sets ? double{scaled[t][r]} : double(whole[t][r]));
}

}  // namespace lacuna::kernels::linear_coded
