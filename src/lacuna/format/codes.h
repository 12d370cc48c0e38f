// Where the codes of a quantised matrix lie, row by row, and what they stand for: what quantize(),
// expand_rows() and validate() are made of, whatever the pattern.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>
#include <vector>

#include "lacuna/format/compact.h"
#include "lacuna/format/element.h"

namespace lacuna::format {

/// Bytes that `count` codes take when they begin on a byte.
inline int64_t code_bytes(Code code, int64_t count) {
  return code == Code::kInt4 ? (count + 1) / 2 : count;
}
/// The element type of the tensor that carries codes.
DType stored_dtype(Code code);

/// Bytes that the codes of a row take, given its bitmap and nothing behind them.
int64_t row_code_bytes(Code code, const uint8_t* bitmap, int64_t columns);

/// Codes that begin on a byte: those of the kept ones among the columns from `first_column` on.
/// `bytes` covers also what pads them.
struct CodeRun {
  int64_t first_column = 0, first_byte = 0, bytes = 0, codes = 0;
};

/// Goes through the rows of a quantised matrix: which columns a row keeps, and where their codes
/// lie in `values`. Needs sound sizes, offsets and block indices; never reads the codes.
class RowWalk {
 public:
  RowWalk(const CompactMatrix& matrix, int64_t first_row);
  void next();
  int64_t row() const { return row_; }
  /// One bit a column, as in CompactMatrix::bitmap. Made up for dense matrices and, when asked for,
  /// for blocks: a few bytes of them may stand for any number of columns.
  const uint8_t* bitmap() const;
  /// In column order.
  std::span<const CodeRun> runs() const;
  /// Where the row begins and how many bytes it takes, what pads it included; of blocks, whose rows
  /// lie apart, nothing.
  int64_t first_byte() const { return first_byte_; }
  int64_t bytes() const { return bytes_; }
  /// Codes of all runs.
  int64_t codes() const;

 private:
  void enter();
  void divide() const;
  void enter_row_of_blocks();

  const CompactMatrix& matrix_;
  int64_t row_ = 0, row_bytes_ = 0, next_byte_ = 0;
  int64_t first_byte_ = 0, bytes_ = 0;  // of the row
  mutable int64_t codes_ = 0;           // of the row once they were asked for, else -1
  mutable std::vector<CodeRun> runs_;   // likewise, else empty
  mutable std::vector<uint8_t> made_up_;
  mutable const uint8_t* bitmap_ = nullptr;  // of the row, once it is there
};

/// Whether what pads the codes of the walk's row is 0: half bytes, and what lies behind them.
bool padding_is_zero(const CompactMatrix& matrix, const RowWalk& walk);
/// The codes of the walk's row, a byte each, in column order; `out` has room for walk.codes().
void read_codes(const CompactMatrix& matrix, const RowWalk& walk, uint8_t* out);
/// The reverse, into zeroed values.
void write_codes(Code code, const RowWalk& walk, const uint8_t* codes, uint8_t* values);

/// What the codes of one group of a row stand for.
struct CodeScale {
  Code code = Code::kNone;
  float scale = 0;
  int zero = 0;  ///< int4: the code of 0

  float value(uint8_t code_bits) const;
  /// The code whose value is nearest to a finite weight (ties to the even multiple of the scale);
  /// the code of 0 when the scale is 0.
  uint8_t nearest(double weight) const;
};

/// The code of 0 in a group without a zero point of its own.
inline constexpr int kInt4Zero = 8;
CodeScale scale_of(const CompactMatrix& matrix, int64_t row, int64_t group);

/// Calls f(group, begin, end) for the codes [begin, end) of a row that share a scale.
template <class F>
void for_each_scale_group(const Quantization& quantization, const RowWalk& walk, int64_t columns,
                          F&& f) {
  if (quantization.group == 0) return f(int64_t{0}, int64_t{0}, walk.codes());
  const uint8_t* bitmap = walk.bitmap();
  const int64_t stride = ceil_div(columns, 8);
  const int64_t step = quantization.group / 8;  // groups end on bytes of the bitmap
  int64_t begin = 0;
  for (int64_t group = 0; group < quantization.groups(columns); ++group) {
    const int64_t byte = group * step;
    const int64_t end = begin + count_bits(bitmap + byte, std::min(step, stride - byte));
    f(group, begin, end);
    begin = end;
  }
}

}  // namespace lacuna::format
