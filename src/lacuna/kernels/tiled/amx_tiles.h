// What the products by AMX share: its tiles, of which the first four are sums.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lacuna/format/lanes_avx512.h"
#include "lacuna/kernels/tiled/layout.h"

namespace lacuna::kernels::tiled {
namespace {

/// Eight tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
inline constexpr TileConfig kWholeTiles;

/// Compilers know neither what the tile instructions read nor what they write.
LACUNA_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

/// The tiles as long as this lives.
class AmxTiles {
 public:
  explicit AmxTiles(const TileConfig& config = kWholeTiles) { _tile_loadconfig(&config); }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;

 protected:
  /// Tiles 0 and 2, and 1 and 3 where kAll: zeros at first, else what lies in `sums`, a KiB each.
  template <bool kAll>
  LACUNA_INLINE_MEMBER void begin(bool first, const float* sums) {
    memory_barrier();
    if (first) {
      _tile_zero(0);
      _tile_zero(2);
      if constexpr (kAll) {
        _tile_zero(1);
        _tile_zero(3);
      }
    } else {
      _tile_loadd(0, sums, 64);
      _tile_loadd(2, sums + 512, 64);
      if constexpr (kAll) {
        _tile_loadd(1, sums + 256, 64);
        _tile_loadd(3, sums + 768, 64);
      }
    }
  }
  template <bool kAll>
  LACUNA_INLINE_MEMBER void end(float* sums) {
    _tile_stored(0, sums, 64);
    _tile_stored(2, sums + 512, 64);
    if constexpr (kAll) {
      _tile_stored(1, sums + 256, 64);
      _tile_stored(3, sums + 768, 64);
    }
    memory_barrier();
  }
};

/// Tokens are the first operand and rows of W the second, so that x is packed as it lies and sums
/// come out token by token; a chunk of W is a tile of rows 0..15 and one of rows 16..31.
/// @tparam Products  Products::add<sum>(): sum 0 of tiles 4 and 6, 1 of 5 and 6, 2 of 4 and 7, 3 of
/// 5 and 7
template <class Products>
class AmxTokensFirst : public AmxTiles {
 public:
  static constexpr int64_t kSteps = 1;

  /// sums (4 tiles: rows 0..15 of tokens 0..15, of tokens 16..31, rows 16..31 ...) += x · w.
  template <int kTokenTiles, class Beside>
  LACUNA_INLINE_MEMBER void multiply(const std::byte* w, const std::byte* x, int64_t chunks,
                                     bool first, float* sums, Beside& beside) {
    begin<kTokenTiles == 2>(first, sums);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      _tile_loadd(4, x, 64);
      _tile_loadd(6, w, 64);
      Products::template add<0>();
      if constexpr (kTokenTiles == 2) {
        _tile_loadd(5, x + kTileBytes, 64);
        Products::template add<1>();
      }
      _tile_loadd(7, w + kTileBytes, 64);
      Products::template add<2>();
      if constexpr (kTokenTiles == 2) Products::template add<3>();
      w += 2 * kTileBytes;
      x += kTokenTiles * kTileBytes;
      beside.step();
    }
    end<kTokenTiles == 2>(sums);
  }
};

}  // namespace
}  // namespace lacuna::kernels::tiled
