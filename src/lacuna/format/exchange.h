// The sparse layouts that other programs read: csr, coo and bsr (docs/formats.md draws them).
// Nothing multiplies by them here: a file in one of them becomes a CompactMatrix when it is read.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/status.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/pattern.h"

namespace lacuna::format {

enum class ExchangeKind : uint8_t { kNone, kCsr, kCoo, kBsr };

/// Which of them, and the blocks of bsr.
struct ExchangeForm {
  ExchangeKind kind = ExchangeKind::kNone;
  int block_rows = 0, block_columns = 0;  ///< kBsr

  static ExchangeForm bsr(const Pattern& block) {
    return {ExchangeKind::kBsr, block.block_rows, block.block_columns};
  }
  bool none() const { return kind == ExchangeKind::kNone; }
  /// Values with indices (IndexedMatrix), that is csr or coo.
  bool indexed() const { return kind == ExchangeKind::kCsr || kind == ExchangeKind::kCoo; }
  /// The pattern of the matrices that lie in this form: block:RxC for bsr, unstructured for csr and
  /// coo. A weight of another pattern is stored as if it had this one.
  Pattern pattern() const {
    return kind == ExchangeKind::kBsr ? Pattern::block(block_rows, block_columns)
                                      : Pattern::unstructured();
  }
  /// Reads "csr", "coo" or "bsr:32x32". @errors kUsage
  static Result<ExchangeForm> parse(std::string_view text);
  /// The text that parse() reads; "none" for none.
  std::string text() const;
  bool operator==(const ExchangeForm&) const = default;
};

/// W [rows, columns] as its kept values, row by row, and where they lie. The kind decides which
/// members are used:
///
///   csr   row_offsets i64 [rows+1]: kept values before each row, and their number
///   coo   row_indices i32 [kept]
///   both  column_indices i32 [kept], ascending in a row, none twice
///         values [kept]
///
/// A zero that lies among the values is kept like any other, as in an unstructured CompactMatrix.
struct IndexedMatrix {
  ExchangeKind kind = ExchangeKind::kCsr;
  int64_t rows = 0, columns = 0;
  DType values_dtype = DType::kBF16;
  Bytes row_offsets, row_indices, column_indices, values;

  int64_t kept() const { return static_cast<int64_t>(column_indices.size() / sizeof(int32_t)); }
};

/// Checks sizes, offsets and indices. Empty when sound; stops after `limit`.
std::vector<Violation> validate(const IndexedMatrix& matrix, size_t limit = 8);

/// An unstructured matrix in csr or coo: the same mask; the values are shared, not copied.
/// @param matrix  sound, unstructured, without codes
IndexedMatrix to_indexed(const CompactMatrix& matrix, ExchangeKind kind);
/// The reverse. @param matrix  sound
CompactMatrix from_indexed(const IndexedMatrix& matrix);

/// The same weights under another pattern, whose rules then say which zeros are stored; a matrix
/// that has it already is shared.
/// @param matrix  sound, without codes
/// @errors kBadInput: weights that break the pattern (row and column named)
Result<CompactMatrix> with_pattern(const CompactMatrix& matrix, const Pattern& pattern);

}  // namespace lacuna::format
