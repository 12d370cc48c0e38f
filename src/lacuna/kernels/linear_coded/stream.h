// A quantised weight as one run of bytes a thread reads from front to back.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/compact.h"
#include "lacuna/kernels/coded_stream.h"

namespace lacuna::kernels::linear_coded {

using stream::CodedView;
using stream::kBlockColumns;
using stream::kBlocks;
using stream::kBlockWeights;
using stream::kChunk;
using stream::kPairs;
using stream::kTileRows;
using stream::Masks;

/// The packed form, with its memory.
class Stream : public CodedView {
 public:
  /// @param matrix  one that validate() accepts, of any pattern
  /// @param masks  own or shared ones for a sparse int4 matrix; what is fastest if not given
  /// @errors kNotPossible: fp8 codes, which no kernel here multiplies
  static Result<Stream> pack(const format::CompactMatrix& matrix,
                             const Executor& executor = Executor::serial(),
                             std::optional<Masks> masks = std::nullopt);

  /// All that stays in memory.
  size_t size_bytes() const { return block_.size() + tile_offsets_.size() * sizeof(int64_t); }
  /// The rows of a tile as float32, out [16, columns]: scale times code, exact; dropped ones 0.
  void expand_tile(int64_t tile, float* out) const;

 private:
  LargeBlock block_;
  std::vector<int64_t> tile_offsets_;
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
