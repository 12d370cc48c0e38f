// A weight of codes as a stream: what linear_coded packs, and who multiplies it reads
// (linear_coded, tiled). What streams have in common: kernels/stream.h.
#pragma once

#include <cstdint>

#include "lacuna/core/bytes.h"
#include "lacuna/format/quantization.h"
#include "lacuna/kernels/stream.h"

namespace lacuna::kernels::stream {

/// A chunk of a tile is 16 blocks: the 64 weights that one 512-bit register holds, a lane of 32
/// bits for each row. Lane r of block b stands for columns 4b .. 4b+3 of row r.
inline constexpr int64_t kBlockColumns = 4;
inline constexpr int64_t kBlocks = kChunk / kBlockColumns;
inline constexpr int64_t kBlockWeights = kTileRows * kBlockColumns;
/// Blocks b and b + kPairs go together: they are what the two halves of a byte hold, and where
/// groups of 32 columns begin.
inline constexpr int64_t kPairs = kBlocks / 2;

/// Whose kept weights a mask of 64 bits marks.
enum class Masks : uint8_t {
  kNone,    ///< every weight is kept
  kOwn,     ///< one mask a block
  kShared,  ///< int4: one for both blocks of a pair, whose codes lie in one byte, 0 if dropped
};

/// A packed weight. Rows go in tiles of 16. A tile begins with what its rows need once, so that it
/// comes with the stream (elsewhere, each would be a miss at the end of a tile: 10 % of the time):
///
///     |sums|    f64, of rows 0..15: row_sum()
///     |scales|  f32, of rows 0..15, where a row has one: row_scale()
///
/// Then it holds, for each chunk of 64 columns:
///
///     |masks|   u64 each, bit 4r + c: column c of row r in the block; own: of blocks 0..15,
///               shared: of pairs 0..7
///     |scales|  bf16, of rows 0..15; once for each group that the chunk meets
///     |codes|   of the kept weights, in the order of the mask's bits:
///         int8          those of block 0, then 8, 1, 9, 2, ... 7, 15; two's complement
///         int4, own     low halves of the bytes: blocks 0..7, one after the other; high halves:
///                       blocks 8..15; as many bytes as the longer one needs; q - 8
///         int4, shared  a byte for each bit of a pair's mask, low half block b, high half b + 8
///
/// int4 with zero points becomes int8: codes q - z in -15..15, z taken off while packing. So no
/// kernel knows of z, at the price of int8's bytes.
///
/// So whoever multiplies follows one address, one expansion yields whole registers, and a row's
/// sum stays in its lane: one scale register serves 16 rows. Rows and columns past the last are
/// dropped or 0.
/// @cost bits a weight with groups of 64: int4 own 1.25 + 4d (+ 0.05 of padding), shared
/// 0.75 + 4 (2d - d²), where d is the share of kept weights; int8 with scales of rows 1 + 8d; and
/// 8 or 12 bytes a row
class CodedView {
 public:
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t tiles() const { return tile_count(rows_); }
  int64_t chunks() const { return chunk_count(columns_); }
  format::Code code() const { return code_; }
  Masks masks() const { return masks_; }
  int64_t mask_bytes() const {
    return masks_ == Masks::kNone ? 0 : (masks_ == Masks::kOwn ? kBlocks : kPairs) * 8;
  }
  /// Groups of a row that one chunk meets, whose scales lie in the stream; 0: one scale a row,
  /// row_scale().
  int64_t scale_sets() const { return scale_sets_; }
  /// Of a tile, before its first chunk.
  int64_t head_bytes() const { return kTileRows * (scale_sets_ == 0 ? 12 : 8); }
  /// The first chunk of a tile. Up to 64 bytes past the last may be read.
  const uint8_t* chunks_of(int64_t tile) const { return head(tile) + head_bytes(); }
  int64_t bytes_before(int64_t tile) const { return offsets_[tile]; }
  /// 0 for rows past the last, here and below.
  float row_scale(int64_t tile, int64_t row) const {
    return read_unaligned<float>(row_scales(tile) + row * 4);
  }
  /// Sum of the row's codes, times the scale of each where scales lie in the chunks.
  double row_sum(int64_t tile, int64_t row) const {
    return read_unaligned<double>(row_sums(tile) + row * 8);
  }
  const uint8_t* row_sums(int64_t tile) const { return head(tile); }
  const uint8_t* row_scales(int64_t tile) const { return head(tile) + kTileRows * 8; }

 protected:
  CodedView() = default;
  const uint8_t* head(int64_t tile) const { return data_ + offsets_[tile]; }

  int64_t rows_ = 0, columns_ = 0, scale_sets_ = 0;
  format::Code code_{};
  Masks masks_ = Masks::kNone;
  const uint8_t* data_ = nullptr;
  const int64_t* offsets_ = nullptr;  // of tiles, in bytes
};

}  // namespace lacuna::kernels::stream
