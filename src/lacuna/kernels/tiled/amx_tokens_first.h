// The loop over K of a product by AMX whose weights come as tiles already: bf16 and bytes.
#pragma once

#include "lacuna/kernels/amx_tiles.h"
#include "lacuna/kernels/tiled/layout.h"

namespace lacuna::kernels::tiled {
namespace {

/// Tokens are the first operand and rows of W the second, so that x is packed as it lies and sums
/// come out token by token; a chunk of W is a tile of rows 0..15 and one of rows 16..31.
/// @tparam Product  adds tiles of x and w: Product::add<sums, x, w>()
template <class Product>
class AmxTokensFirst : public AmxTiles {
 public:
  static constexpr int64_t kSteps = 1;

  /// sums (4 tiles: rows 0..15 of tokens 0..15, of tokens 16..31, rows 16..31 ...) += x · w.
  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* w, const std::byte* x, int64_t chunks,
                                     bool first, float* sums, Beside& beside) {
    begin<kTokenTiles == 2>(first, sums);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      load<4>(x);
      load<6>(w);
      Product::template add<0, 4, 6>();
      if constexpr (kTokenTiles == 2) {
        load<5>(x + kTileBytes);
        Product::template add<1, 5, 6>();
      }
      load<7>(w + kTileBytes);
      Product::template add<2, 4, 7>();
      if constexpr (kTokenTiles == 2) Product::template add<3, 5, 7>();
      w += 2 * kTileBytes;
      x += kTokenTiles * kTileBytes;
      beside.step();
    }
    end<kTokenTiles == 2>(sums);
  }
};

}  // namespace
}  // namespace lacuna::kernels::tiled
