// A quantised weight as one run of bytes a thread reads from front to back.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/compact.h"

namespace lacuna::kernels::linear_coded {

/// Rows of a tile, and columns of a chunk.
inline constexpr int64_t kTileRows = 4;
inline constexpr int64_t kChunk = 64;

/// The packed form. Rows go in tiles of 4; a tile holds, for each chunk of 64 columns:
///
///     |mask r0|mask r1|mask r2|mask r3|  u64 each, 1 = kept; absent when every weight is kept
///     |scales of r0..r3|                 bf16; once for each group that the chunk meets
///     |codes|                            of the kept columns, in order:
///         int8   those of r0, then r1, r2, r3; two's complement
///         int4   a byte each for r0 (low half) and r1 (high half), as many as the longer of the
///                two needs, then the same for r2 and r3; two's complement of q - 8
///
/// So whoever multiplies follows one address: four separate rows are eight streams of 2 to 4 KiB,
/// between which the prefetchers of today's cores lose their way (half the speed from memory).
/// Rows past the last and columns past the last are dropped or 0.
/// @cost bits a weight at 50 %: int8 5.0, int4 with groups of 64 3.4 (the pairs' padding is 0.15)
class Stream {
 public:
  /// @param matrix  one that validate() accepts, of any pattern
  /// @errors kNotPossible: fp8 codes or zero points, which no kernel here multiplies
  static Result<Stream> pack(const format::CompactMatrix& matrix,
                             const Executor& executor = Executor::serial());

  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  int64_t tiles() const { return static_cast<int64_t>(offsets_.size()) - 1; }
  int64_t chunks() const { return (columns_ + kChunk - 1) / kChunk; }
  format::Code code() const { return quantization_.code; }
  bool masked() const { return masked_; }
  /// Scales lie in the stream (else one a row: row_scale()).
  bool grouped() const { return quantization_.group != 0; }
  /// Groups that one chunk meets.
  int64_t scale_sets() const {
    return !grouped() ? 0 : quantization_.group < kChunk ? kChunk / quantization_.group : 1;
  }
  /// Up to 64 bytes before and past a tile may be read.
  const uint8_t* tile(int64_t index) const { return data_.data() + kMargin + offsets_[index]; }
  int64_t bytes_before(int64_t tile) const { return offsets_[tile]; }
  /// Padded to whole tiles with 0.
  float row_scale(int64_t row) const { return row_scales_[row]; }
  /// Sum of the row's codes, times the scale of each where scales are grouped.
  double row_sum(int64_t row) const { return row_sums_[row]; }
  /// All that stays in memory.
  size_t size_bytes() const {
    return data_.size() + offsets_.size() * sizeof(int64_t) + row_scales_.size() * sizeof(float) +
           row_sums_.size() * sizeof(double);
  }
  /// The rows of a tile as float32, out [4, columns]: scale times code, exact; dropped ones 0.
  void expand_tile(int64_t tile, float* out) const;

 private:
  static constexpr int64_t kMargin = 64;  // bytes before the first tile and past the last
  int64_t rows_ = 0, columns_ = 0;
  format::Quantization quantization_;
  bool masked_ = false;
  LargeBlock data_;
  std::vector<int64_t> offsets_;  // of tiles, in bytes
  std::vector<float> row_scales_;
  std::vector<double> row_sums_;
};

/// Walks one tile chunk by chunk: where its parts lie.
class ChunkWalk {
 public:
  ChunkWalk(const Stream& stream, int64_t tile);
  void next();
  uint64_t mask(int64_t row) const;
  float scale(int64_t row, int64_t set) const;
  /// The code of the n-th kept column of a row.
  int code(int64_t row, int64_t n) const;

 private:
  void enter();
  const Stream& stream_;
  const uint8_t* at_;     // of the chunk
  const uint8_t* codes_;  // of the chunk
  int64_t kept_[kTileRows];
};

}  // namespace lacuna::kernels::linear_coded
