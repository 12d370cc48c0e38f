#include "lacuna/io/tokenizer/pre_tokenizer.h"

#include "io/tokenizer/samples.h"

namespace lacuna::io::tokenizer {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;

std::vector<std::string> pieces(const std::vector<PreTokenizer>& steps, const std::string& text) {
  const Pieces cut = pre_tokenize(steps, text);
  std::vector<std::string> texts;
  for (size_t i = 0; i < cut.spans.size(); ++i) texts.emplace_back(cut.piece(i));
  return texts;
}

// The pieces are those of PyPI's tokenizers 0.22.1.
TEST(Split, BehavesAsHuggingFaces) {
  using B = SplitBehavior;
  using Texts = std::vector<std::string>;
  const struct {
    SplitBehavior behavior;
    bool invert;
    Texts expected;
  } cases[] = {{B::kRemoved, false, {"ab", "c"}},
               {B::kIsolated, false, {"1", "2", "ab", "3", "c"}},
               {B::kMergedWithPrevious, false, {"1", "2", "ab3", "c"}},
               {B::kMergedWithNext, false, {"1", "2ab", "3c"}},
               {B::kContiguous, false, {"12", "ab", "3", "c"}},
               {B::kRemoved, true, {"1", "2", "3"}},
               {B::kIsolated, true, {"1", "2", "ab", "3", "c"}},
               {B::kMergedWithPrevious, true, {"1", "2ab", "3c"}},
               {B::kMergedWithNext, true, {"1", "2", "ab3", "c"}},
               {B::kContiguous, true, {"12", "ab", "3", "c"}}};
  const Pattern digit = Pattern::regex("\\d", "test").value();
  for (const auto& [behavior, invert, expected] : cases)
    EXPECT_THAT(pieces({Split{digit, behavior, invert}}, "12ab3c"), ElementsAreArray(expected))
        << static_cast<int>(behavior) << invert;
}

TEST(Split, CutsThePiecesOfTheStepBefore) {
  const Pattern space = Pattern::literal(" "), a = Pattern::literal("a");
  EXPECT_THAT(pieces({Split{space, SplitBehavior::kMergedWithNext}, Split{a}}, "ba a ca"),
              ElementsAre("b", "a", " ", "a", " c", "a"));
}

TEST(PrefixSpace, ComesBeforeEveryPieceThatHasNone) {
  EXPECT_THAT(pieces({Split{Pattern::literal("-")}, PrefixSpace{}}, "a- b"),
              ElementsAre(" a", " -", " b"));
  EXPECT_THAT(pieces({PrefixSpace{}}, ""), ElementsAre());
}

TEST(ByteLevelMap, GivesEveryByteAPrintableCharacter) {
  EXPECT_THAT(pieces({Split{Pattern::literal("\n")}, ByteLevelMap{}}, "a b\n\xC3\xA9"),
              ElementsAre("a\xC4\xA0"
                          "b",
                          "\xC4\x8A", "\xC3\x83\xC2\xA9"));
}

}  // namespace
}  // namespace lacuna::io::tokenizer
