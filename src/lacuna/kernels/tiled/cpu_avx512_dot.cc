// Eight rows by 32 tokens in 16 accumulators; a pair of columns of a row is broadcast, the same
// pair of every token is a register of packed x.
#include "lacuna/kernels/tiled/panels_avx512.h"

namespace lacuna::kernels::tiled {
namespace {

struct Avx512Dot {
  static constexpr int kRows = 8;

  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* w, const std::byte* x, int64_t chunks,
                                     bool first, float* sums, Beside& beside) {
    const int64_t stride = weight_stride(chunks * kColumns);
    for (int64_t row = 0; row < kPair; row += kRows) {
      float* to = sums + row / kTile * 512 + row % kTile * 16;
      __m512 sum[kRows][kTokenTiles];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int t = 0; t < kTokenTiles; ++t)
          sum[r][t] = first ? _mm512_setzero_ps() : _mm512_load_ps(to + r * 16 + t * 256);
      const std::byte* weights = w + row * stride;
      const std::byte* tokens = x;
      for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        for (int pair = 0; pair < 16; ++pair) {
          __m512bh input[kTokenTiles];
#pragma GCC unroll 2
          for (int t = 0; t < kTokenTiles; ++t)
            input[t] =
                reinterpret_cast<__m512bh>(_mm512_load_si512(tokens + t * kTileBytes + pair * 64));
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            int bits;
            std::memcpy(&bits, weights + r * stride + pair * 4, 4);
            const auto weight = reinterpret_cast<__m512bh>(_mm512_set1_epi32(bits));
#pragma GCC unroll 2
            for (int t = 0; t < kTokenTiles; ++t)
              sum[r][t] = _mm512_dpbf16_ps(sum[r][t], weight, input[t]);
          }
        }
        weights += 64;
        tokens += kTokenTiles * kTileBytes;
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int t = 0; t < kTokenTiles; ++t) _mm512_store_ps(to + r * 16 + t * 256, sum[r][t]);
      for (int64_t i = 0; i < chunks; i += kPair / kRows) beside.step();
    }
  }
};

}  // namespace

void run_avx512_dot(const RowsView& rows, const RowProduct& product, void* workspace,
                    const Executor& executor, const Blocking& blocking) {
  run<Avx512Dot>(rows, product, workspace, executor, blocking);
}

}  // namespace lacuna::kernels::tiled
