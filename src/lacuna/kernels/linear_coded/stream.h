// A quantised weight as one run of bytes a thread reads from front to back.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/compact.h"
#include "lacuna/kernels/stream.h"

namespace lacuna::kernels::linear_coded {

using stream::kChunk;
using stream::kTileRows;
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

/// The packed form. Rows go in tiles of 16. A tile begins with what its rows need once, so that it
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
class Stream {
 public:
  /// @param matrix  one that validate() accepts, of any pattern
  /// @param masks  own or shared ones for a sparse int4 matrix; what is fastest if not given
  /// @errors kNotPossible: fp8 codes, which no kernel here multiplies
  static Result<Stream> pack(const format::CompactMatrix& matrix,
                             const Executor& executor = Executor::serial(),
                             std::optional<Masks> masks = std::nullopt);

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t tiles() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t chunks() const { return (columns_ + kChunk - 1) / kChunk; }
  format::Code code() const { return quantization_.code; }
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
    return read_unaligned<float>(head(tile) + kTileRows * 8 + row * 4);
  }
  /// Sum of the row's codes, times the scale of each where scales lie in the chunks.
  double row_sum(int64_t tile, int64_t row) const {
    return read_unaligned<double>(head(tile) + row * 8);
  }
  /// All that stays in memory.
  size_t size_bytes() const { return data_.size() + offsets_.size() * sizeof(int64_t); }
  /// The rows of a tile as float32, out [16, columns]: scale times code, exact; dropped ones 0.
  void expand_tile(int64_t tile, float* out) const;

 private:
  const uint8_t* head(int64_t tile) const { return data_.data() + offsets_[tile]; }

  int64_t rows_ = 0, columns_ = 0, scale_sets_ = 0;
  format::Quantization quantization_;
  Masks masks_ = Masks::kNone;
  LargeBlock data_;
  std::vector<int64_t> offsets_;  // of tiles, in bytes
};

/// The codes of one chunk where their weights are: [block][4 * row + column], dropped ones 0.
using ChunkCodes = int8_t[kBlocks][kBlockWeights];

/// Walks one tile chunk by chunk.
class ChunkWalk {
 public:
  ChunkWalk(const Stream& stream, int64_t tile) : stream_(stream), next_(stream.chunks_of(tile)) {}
  /// Reads the next chunk.
  void take(ChunkCodes& codes);
  /// Of the chunk taken last.
  float scale(int64_t row, int64_t set) const;

 private:
  const Stream& stream_;
  const uint8_t* next_;
  const uint8_t* scales_ = nullptr;
};

}  // namespace lacuna::kernels::linear_coded
