// Classes of characters, at the ends of a text.
#pragma once

#include <cstdint>
#include <string_view>

namespace lacuna::io::tokenizer {

/// Unicode's property White_Space.
bool is_space(uint32_t code_point);
/// A letter, mark, decimal digit, connector or joiner (\w of Unicode's regular expressions).
bool is_word(uint32_t code_point);

// @limits texts are valid UTF-8
bool starts_with_word(std::string_view text);
bool ends_with_word(std::string_view text);
size_t leading_space_bytes(std::string_view text);
size_t trailing_space_bytes(std::string_view text);

}  // namespace lacuna::io::tokenizer
