// What the products by AMX share: its tiles, of which the first four are sums.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "lacuna/format/lanes_avx512.h"

namespace lacuna::kernels {
namespace {

/// Eight tiles: 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

/// Compilers know neither what the tile instructions read nor what they write.
LACUNA_INLINE void memory_barrier() { asm volatile("" ::: "memory"); }

/// Adds the products of two tiles of bf16 to sums.
struct BF16Product {
  template <int kSums, int kFirst, int kSecond>
  static LACUNA_INLINE_MEMBER void add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kSums), "i"(kFirst), "i"(kSecond));
  }
};

/// The tiles as long as this lives.
class AmxTiles {
 public:
  explicit AmxTiles(const TileConfig& config) { _tile_loadconfig(&config); }
  AmxTiles() {
    static constexpr TileConfig kConfig;
    _tile_loadconfig(&kConfig);
  }
  /// Fewer rows, which are tokens: of tiles 0, 2 and 4, and of 1, 3 and 5.
  AmxTiles(int tokens, int more_tokens) {
    TileConfig config;
    for (int i = 0; i < 6; ++i)
      config.rows[i] = static_cast<uint8_t>(i % 2 == 0 ? tokens : more_tokens);
    _tile_loadconfig(&config);
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

}  // namespace
}  // namespace lacuna::kernels
