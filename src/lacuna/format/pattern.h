// Which weights may be non-zero: the vocabulary of sparsity patterns.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "lacuna/core/status.h"

namespace lacuna::format {

enum class PatternKind : uint8_t { kDense, kUnstructured, kKeepOf, kBlock };

/// A sparsity pattern. `keep:of` keeps `keep` of every `of` neighbouring weights along K (2:4 keeps
/// two of four, 1:4 keeps one); `block:RxC` keeps or drops whole R x C blocks.
struct Pattern {
  PatternKind kind = PatternKind::kDense;
  int keep = 0, of = 0;                   ///< kKeepOf
  int block_rows = 0, block_columns = 0;  ///< kBlock

  static Pattern unstructured() { return {.kind = PatternKind::kUnstructured}; }
  static Pattern keep_of(int keep, int of) {
    return {.kind = PatternKind::kKeepOf, .keep = keep, .of = of};
  }
  static Pattern block(int rows, int columns) {
    return {.kind = PatternKind::kBlock, .block_rows = rows, .block_columns = columns};
  }
  /// Reads "dense", "unstructured", "2:4" (0 < keep < of <= 64) or "block:32x32". @errors kUsage
  static Result<Pattern> parse(std::string_view text);
  /// The text that parse() reads.
  std::string text() const;
  /// Share of zeros that the pattern alone gives: 1 - keep / of, and 0 where it leaves it open.
  double sparsity() const {
    return kind == PatternKind::kKeepOf ? 1.0 - static_cast<double>(keep) / of : 0.0;
  }
  bool operator==(const Pattern&) const = default;
};

}  // namespace lacuna::format
