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

/// Compilers know neither what the tile instructions read nor what they write.
LACUNA_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

/// The tiles as long as this lives.
class AmxTiles {
 public:
  explicit AmxTiles(const TileConfig& config) { _tile_loadconfig(&config); }
  AmxTiles() {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  ~AmxTiles() { _tile_release(); }
  AmxTiles(const AmxTiles&) = delete;

 protected:
  // The intrinsics take a tile's number as a literal only.
  template <int kTile>
  static LACUNA_INLINE_MEMBER void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
  }
  template <int kTile>
  static LACUNA_INLINE_MEMBER void load(const void* rows) {  // 64 bytes apart
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(rows), "r"(int64_t{64}), "i"(kTile));
  }
  template <int kTile>
  static LACUNA_INLINE_MEMBER void store(void* rows) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(rows), "r"(int64_t{64}), "i"(kTile)
                 : "memory");
  }

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
