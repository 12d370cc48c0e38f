// A very sparse weight as 16 rows side by side, each lane stepping from one non-zero of its row to
// the next.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/element.h"
#include "lacuna/format/rows.h"

namespace lacuna::kernels::linear_csr {

/// Rows of a slice.
inline constexpr int64_t kLanes = 16;
/// The largest step from one entry of a lane to the next.
inline constexpr int64_t kLargestGap = 255;

inline int64_t slice_count(int64_t rows) { return (rows + kLanes - 1) / kLanes; }
/// Bytes of a step.
inline int64_t step_bytes(DType values) { return kLanes * (values == DType::kF32 ? 5 : 3); }

/// The packed form. A slice is a run of steps:
///
///     |gaps of lanes 0..15|values of lanes 0..15|gaps ...     u8 [16], then f32, bf16 or f16 [16]
///
/// An entry lies `gap` columns after the entry before it in its lane (the first one: after column
/// 0). Where the next non-zero is further than 255 columns away, an entry of value 0 steps 255.
/// Lanes that end before their slice are filled with entries of gap 0 and value 0: they repeat a
/// column.
///
/// Rows go into slices by their number of entries, the longest first, so that the lanes of a slice
/// end together whatever the rows are like; slice_rows says which row a lane is.
/// @cost 3 bytes a non-zero (5 of f32), and 0.8 bytes for the longest stretch of 255 zeros
class Slices {
 public:
  /// @param matrix  one that validate() accepts
  /// @errors kUsage: another pattern than unstructured; quantised values
  static Result<Slices> pack(const format::CompactMatrix& matrix,
                             const Executor& executor = Executor::serial());
  Slices(Slices&&) = default;  // a copy's view would point into the original
  Slices& operator=(Slices&&) = default;
  const format::RowsView& view() const { return view_; }
  /// All that stays in memory.
  size_t size_bytes() const {
    return data_.size() + steps_.size() * sizeof(int64_t) + rows_.size() * sizeof(int32_t);
  }

 private:
  Slices() = default;
  LargeBlock data_;
  std::vector<int64_t> steps_;
  std::vector<int32_t> rows_;
  format::RowsView view_;  // into the members above, whose heap blocks stay where they are
};

/// Calls entry(column, value) for what a lane holds: its row's non-zeros, ascending, and the zeros
/// that lie between those far from each other.
template <class Entry>
void for_each_entry(const format::RowsView& rows, int64_t slice, int64_t lane, Entry&& entry) {
  const int64_t stride = step_bytes(rows.dtype);
  const uint8_t* step = rows.slices + rows.slice_steps[slice] * stride;
  const uint8_t* const end = rows.slices + rows.slice_steps[slice + 1] * stride;
  int64_t column = 0;
  for (const uint8_t* at = step; at < end; at += stride) {
    if (at[lane] == 0 && at != step) continue;  // the lane has ended
    column += at[lane];
    entry(column, format::read_float(at + kLanes, rows.dtype, lane));
  }
}

/// Writes the rows of a slice densely where they belong: out [rows, columns] in `dtype`, dropped
/// weights as 0; every value is rounded once if `dtype` doesn't hold it.
void expand_slice(const format::RowsView& rows, int64_t slice, DType dtype, void* out);

}  // namespace lacuna::kernels::linear_csr
