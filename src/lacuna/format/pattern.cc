#include "lacuna/format/pattern.h"

#include <charconv>

namespace lacuna::format {
namespace {

/// A positive integer that is the whole of `text`.
std::optional<int> positive(std::string_view text) {
  int value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value <= 0) return std::nullopt;
  return value;
}

constexpr int kLargestGroup = 64;

}  // namespace

Result<Pattern> Pattern::parse(std::string_view text) {
  if (text == "dense") return Pattern{};
  if (text == "unstructured") return unstructured();
  const size_t colon = text.find(':');
  if (colon != std::string_view::npos) {
    const std::string_view left = text.substr(0, colon), right = text.substr(colon + 1);
    if (left == "block") {
      const size_t x = right.find('x');
      const auto rows = positive(right.substr(0, x));
      const auto columns =
          x == std::string_view::npos ? std::nullopt : positive(right.substr(x + 1));
      if (rows && columns && *rows <= 4096 && *columns <= 4096) return block(*rows, *columns);
    } else if (const auto keep = positive(left), of = positive(right); keep && of) {
      if (*keep >= *of || *of > kLargestGroup)
        return usage_error("pattern {} keeps {} of {} (need 0 < keep < of <= {}).", text, *keep,
                           *of, kLargestGroup);
      return keep_of(*keep, *of);
    }
  }
  return usage_error(
      "unknown pattern (got \"{}\"; need dense, unstructured, KEEP:OF or block:RxC).", text);
}

std::string Pattern::text() const {
  switch (kind) {
    case PatternKind::kDense:
      return "dense";
    case PatternKind::kUnstructured:
      return "unstructured";
    case PatternKind::kKeepOf:
      return fmt::format("{}:{}", keep, of);
    case PatternKind::kBlock:
      return fmt::format("block:{}x{}", block_rows, block_columns);
  }
  return "";
}

}  // namespace lacuna::format
