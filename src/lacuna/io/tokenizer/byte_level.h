// The byte-to-character map of GPT-2: every byte has a printable code point, so that vocabularies
// hold text only. Bytes 33-126, 161-172 and 174-255 stand for themselves; the other 68, in order,
// for U+0100 and up.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace lacuna::io::tokenizer {

/// Appends the mapped form of `bytes`.
void append_byte_level(std::string_view bytes, std::string& out);
/// The bytes of mapped text, or nothing when it holds a character that stands for no byte.
std::optional<std::string> from_byte_level(std::string_view mapped);

}  // namespace lacuna::io::tokenizer
