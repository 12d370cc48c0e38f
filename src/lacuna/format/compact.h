// A sparse matrix in the portable layout, the same on disk and in memory (docs/formats.md draws
// every byte).
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"
#include "lacuna/format/quantization.h"

namespace lacuna::format {

/// Rows that share one entry of CompactMatrix::offsets.
inline constexpr int64_t kRowGroup = 64;

/// W [rows, columns] without its zeros. The pattern decides which members are used:
///
///   unstructured  bitmap u8 [rows, ceil(columns/8)]: bit 0 = first column, 1 = kept
///                 values [kept], row-major
///                 offsets i64 [ceil(rows/64)+1]: kept values before each group of 64 rows
///   keep:of       bitmap as above, exactly `keep` bits a full group
///                 values [rows, ceil(columns/of)*keep]
///   block RxC     values [blocks, R, C], edge blocks padded with +0
///                 block_columns i32 [blocks]: block column, ascending in a block row
///                 block_offsets i64 [ceil(rows/R)+1]: blocks before each block row
///
/// keep:of details: a group with fewer non-zeros keeps its lowest-index zeros too. The last group
/// of a row may be short (r < of columns): it keeps min(keep, r) bits, and its unused value slots
/// hold +0. Bits past the last column are 0. -0.0 is a zero everywhere. Values are f32, bf16 or
/// f16.
///
/// With a quantization (format version 2) `values` holds codes instead, in the same order, and a
/// dense matrix (pattern dense, [rows, columns] codes, no bitmap) is one of these too:
///
///   int8, fp8  one byte a code, exactly where the value would lie
///   int4       two codes a byte (kCodeChunk); a keep:of row takes values_row_bytes(), zeros behind
///              its codes; a row of a block begins on a byte
///   offsets    count bytes of values instead of values (the same for one-byte codes)
///
/// Slots that stand for no weight hold 0, whatever their code means.
struct CompactMatrix {
  Pattern pattern;
  int64_t rows = 0, columns = 0;
  DType values_dtype = DType::kBF16;  ///< of a weight; of the stored values unless quantised
  Quantization quantization;
  Bytes scales;       ///< bf16 [rows, quantization.groups(columns)]
  Bytes zero_points;  ///< i8, the same shape, or empty
  Bytes bitmap, values, offsets, block_columns, block_offsets;

  int64_t bitmap_stride_bytes() const { return (columns + 7) / 8; }
  /// Kept values of one row of a keep:of matrix.
  int64_t values_per_row() const {
    return pattern.of ? (columns + pattern.of - 1) / pattern.of * pattern.keep : 0;
  }
  /// Bytes of values that one row takes: of a keep:of matrix or a quantised dense one, whose rows
  /// take equally many; of one row of a block.
  int64_t values_row_bytes() const;
  /// Bytes of everything above.
  size_t size_bytes() const {
    return bitmap.size() + values.size() + offsets.size() + block_columns.size() +
           block_offsets.size() + scales.size() + zero_points.size();
  }
};

/// Compacts a dense matrix [rows, columns] of f32, bf16 or f16; zeros are dropped, everything else
/// is kept bit by bit.
/// @errors kBadInput: not a matrix or not one of those types; a weight that breaks the pattern (row
/// and column named)
/// @determinism the same bits for any executor
Result<CompactMatrix> compress(const Tensor& dense, const Pattern& pattern,
                               const Executor& executor = Executor::serial());

/// Writes rows [first, last) densely: out [last-first, columns] in the dtype of the values; dropped
/// weights become +0. A quantised weight is the float32 product of its scale and code, rounded once
/// to values_dtype.
void expand_rows(const CompactMatrix& matrix, int64_t first, int64_t last, void* out);
/// Kept values before a row of an unstructured matrix, 0 <= row <= rows.
/// @cost at most 63 rows of the bitmap; with 4-bit codes, whose offsets count bytes, all before
int64_t kept_before_row(const CompactMatrix& matrix, int64_t row);
/// The whole matrix, dense.
Tensor expand(const CompactMatrix& matrix, const Executor& executor = Executor::serial());

/// Where a matrix breaks its own rules.
struct Violation {
  int64_t row = -1, column = -1;  ///< -1: not a matter of one element
  std::string what;
};

/// Checks sizes, indices, counts and the pattern itself, without expanding. Empty when sound; stops
/// after `limit`. Everything else in this header and in kernels/ may assume a matrix that passed.
std::vector<Violation> validate(const CompactMatrix& matrix, size_t limit = 8,
                                const Executor& executor = Executor::serial());
/// Checks a dense matrix against a pattern: at most `keep` non-zeros a group, or whole zero blocks.
/// (Any matrix is unstructured or dense.)
std::vector<Violation> check_pattern(const Tensor& dense, const Pattern& pattern, size_t limit = 8);

/// Elements equal to zero (either sign), dropped ones included.
int64_t count_zeros(const CompactMatrix& matrix);
int64_t count_zeros(const Tensor& dense);
/// Weights that the mask keeps, whatever their value.
int64_t count_kept(const CompactMatrix& matrix);

/// Tests that a dense matrix follows keep:of for some small pattern (2:4, 4:8, 1:4, ...), to label
/// foreign files: the strictest that holds, or unstructured when it has zeros, else dense.
Pattern detect_pattern(const Tensor& dense);

}  // namespace lacuna::format
