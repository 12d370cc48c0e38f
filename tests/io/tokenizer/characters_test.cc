#include "lacuna/io/tokenizer/characters.h"

#include "io/tokenizer/samples.h"
#include "lacuna/io/tokenizer/pattern.h"

namespace lacuna::io::tokenizer {
namespace {

/// Every character that PCRE2's tables know, which come from the same standard by another way.
void expect_class(const char* regex, bool (*holds)(uint32_t)) {
  const Pattern pattern = Pattern::regex(regex, "test").value();
  const Pattern unassigned = Pattern::regex("\\p{Cn}", "test").value();
  for (uint32_t c = 0; c < 0x110000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    std::string text;
    append_utf8(c, text);
    if (!unassigned.find_all(text).empty()) continue;
    ASSERT_EQ(holds(c), !pattern.find_all(text).empty()) << std::hex << c;
  }
}

TEST(Characters, SpacesAreThePropertyWhiteSpace) { expect_class("\\p{White_Space}", is_space); }

TEST(Characters, WordCharactersAreThoseOfUnicodesRegularExpressions) {
  expect_class("[\\p{Alphabetic}\\p{M}\\p{Nd}\\p{Pc}\\p{Join_Control}]", is_word);
}

TEST(Characters, StandAtTheEnds) {
  EXPECT_TRUE(starts_with_word("\xC3\xA9 "));
  EXPECT_FALSE(starts_with_word(" \xC3\xA9"));
  EXPECT_TRUE(ends_with_word(" \xC3\xA9"));
  EXPECT_FALSE(ends_with_word("\xC3\xA9."));
  EXPECT_FALSE(starts_with_word("") || ends_with_word(""));
  EXPECT_EQ(leading_space_bytes("\xE3\x80\x80\n a "), 5u);
  EXPECT_EQ(trailing_space_bytes(" a \xC2\xA0"), 3u);
  EXPECT_EQ(leading_space_bytes(" \n"), 2u);
  EXPECT_EQ(trailing_space_bytes("\xE3\x80\x80 "), 4u);
  EXPECT_EQ(leading_space_bytes("") + trailing_space_bytes(""), 0u);
}

}  // namespace
}  // namespace lacuna::io::tokenizer
