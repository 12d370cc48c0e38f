#include "lacuna/kernels/linear_csr/slices.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <numeric>

namespace lacuna::kernels::linear_csr {
namespace {

using format::RowsView;

/// Calls entry(gap, rank) for each entry that a row becomes; rank: of the row's values, or -1 for a
/// zero on the way.
template <class Entry>
void split_row(const RowsView& rows, int64_t row, Entry&& entry) {
  const uint8_t* bits = rows.row_bits(row);
  int64_t last = 0, rank = 0;
  for (int64_t byte = 0; byte < rows.bitmap_stride_bytes; ++byte)
    for (unsigned left = bits[byte]; left != 0; left &= left - 1) {
      const int64_t column = byte * 8 + std::countr_zero(left);
      for (; column - last > kLargestGap; last += kLargestGap) entry(kLargestGap, -1);
      entry(column - last, rank++);
      last = column;
    }
}

}  // namespace

Result<Slices> Slices::pack(const format::CompactMatrix& matrix, const Executor& executor) {
  if (matrix.pattern.kind != format::PatternKind::kUnstructured)
    return usage_error("linear_csr: the weight is {} (need unstructured).", matrix.pattern.text());
  LACUNA_TRY(const format::CompactRows compact, format::CompactRows::make(matrix));
  const RowsView& from = compact.view();
  const int64_t count = slice_count(from.rows), width = from.width();
  const int64_t stride = step_bytes(from.dtype);
  std::vector<int64_t> entries(static_cast<size_t>(from.rows));
  executor.parallel_for(count, [&](int64_t part) {
    for (int64_t row = part * kLanes; row < std::min((part + 1) * kLanes, from.rows); ++row)
      split_row(from, row, [&](int64_t, int64_t) { ++entries[static_cast<size_t>(row)]; });
  });

  Slices packed;
  packed.rows_.assign(static_cast<size_t>(count * kLanes), -1);
  const auto rows_end = packed.rows_.begin() + from.rows;
  std::iota(packed.rows_.begin(), rows_end, 0);
  std::stable_sort(packed.rows_.begin(), rows_end, [&](int32_t a, int32_t b) {
    return entries[static_cast<size_t>(a)] > entries[static_cast<size_t>(b)];
  });
  packed.steps_.assign(static_cast<size_t>(count) + 1, 0);
  for (int64_t slice = 0; slice < count; ++slice)  // its first row is its longest
    packed.steps_[slice + 1] =
        packed.steps_[slice] +
        entries[static_cast<size_t>(packed.rows_[static_cast<size_t>(slice * kLanes)])];
  packed.data_ = LargeBlock(static_cast<size_t>(packed.steps_.back() * stride));
  executor.parallel_for(count, [&](int64_t slice) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const int64_t row = packed.rows_[static_cast<size_t>(slice * kLanes + lane)];
      if (row < 0) continue;
      const std::byte* values = from.row(row);
      uint8_t* step = packed.data_.data() + packed.steps_[static_cast<size_t>(slice)] * stride;
      split_row(from, row, [&](int64_t gap, int64_t rank) {
        step[lane] = static_cast<uint8_t>(gap);
        if (rank >= 0)
          std::memcpy(step + kLanes + lane * width, values + rank * width,
                      static_cast<size_t>(width));
        step += stride;
      });
    }
  });
  packed.view_ = {.dtype = from.dtype,
                  .rows = from.rows,
                  .columns = from.columns,
                  .pattern = from.pattern,
                  .slices = packed.data_.data(),
                  .slice_steps = packed.steps_.data(),
                  .slice_rows = packed.rows_.data()};
  return packed;
}

void expand_slice(const RowsView& rows, int64_t slice, DType dtype, void* out) {
  const auto width = static_cast<int64_t>(size_bytes(dtype));
  for (int64_t lane = 0; lane < kLanes; ++lane) {
    const int64_t row = rows.slice_rows[slice * kLanes + lane];
    if (row < 0) continue;
    std::byte* to = static_cast<std::byte*>(out) + row * rows.columns * width;
    std::memset(to, 0, static_cast<size_t>(rows.columns * width));
    for_each_entry(rows, slice, lane, [&](int64_t column, float value) {
      format::write_float(to, dtype, column, value);
    });
  }
}

}  // namespace lacuna::kernels::linear_csr
