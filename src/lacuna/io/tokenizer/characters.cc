#include "lacuna/io/tokenizer/characters.h"

#include <utf8proc.h>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

uint32_t first_code_point(std::string_view text) { return utf8_step(text, 0).code_point; }

size_t last_character_at(std::string_view text) {
  size_t at = text.size() - 1;
  while (at > 0 && (text[at] & 0xC0) == 0x80) --at;
  return at;
}

}  // namespace

bool is_space(uint32_t c) {
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_word(uint32_t c) {  // Alphabetic, Mark, Decimal_Number, Connector_Punctuation, Join_Control
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    case UTF8PROC_CATEGORY_SO:  // letters in circles and squares
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
             (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
    default:
      return c == 0x200C || c == 0x200D;
  }
}

bool ends_with_word(std::string_view text) {
  return !text.empty() && is_word(utf8_step(text, last_character_at(text)).code_point);
}

bool starts_with_word(std::string_view text) {
  return !text.empty() && is_word(first_code_point(text));
}

size_t leading_space_bytes(std::string_view text) {
  size_t at = 0;
  while (at < text.size() && is_space(first_code_point(text.substr(at))))
    at += utf8_length(text[at]);
  return at;
}

size_t trailing_space_bytes(std::string_view text) {
  const size_t size = text.size();
  while (!text.empty()) {
    const size_t at = last_character_at(text);
    if (!is_space(utf8_step(text, at).code_point)) break;
    text = text.substr(0, at);
  }
  return size - text.size();
}

}  // namespace lacuna::io::tokenizer
