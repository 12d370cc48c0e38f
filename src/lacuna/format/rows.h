// A weight row by row, as products walk it: dense, or a bitmap with its values.
#pragma once

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

  // A vector load takes up to 64 bytes where fewer values are left. The rows near the end of the
  // values are therefore read from a copy that has room behind it: no test in the inner loop.
  int64_t tail_row = 0;             ///< first row to be read from `tail`
  const std::byte* tail = nullptr;  ///< its values and all after

  int64_t width() const { return dtype == DType::kF32 ? 4 : 2; }
  int64_t value_index(int64_t row) const {
    return row_values ? row_values[row] : row * values_per_row;
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

/// Rows of a dense row-major matrix of f32, bf16 or f16.
RowsView dense_rows(const void* data, DType dtype, int64_t rows, int64_t columns);

/// A compact matrix (unstructured or keep:of) with the index that products need: for unstructured
/// ones 8 bytes a row, counted from the bitmap, and a copy of the last row or so.
class CompactRows {
 public:
  /// @param matrix  one that validate() accepts
  /// @errors kUsage: a pattern without bitmap; quantised values
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
