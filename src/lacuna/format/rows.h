// A weight row by row, as products walk it: dense, a bitmap with its values, blocks, slices or a
// stream of 16 rows. Values are numbers, or fp8 codes with scales.
#pragma once

#include <bit>
#include <cstdint>
#include <vector>

#include "lacuna/format/compact.h"

namespace lacuna::format {

/// Where the rows of W [rows, columns] lie. Owns nothing; nothing is aligned.
struct RowsView {
  DType dtype = DType::kBF16;
  int64_t rows = 0, columns = 0;
  const std::byte* values = nullptr;
  int64_t values_per_row = 0;       ///< dense: columns; keep:of: its value slots
  const uint8_t* bitmap = nullptr;  ///< null: dense
  int64_t bitmap_stride_bytes = 0;
  const int64_t* row_values = nullptr;  ///< unstructured: kept values before each row, [rows + 1]
  Pattern pattern;

  // fp8 (dtype kF8E4M3): a weight is its code times the scale of 32, 64 or 128 columns, or of all.
  const std::byte* scales = nullptr;  ///< bf16 [rows, scale_groups]
  int64_t scale_groups = 0;
  int scale_shift = 0;  ///< column >> scale_shift is the group; 63: one for all

  // A vector load takes up to 64 bytes where fewer values are left. The rows near the end of the
  // values are therefore read from a copy that has room behind it: no test in the inner loop.
  int64_t tail_row = 0;             ///< first row to be read from `tail`
  const std::byte* tail = nullptr;  ///< its values and all after

  // Blocks lie as in a CompactMatrix.
  const std::byte* block_columns = nullptr;  ///< i32 [blocks]
  const std::byte* block_offsets = nullptr;  ///< i64 [block rows + 1]

  // Slices: 16 rows side by side (kernels/linear_csr/slices.h draws them).
  const uint8_t* slices = nullptr;
  const int64_t* slice_steps = nullptr;  ///< steps before each slice, [slices + 1]
  const int32_t* slice_rows = nullptr;   ///< the row of each lane, -1: none, [slices * 16]

  // A stream: tiles of 16 rows (kernels/stream.h draws them). 64 bytes past the last may be read.
  const uint8_t* stream = nullptr;
  const int64_t* stream_offsets = nullptr;  ///< bytes before each tile, [tiles + 1]

  int64_t width() const { return dtype == DType::kF32 ? 4 : dtype == DType::kF8E4M3 ? 1 : 2; }
  const std::byte* row_scales(int64_t row) const { return scales + row * scale_groups * 2; }
  int64_t blocks_before(int64_t block_row) const {
    return read_unaligned<int64_t>(block_offsets + block_row * 8);
  }
  int64_t block_column(int64_t block) const {
    return read_unaligned<int32_t>(block_columns + block * 4);
  }
  /// Values before those of a row. (Rows of one block row lie in each other's blocks: what the rows
  /// before it take.)
  int64_t value_index(int64_t row) const {
    if (row_values) return row_values[row];
    if (block_offsets == nullptr) return row * values_per_row;
    const int64_t block_row = row / pattern.block_rows, before = blocks_before(block_row);
    const int64_t above = row % pattern.block_rows;
    const int64_t here = above > 0 ? blocks_before(block_row + 1) - before : 0;
    return (before * pattern.block_rows + here * above) * pattern.block_columns;
  }
  /// The values of a row; from a bitmap matrix 64 bytes may be read at any of them.
  const std::byte* row(int64_t r) const {
    if (bitmap == nullptr || r < tail_row) return values + value_index(r) * width();
    return tail + (value_index(r) - value_index(tail_row)) * width();
  }
  const uint8_t* row_bits(int64_t r) const { return bitmap + r * bitmap_stride_bytes; }
  /// Bytes that the rows before `row` take.
  int64_t bytes_before(int64_t row) const {
    return value_index(row) * width() + row * bitmap_stride_bytes;
  }
};

/// The scale of a column, from the scales of its row.
inline float scale_at(const std::byte* row_scales, int64_t column, int shift) {
  return std::bit_cast<float>(uint32_t{read_unaligned<uint16_t>(row_scales + (column >> shift) * 2)}
                              << 16);
}

/// Rows of a dense row-major matrix of f32, bf16 or f16.
RowsView dense_rows(const void* data, DType dtype, int64_t rows, int64_t columns);

/// A compact matrix with the index that products need: for unstructured ones 8 bytes a row, counted
/// from the bitmap; with a bitmap a copy of the last row or so; for blocks nothing. Codes may be
/// fp8, then also of a dense matrix, but not in blocks.
class CompactRows {
 public:
  /// @param matrix  one that validate() accepts
  /// @errors kUsage: dense without codes; other codes than fp8, or fp8 in blocks
  static Result<CompactRows> make(CompactMatrix matrix);
  CompactRows(CompactRows&&) = default;  // a copy's view would point into the original
  CompactRows& operator=(CompactRows&&) = default;
  const CompactMatrix& matrix() const { return matrix_; }
  const RowsView& view() const { return view_; }
  /// All that stays in memory.
  size_t size_bytes() const {
    return matrix_.size_bytes() + row_values_.size() * sizeof(int64_t) + tail_.size();
  }

 private:
  CompactRows() = default;
  CompactMatrix matrix_;
  std::vector<int64_t> row_values_;
  std::vector<std::byte> tail_;
  RowsView view_;  // into the members above, whose heap blocks stay where they are
};

}  // namespace lacuna::format
