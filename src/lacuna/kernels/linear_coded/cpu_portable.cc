// Kept columns one by one; no intrinsics.
#include <bit>

#include "lacuna/kernels/linear_coded/cpu.h"

namespace lacuna::kernels::linear_coded {

void tile_portable(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                   int64_t tokens, float* sums) {
  const int64_t sets = stream.scale_sets(), chunks = stream.chunks();
  const int64_t width = sets ? kChunk / sets : kChunk;  // columns of one integer sum
  int32_t whole[kTokensAtOnce * kTileRows] = {};
  float scaled[kTokensAtOnce * kTileRows] = {};
  ChunkWalk walk(stream, tile);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, walk.next()) {
    for (int64_t r = 0; r < kTileRows; ++r) {
      const uint64_t mask = walk.mask(r);
      int64_t n = 0;
      for (int64_t begin = 0; begin < kChunk; begin += width) {
        int32_t sum[kTokensAtOnce] = {};
        for (uint64_t left = mask >> begin, column = begin;
             left != 0 && column < static_cast<uint64_t>(begin + width); left >>= 1, ++column) {
          if ((left & 1) == 0) continue;
          const int code = walk.code(r, n++);
          for (int64_t t = 0; t < tokens; ++t)
            sum[t] += code * x[t * x_stride + chunk * kChunk + static_cast<int64_t>(column)];
        }
        for (int64_t t = 0; t < tokens; ++t) {
          if (sets) {
            scaled[t * kTileRows + r] += walk.scale(r, begin / width) * static_cast<float>(sum[t]);
          } else {
            whole[t * kTileRows + r] += sum[t];
          }
        }
      }
    }
  }
  for (int64_t i = 0; i < tokens * kTileRows; ++i) {
    const int64_t row = tile * kTileRows + i % kTileRows;
    sums[i] = static_cast<float>((sets ? double{scaled[i]} : double(whole[i])) -
                                 128 * stream.row_sum(row));
  }
}

}  // namespace lacuna::kernels::linear_coded
