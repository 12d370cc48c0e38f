#include "lacuna/format/rows.h"

#include <bit>
#include <cstring>

#include "lacuna/format/element.h"

namespace lacuna::format {
namespace {

/// Bytes that may be read behind the last value of a row.
constexpr int64_t kRoomBytes = 64;

}  // namespace

RowsView dense_rows(const void* data, DType dtype, int64_t rows, int64_t columns) {
  return {.dtype = dtype,
          .rows = rows,
          .columns = columns,
          .values = static_cast<const std::byte*>(data),
          .values_per_row = columns};
}

Result<CompactRows> CompactRows::make(CompactMatrix matrix) {
  const Quantization quantization = matrix.quantization;
  const bool fp8 = quantization.code == Code::kFP8 && matrix.pattern.kind != PatternKind::kBlock;
  if (matrix.pattern.kind == PatternKind::kDense && !fp8)
    return usage_error("rows: the matrix is dense (need a sparse pattern).");
  if (!quantization.none() && !fp8)
    return usage_error(
        "rows: the values are codes (got {}; need them unquantised, or fp8 without blocks). Expand "
        "them.",
        quantization.text());
  CompactRows rows;
  rows.matrix_ = std::move(matrix);
  const CompactMatrix& m = rows.matrix_;
  RowsView& view = rows.view_;
  view = {.dtype = fp8 ? DType::kF8E4M3 : m.values_dtype,
          .rows = m.rows,
          .columns = m.columns,
          .values = m.values.data(),
          .values_per_row = m.values_per_row(),
          .bitmap = m.bitmap.as<uint8_t>(),
          .bitmap_stride_bytes = m.bitmap_stride_bytes(),
          .pattern = m.pattern};
  if (fp8) {
    view.scales = m.scales.data();
    view.scale_groups = quantization.groups(m.columns);
    view.scale_shift =
        quantization.group == 0 ? 63 : std::countr_zero(static_cast<uint64_t>(quantization.group));
  }
  if (m.pattern.kind == PatternKind::kDense) {
    view.values_per_row = m.columns;
    view.bitmap = nullptr;
    return rows;
  }
  if (m.pattern.kind == PatternKind::kBlock) {
    view.tail_row = m.rows;
    view.block_columns = m.block_columns.data();
    view.block_offsets = m.block_offsets.data();
    return rows;
  }
  if (m.pattern.kind == PatternKind::kUnstructured) {
    rows.row_values_.reserve(static_cast<size_t>(m.rows) + 1);
    int64_t kept = 0;
    for (int64_t row = 0; row < m.rows; ++row) {
      rows.row_values_.push_back(kept);
      kept += count_bits(view.row_bits(row), view.bitmap_stride_bytes);
    }
    rows.row_values_.push_back(kept);
    view.row_values = rows.row_values_.data();
  }
  // A row is safe as it lies when a whole load at its end stays inside the values.
  const auto end = static_cast<int64_t>(m.values.size());
  view.tail_row = m.rows;
  while (view.tail_row > 0 && view.value_index(view.tail_row) * view.width() + kRoomBytes > end)
    --view.tail_row;
  const int64_t begin = view.value_index(view.tail_row) * view.width();
  rows.tail_.resize(static_cast<size_t>(end - begin + kRoomBytes));
  if (end > begin)
    std::memcpy(rows.tail_.data(), m.values.data() + begin, static_cast<size_t>(end - begin));
  view.tail = rows.tail_.data();
  return rows;
}

}  // namespace lacuna::format
