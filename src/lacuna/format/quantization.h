// How kept weights are stored as codes of 8 or 4 bits with scales: the vocabulary.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

#include "lacuna/core/status.h"

namespace lacuna::format {

enum class Code : uint8_t { kNone, kInt8, kInt4, kFP8 };

/// What a kept weight is, from its code q, and the scale s (bf16) and zero point z (int8) of its
/// group: `group` neighbouring dense columns of one row, or the whole row.
///
///   int8   s * q            q in -127..127
///   int4   s * (q - z)      q in 0..15; z is 8 without zero points, 0..15 with
///   fp8    s * q            q an e4m3 (finite)
///
/// A dropped weight is 0 whatever the codes say; a kept weight may be 0.
struct Quantization {
  Code code = Code::kNone;
  int64_t group = 0;         ///< columns that share a scale; 0: the whole row
  bool zero_points = false;  ///< int4 alone

  bool none() const { return code == Code::kNone; }
  /// Reads "none", "int8", "int4g64z", "int4row": a code, "gGROUP" (32, 64, 128) or "row", "z" for
  /// zero points. Plain "int4" is int4g64, "int8" and "fp8" have a scale a row. @errors kUsage
  static Result<Quantization> parse(std::string_view text);
  /// The text that parse() reads.
  std::string text() const;
  /// Scales of a row.
  int64_t groups(int64_t columns) const { return group == 0 ? 1 : (columns + group - 1) / group; }
  bool operator==(const Quantization&) const = default;
};

/// Two 4-bit codes share a byte, the first in the low half. The codes of each `kCodeChunk` columns
/// of a row begin on a byte, so that a kernel finds them by counting bits; an odd count leaves the
/// high half of its last byte 0.
inline constexpr int64_t kCodeChunk = 64;

}  // namespace lacuna::format
