// Regular expressions as tokenizer files write them (Oniguruma's dialect), on PCRE2 with its JIT.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::io::tokenizer {

/// Bytes [begin, end) of a text.
struct Span {
  size_t begin = 0, end = 0;
  size_t size() const { return end - begin; }
};

/// A compiled pattern; thread-safe.
class Pattern {
 public:
  /// @errors kBadInput: doesn't compile; uses an escape whose meaning differs between the dialects
  /// (named)
  static Result<Pattern> regex(std::string_view text, const std::string& file);
  /// Matches exactly this text.
  static Pattern literal(std::string text);
  /// All matches, leftmost first, not overlapping, empty ones included (never right behind another
  /// match). If matching hits PCRE2's resource limits (a pattern that backtracks without end), what
  /// follows counts as not matched.
  /// @limits text is valid UTF-8
  std::vector<Span> find_all(std::string_view text) const;
  std::string replace_all(std::string_view text, std::string_view with) const;

 private:
  std::string literal_;
  std::shared_ptr<const void> code_;  // pcre2_code; null for a literal
};

}  // namespace lacuna::io::tokenizer
