#include "lacuna/kernels/linear_stream/value_stream.h"

#include <algorithm>
#include <cstring>

#include "lacuna/format/element.h"
#include "lacuna/kernels/linear_stream/value_chunk.h"

namespace lacuna::kernels::linear_stream {
namespace {

using format::RowsView;
using stream::chunk_count;
using stream::kMostValueChunkBytes;
using stream::kValueMaskBytes;
using stream::tile_count;

/// Past the last tile: the widest read of a kernel.
constexpr size_t kMargin = 64;

int64_t tile_bytes(const RowsView& rows, int64_t tile) {
  int64_t kept = 0;
  for (int64_t row = tile * kTileRows; row < std::min((tile + 1) * kTileRows, rows.rows); ++row)
    kept += format::count_bits(rows.row_bits(row), rows.bitmap_stride_bytes);
  return chunk_count(rows.columns) * kValueMaskBytes + 2 * kept;
}

/// The bits of a row's chunk.
uint64_t mask_at(const RowsView& rows, int64_t row, int64_t chunk) {
  const uint8_t* bits = rows.row_bits(row) + chunk * (kChunk / 8);
  const int64_t left = rows.bitmap_stride_bytes - chunk * (kChunk / 8);
  if (left >= 8) return read_unaligned<uint64_t>(bits);
  uint64_t mask = 0;
  std::memcpy(&mask, bits, static_cast<size_t>(left));
  return mask;
}

void pack_tile(const RowsView& rows, int64_t tile, uint8_t* out) {
  static constexpr uint8_t kNothing[64] = {};
  const ChunkTool& tool = chunk_tool();
  const int64_t top = tile * kTileRows, count = std::min(kTileRows, rows.rows - top);
  ChunkRows chunk{};
  for (int64_t r = 0; r < kTileRows; ++r)
    chunk.values[r] = r < count ? reinterpret_cast<const uint8_t*>(rows.row(top + r)) : kNothing;
  for (int64_t index = 0; index < chunk_count(rows.columns); ++index) {
    for (int64_t r = 0; r < count; ++r) chunk.masks[r] = mask_at(rows, top + r, index);
    uint8_t packed[kMostValueChunkBytes];  // the next tile is another thread's
    const int64_t bytes = tool.pack(chunk, packed);
    std::memcpy(out, packed, static_cast<size_t>(bytes));
    out += bytes;
  }
}

/// Some of the rows, and the tile of the whole that they begin with.
struct PartOfTiles {
  format::CompactRows rows;
  int64_t first_tile;
};

Result<std::vector<PartOfTiles>> tiles_of(const std::vector<format::CompactMatrix>& parts) {
  using format::PatternKind;
  std::vector<PartOfTiles> sources;
  int64_t rows = 0;
  for (const format::CompactMatrix& part : parts) {
    if (part.pattern.kind != PatternKind::kUnstructured &&
        part.pattern.kind != PatternKind::kKeepOf)
      return usage_error("linear_stream: the weight is {} (need unstructured or KEEP:OF).",
                         part.pattern.text());
    if (lacuna::size_bytes(part.values_dtype) != 2)
      return usage_error("linear_stream: the values are {} (need bf16 or f16).",
                         long_name(part.values_dtype));
    const format::CompactMatrix& front = parts.front();
    if (part.pattern != front.pattern || part.columns != front.columns ||
        part.values_dtype != front.values_dtype || rows % kTileRows != 0)
      return usage_error("linear_stream: matrices that can't be one below the other.");
    LACUNA_TRY(format::CompactRows from, format::CompactRows::make(part));
    sources.push_back({std::move(from), rows / kTileRows});
    rows += part.rows;
  }
  return sources;
}

const PartOfTiles& holder_of(const std::vector<PartOfTiles>& sources, int64_t tile) {
  return *std::prev(std::ranges::upper_bound(sources, tile, {}, &PartOfTiles::first_tile));
}

}  // namespace

Result<ValueStream> ValueStream::pack(const std::vector<format::CompactMatrix>& parts,
                                      const Executor& executor) {
  LACUNA_TRY(const std::vector<PartOfTiles> sources, tiles_of(parts));
  const RowsView& last = sources.back().rows.view();
  const int64_t tiles = sources.back().first_tile + tile_count(last.rows);
  ValueStream packed;
  packed.offsets_.assign(static_cast<size_t>(tiles) + 1, 0);
  executor.parallel_for(tiles, [&](int64_t tile) {
    const auto& [from, first] = holder_of(sources, tile);
    packed.offsets_[static_cast<size_t>(tile) + 1] = tile_bytes(from.view(), tile - first);
  });
  for (size_t tile = 0; tile < static_cast<size_t>(tiles); ++tile)
    packed.offsets_[tile + 1] += packed.offsets_[tile];
  packed.data_ = LargeBlock(static_cast<size_t>(packed.offsets_.back()) + kMargin);
  executor.parallel_for(tiles, [&](int64_t tile) {
    const auto& [from, first] = holder_of(sources, tile);
    pack_tile(from.view(), tile - first,
              packed.data_.data() + packed.offsets_[static_cast<size_t>(tile)]);
  });
  packed.view_ = {.dtype = last.dtype,
                  .rows = sources.back().first_tile * kTileRows + last.rows,
                  .columns = last.columns,
                  .pattern = last.pattern,
                  .stream = packed.data_.data(),
                  .stream_offsets = packed.offsets_.data()};
  return packed;
}

void expand_tile(const RowsView& rows, int64_t tile, DType dtype, void* out) {
  const ChunkTool& tool = chunk_tool();
  const int64_t top = tile * kTileRows, count = std::min(kTileRows, rows.rows - top);
  const uint8_t* next = rows.stream + rows.stream_offsets[tile];
  ChunkWeights weights;
  for (int64_t first = 0; first < rows.columns; first += kChunk) {
    next += tool.unpack(next, weights);
    const int64_t width = std::min(kChunk, rows.columns - first);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t at = (top + r) * rows.columns + first;
      if (dtype == rows.dtype) {
        std::memcpy(static_cast<std::byte*>(out) + 2 * at, weights[r],
                    static_cast<size_t>(2 * width));
      } else {
        float wide[kChunk];
        for (int64_t c = 0; c < width; ++c) wide[c] = format::read_float(weights[r], rows.dtype, c);
        format::write_floats(out, dtype, at, wide, width);
      }
    }
  }
}

}  // namespace lacuna::kernels::linear_stream
