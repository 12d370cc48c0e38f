// UTF-8 by the Unicode standard's own rule for ill-formed text (each maximal subpart becomes one
// U+FFFD).
#pragma once

#include <cstdint>
#include <string>
#include <string_view>

namespace lacuna::io::tokenizer {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

/// One step through UTF-8: a code point, or a maximal ill-formed subpart.
struct Utf8Step {
  uint32_t code_point = 0;
  size_t size = 0;  ///< bytes taken, at least 1 when any are left
  enum class Kind {
    kValid,
    kIllFormed,
    kTruncated
  } kind = Kind::kValid;  ///< truncated: the text ended inside
};
/// @limits `at` < text.size()
Utf8Step utf8_step(std::string_view text, size_t at);

/// Length in bytes of the character that starts with `lead` (valid text only).
inline size_t utf8_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}

bool is_valid_utf8(std::string_view text);
/// The text with every ill-formed subpart replaced by U+FFFD, as Python's decode("utf-8",
/// "replace") does.
std::string to_valid_utf8(std::string_view bytes);
/// How many bytes at the end are the beginning of a character that is not complete (0..3).
size_t truncated_tail_bytes(std::string_view bytes);

}  // namespace lacuna::io::tokenizer
