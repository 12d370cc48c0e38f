// A weight of bf16 or f16 values as one run of bytes a thread reads from front to back.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/rows.h"

namespace lacuna::kernels::linear_stream {

/// The packed form: tiles of 16 rows one behind the other, each a run of chunks as
/// kernels/stream.h draws them. What lies past the last row or column is dropped.
/// @cost the bytes of the compact matrix, 8 a tile, and where K is no multiple of 64 the masks of a
/// whole chunk
class ValueStream {
 public:
  /// @param parts  one or more that validate() accepts, of one pattern, number of columns and type
  ///   of values: their rows, one below the other, are the matrix. All but the last have a multiple
  ///   of 16 rows
  /// @errors kUsage: a pattern without a bitmap; other values than bf16 and f16; quantised values;
  ///   parts that don't fit together
  static Result<ValueStream> pack(const std::vector<format::CompactMatrix>& parts,
                                  const Executor& executor = Executor::serial());
  static Result<ValueStream> pack(const format::CompactMatrix& matrix,
                                  const Executor& executor = Executor::serial()) {
    return pack(std::vector{matrix}, executor);
  }
  ValueStream(ValueStream&&) = default;  // a copy's view would point into the original
  ValueStream& operator=(ValueStream&&) = default;
  const format::RowsView& view() const { return view_; }
  /// All that stays in memory.
  size_t size_bytes() const { return data_.size() + offsets_.size() * sizeof(int64_t); }

 private:
  ValueStream() = default;
  LargeBlock data_;
  std::vector<int64_t> offsets_;
  format::RowsView view_;  // into the members above, whose heap blocks stay where they are
};

/// Writes the rows of a tile densely where they belong: out [rows, columns] in `dtype`, dropped
/// weights as 0; every value is rounded once if `dtype` doesn't hold it.
void expand_tile(const format::RowsView& rows, int64_t tile, DType dtype, void* out);

}  // namespace lacuna::kernels::linear_stream
