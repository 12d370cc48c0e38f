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

}  // namespace

Result<ValueStream> ValueStream::pack(const format::CompactMatrix& matrix,
                                      const Executor& executor) {
  using format::PatternKind;
  if (matrix.pattern.kind != PatternKind::kUnstructured &&
      matrix.pattern.kind != PatternKind::kKeepOf)
    return usage_error("linear_stream: the weight is {} (need unstructured or KEEP:OF).",
                       matrix.pattern.text());
  if (lacuna::size_bytes(matrix.values_dtype) != 2)
    return usage_error("linear_stream: the values are {} (need bf16 or f16).",
                       long_name(matrix.values_dtype));
  LACUNA_TRY(const format::CompactRows compact, format::CompactRows::make(matrix));
  const RowsView& from = compact.view();
  const int64_t tiles = tile_count(from.rows);
  ValueStream packed;
  packed.offsets_.assign(static_cast<size_t>(tiles) + 1, 0);
  executor.parallel_for(tiles, [&](int64_t tile) {
    packed.offsets_[static_cast<size_t>(tile) + 1] = tile_bytes(from, tile);
  });
  for (size_t tile = 0; tile < static_cast<size_t>(tiles); ++tile)
    packed.offsets_[tile + 1] += packed.offsets_[tile];
  packed.data_ = LargeBlock(static_cast<size_t>(packed.offsets_.back()) + kMargin);
  executor.parallel_for(tiles, [&](int64_t tile) {
    pack_tile(from, tile, packed.data_.data() + packed.offsets_[static_cast<size_t>(tile)]);
  });
  packed.view_ = {.dtype = from.dtype,
                  .rows = from.rows,
                  .columns = from.columns,
                  .pattern = from.pattern,
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
