// Lines and numbers of text files.
#pragma once

#include <charconv>
#include <cstdint>
#include <optional>
#include <string_view>

#include "lacuna/core/status.h"

namespace lacuna::io {

/// Calls `use(number, line)` for each line that is not empty, until one fails. Numbers start at 1;
/// a line comes without its end (\n or \r\n).
template <class Use>
Status for_each_line(std::string_view text, const Use& use) {
  for (size_t number = 1; !text.empty(); ++number) {
    const size_t newline = text.find('\n');
    std::string_view line = text.substr(0, newline);
    text = newline == std::string_view::npos ? std::string_view() : text.substr(newline + 1);
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (!line.empty()) LACUNA_CHECK(use(number, line));
  }
  return {};
}

/// The number that the whole text is, in decimal digits.
inline std::optional<int64_t> from_decimal(std::string_view text) {
  int64_t number = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, number);
  if (error != std::errc() || stop != end) return std::nullopt;
  return number;
}

}  // namespace lacuna::io
