// 16 blocks of a stream are a tile as AMX wants its second operand; x is the first, and the sums of
// up to four tiles of rows stay in tiles until all of them are done.
//
//   expand   blocks 0..15 of a chunk       |          | blocks 16..31          |
//   multiply the second half of the chunk before      | its first half
//
// So a multiplication meets blocks that left the core a while ago, and 16 tokens take hardly longer
// than one. Storing tiles after a while of other work costs a thousand cycles, whatever their
// number.
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"

#include <algorithm>
#include <type_traits>

#include "lacuna/kernels/amx_tiles.h"
#include "lacuna/kernels/linear_stream/cpu.h"
#include "lacuna/kernels/stream_lanes_avx512.h"

namespace lacuna::kernels::linear_stream {
namespace {

constexpr int kHalfBlocks = 16;  // 32 columns
constexpr int64_t kHalfBytes = kHalfBlocks * stream::kValueBlockBytes;

/// A weight's rows. Tiles 0..3 are sums, 4 and 5 x, 6 and 7 weights.
/// @tparam kTokenTiles  2 from 17 tokens on
template <int kTokenTiles>
class Rows : AmxTiles {
 public:
  static constexpr int kTiles = 4 / kTokenTiles;

  Rows(const format::RowsView& rows, const std::byte* x, int64_t tokens)
      : AmxTiles(static_cast<int>(std::min(tokens, kTileRows)),
                 static_cast<int>(kTokenTiles == 1 ? tokens : tokens - kTileRows)),
        rows_(rows),
        x_(x),
        step_(tokens * 64) {}

  void run(int64_t tile, int64_t tiles, float* sums) {
    run_one<0>(tile);
    if (tiles > 1) run_one<1>(tile + 1);
    if constexpr (kTiles > 2) {
      if (tiles > 2) run_one<2>(tile + 2);
      if (tiles > 3) run_one<3>(tile + 3);
    }
    store<0>(sums);
    if (tiles > 1) store<1>(sums);
    if constexpr (kTiles > 2) {
      if (tiles > 2) store<2>(sums);
      if (tiles > 3) store<3>(sums);
    }
    memory_barrier();
  }

 private:
  template <int kTile>
  void run_one(int64_t tile) {
    alignas(64) std::byte weights[2][kHalfBytes];
    const std::byte* x = x_;
    for_each_sum<kTile>([](auto sum) { zero<sum.value>(); });
    const uint8_t* next = rows_.stream + rows_.stream_offsets[tile];
    const int64_t chunks = stream::chunk_count(rows_.columns);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const uint8_t* mask = next;
      next += stream::kValueMaskBytes;
      for (int64_t line = 0; line < stream::kValueMaskBytes; line += 64) {
        stream::ask_near(mask + line);
        stream::ask_far(mask + line);
      }
      expand(mask, next, weights[0]);
      if (chunk > 0) {
        multiply<kTile, 7>(x, weights[1]);
        x += step_;
      }
      expand(mask + 4 * kHalfBlocks, next, weights[1]);
      multiply<kTile, 6>(x, weights[0]);
      x += step_;
    }
    if (chunks > 0) multiply<kTile, 7>(x, weights[1]);
  }

  static LACUNA_INLINE_MEMBER void expand(const uint8_t* mask, const uint8_t*& next,
                                          std::byte* out) {
#pragma GCC unroll 16
    for (int b = 0; b < kHalfBlocks; ++b) {
      if (b % 2 == 0) {  // half a line or less a block
        stream::ask_near(next);
        stream::ask_far(next);
      }
      _mm512_store_si512(out + stream::kValueBlockBytes * b,
                         stream::take_values(mask + 4 * b, next));
    }
  }

  template <int kTile, int kWeights>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* x, const std::byte* weights) {
    memory_barrier();
    load<kWeights>(weights);
    if constexpr (kTokenTiles == 1) {
      constexpr int kX = kWeights - 2;  // another each time, so that nothing waits
      load<kX>(x);
      BF16Product::add<kTile, kX, kWeights>();
    } else {
      load<4>(x);
      load<5>(x + kTileRows * 64);
      BF16Product::add<2 * kTile, 4, kWeights>();
      BF16Product::add<2 * kTile + 1, 5, kWeights>();
    }
    memory_barrier();
  }

  template <int kTile, class F>
  static LACUNA_INLINE_MEMBER void for_each_sum(F&& f) {
    f(std::integral_constant<int, kTokenTiles * kTile>());
    if constexpr (kTokenTiles == 2) f(std::integral_constant<int, 2 * kTile + 1>());
  }

  template <int kTile>
  void store(float* sums) {
    for_each_sum<kTile>([&](auto sum) {
      AmxTiles::store<sum.value>(sums + kTile * kTileSums +
                                 sum.value % kTokenTiles * kTileRows * kTileRows);
    });
  }

  const format::RowsView& rows_;
  const std::byte* x_;
  int64_t step_;
};

void kernel(const format::RowsView& rows, int64_t tile, int64_t tiles, const void* x,
            int64_t tokens, float* sums) {
  const auto* input = static_cast<const std::byte*>(x);
  if (tokens <= kTileRows) {
    Rows<1>(rows, input, tokens).run(tile, tiles, sums);
  } else {
    for (int64_t first = 0; first < tiles; first += Rows<2>::kTiles)
      Rows<2>(rows, input, tokens)
          .run(tile + first, std::min<int64_t>(Rows<2>::kTiles, tiles - first),
               sums + first * kTileSums);
  }
}

}  // namespace

const TileKernels kAmxDot = {
    .bf16 = kernel, .f16 = nullptr, .x = DType::kBF16, .tokens = kMostTokens, .tiles = kMostTiles};

}  // namespace lacuna::kernels::linear_stream
