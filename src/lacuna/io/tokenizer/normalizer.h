// What happens to text before it is split: Unicode normal forms, replacements, a prefix.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "lacuna/io/tokenizer/pattern.h"

namespace lacuna::io::tokenizer {

enum class UnicodeForm { kNfc, kNfd, kNfkc, kNfkd };

struct Prepend {
  std::string text;  ///< put before text that is not empty
};

struct Replace {
  Pattern pattern;
  std::string content;
};

using Normalizer = std::variant<UnicodeForm, Prepend, Replace>;

/// Applies the steps in order. @limits text is valid UTF-8
std::string normalize(const std::vector<Normalizer>& steps, std::string_view text);

}  // namespace lacuna::io::tokenizer
