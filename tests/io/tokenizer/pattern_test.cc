#include "lacuna/io/tokenizer/pattern.h"

#include "io/tokenizer/samples.h"
#include "lacuna/io/tokenizer/pre_tokenizer.h"

namespace lacuna::io::tokenizer {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

std::vector<std::string> matches(const Pattern& pattern, const std::string& text) {
  std::vector<std::string> found;
  for (const Span& span : pattern.find_all(text))
    found.push_back(text.substr(span.begin, span.size()));
  return found;
}
std::vector<std::string> matches(const std::string& regex, const std::string& text) {
  return matches(Pattern::regex(regex, "test").value(), text);
}

// PCRE2's own \s has U+180E, which lost the property White_Space in Unicode 6.3.
TEST(Pattern, SpaceIsThePropertyWhiteSpace) {
  EXPECT_THAT(
      matches("\\s", "a \t\n\x0B\f\r\xC2\x85\xC2\xA0\xE1\xA0\x8E\xE2\x80\x8B\xE3\x80\x80"),
      ElementsAre(" ", "\t", "\n", "\x0B", "\f", "\r", "\xC2\x85", "\xC2\xA0", "\xE3\x80\x80"));
  EXPECT_THAT(matches("\\S+", "a \xE1\xA0\x8E"), ElementsAre("a", "\xE1\xA0\x8E"));
  EXPECT_THAT(matches("[^\\s]+", "a b"), ElementsAre("a", "b"));
}

// U+017F folds to s, U+212A to k.
TEST(Pattern, CaseFoldsAsUnicodeDoes) {
  EXPECT_THAT(matches("(?i:'s|k)", "'S 's '\xC5\xBF K \xE2\x84\xAA"),
              ElementsAre("'S", "'s", "'\xC5\xBF", "K", "\xE2\x84\xAA"));
}

TEST(Pattern, LooksAround) {
  EXPECT_THAT(matches("(?<=a)b", "abb ab"), ElementsAre("b", "b"));
  EXPECT_THAT(matches("\\s+(?!\\S)|\\s+", "a   b  "), ElementsAre("  ", " ", "  "));
}

TEST(Pattern, EmptyMatchesDontFollowAMatch) {
  EXPECT_THAT(matches("b*", "abba"), ElementsAre("", "bb", ""));
  EXPECT_THAT(matches("\\s*", ""), ElementsAre(""));
  EXPECT_THAT(matches(Pattern::literal(""), "ab"), IsEmpty());
  EXPECT_EQ(Pattern::regex("b*", "test")
                .value()
                .replace_all("\xC3\xA9"
                             "bb\xC3\xA9",
                             "-"),
            "-\xC3\xA9-\xC3\xA9-");
}

TEST(Pattern, LiteralsDontOverlap) {
  EXPECT_EQ(Pattern::literal("aa").replace_all("aaaaa.", "b"), "bba.");
  EXPECT_EQ(Pattern::literal("(").replace_all("(x(", ""), "x");
}

TEST(Pattern, EscapesThatDifferBetweenDialectsAreRefused) {
  for (const std::string escape : {"\\w", "\\b", "\\h", "\\R", "\\X", "\\K", "\\G", "\\Q", "\\C"})
    EXPECT_THAT(message_of(Pattern::regex(std::string("a") + escape, "tokenizer.json")),
                ::testing::AllOf(::testing::HasSubstr("tokenizer.json"),
                                 ::testing::HasSubstr("got " + escape)));
}

// \s*[\r\n]+ steps back over all of the spaces, more steps than PCRE2 grants by itself.
TEST(Pattern, SearchesThroughMillionsOfSpaces) {
  const std::string text = std::string("a") + std::string(12 << 20, ' ') + "x y";
  const auto found = Pattern::regex(kQwen2Pattern, "test").value().find_all(text);
  ASSERT_EQ(found.size(), 4u);
  EXPECT_EQ(found[1].size(), size_t{12 << 20} - 1);
  EXPECT_EQ(found[3].end, text.size());
}

// A pattern that backtracks without end gives up in finite time.
TEST(Pattern, GivesUpWithoutHanging) {
  EXPECT_THAT(matches("(a|a)*c", std::string(64, 'a')), IsEmpty());
}

}  // namespace
}  // namespace lacuna::io::tokenizer
