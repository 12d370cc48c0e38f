// SentencePiece models of a few pieces, written field by field: no file of others is needed.
#include "lacuna/io/tokenizer/sentencepiece.h"

#include <cstring>

#include "io/tokenizer/samples.h"

namespace lacuna::io::tokenizer {
namespace {

enum PieceType : char { kNormal = 1, kUnknown = 2, kControl = 3, kUserDefined = 4 };

/// A field of a protobuf message that holds bytes.
std::string field(int number, const std::string& bytes) {
  return std::string{static_cast<char>(number << 3 | 2), static_cast<char>(bytes.size())} + bytes;
}

std::string piece(const std::string& text, float score, PieceType type) {
  char bits[4];
  std::memcpy(bits, &score, 4);
  return field(1,
               field(1, text) + '\x15' + std::string(bits, 4) + '\x18' + static_cast<char>(type));
}

/// Ids: <unk> 0, <s> 1, </s> 2, U+2581 3, a 4, U+2581 a 5, b 6, <t> 7.
std::string model(bool add_dummy_prefix) {
  const std::string bpe = "\x18\x02", keep_spaces = std::string("\x20") + '\0';
  return piece("<unk>", 0, kUnknown) + piece("<s>", 0, kControl) + piece("</s>", 0, kControl) +
         piece("\xE2\x96\x81", -3, kNormal) + piece("a", -2, kNormal) +
         piece(
             "\xE2\x96\x81"
             "a",
             -1, kNormal) +
         piece("b", -4, kNormal) + piece("<t>", 0, kUserDefined) + field(2, bpe) +
         field(3, field(1, "identity") + '\x18' + (add_dummy_prefix ? '\1' : '\0') + keep_spaces);
}

using Ids = std::vector<int32_t>;

TEST(SentencePiece, PutsASpaceBeforeTheTextAndTakesItOffAgain) {
  const auto tokenizer = parse_sentencepiece(model(true), {}, "test").value();
  EXPECT_EQ(tokenizer->encode("a b", true), (Ids{1, 5, 3, 6}));
  EXPECT_EQ(tokenizer->decode({1, 5, 3, 6}, true), "a b");
  EXPECT_EQ(tokenizer->decode({3, 5}, true), " a");
}

TEST(SentencePiece, KeepsTheFirstSpaceOfAModelThatPutsNone) {
  const auto tokenizer = parse_sentencepiece(model(false), {}, "test").value();
  EXPECT_EQ(tokenizer->encode("a b", true), (Ids{1, 4, 3, 6}));
  EXPECT_EQ(tokenizer->encode(" a", false), (Ids{5}));
  EXPECT_EQ(tokenizer->decode({5}, true), " a");
}

TEST(SentencePiece, KnowsItsControlPiecesInTheText) {
  const auto tokenizer = parse_sentencepiece(model(false), {}, "test").value();
  EXPECT_EQ(tokenizer->encode("a</s>b<t>", false), (Ids{4, 2, 6, 7}));
  EXPECT_EQ(tokenizer->decode({1, 4, 2, 0, 7}, true), "a<t>");
  EXPECT_EQ(tokenizer->decode({1, 4, 2, 0, 7}, false), "<s>a</s><unk><t>");
  EXPECT_EQ(tokenizer->bos(), 1);
  EXPECT_EQ(tokenizer->eos(), 2);
  EXPECT_EQ(tokenizer->vocab_size(), 8);
}

TEST(SentencePiece, RefusesAPieceThatIsNoText) {
  std::string bytes = model(false);
  bytes.replace(bytes.find("<unk>"), 5, "<un\x87>");
  EXPECT_THAT(
      message_of(parse_sentencepiece(bytes, {}, "dir/tokenizer.model")),
      ::testing::AllOf(::testing::HasSubstr("dir/tokenizer.model"), ::testing::HasSubstr("id 0"),
                       ::testing::HasSubstr("<un\xEF\xBF\xBD>")));
}

TEST(SentencePiece, FollowsTheConfig) {
  const auto config = TokenizerConfig::parse(
      R"({"add_bos_token": false, "add_eos_token": true, "eos_token": "<t>",
          "added_tokens_decoder": {"8": {"content": "[x]", "special": true}}})",
      "tokenizer_config.json");
  const auto tokenizer = parse_sentencepiece(model(false), config.value(), "test").value();
  EXPECT_EQ(tokenizer->encode("a[x]", true), (Ids{4, 8, 7}));
  EXPECT_EQ(tokenizer->eos(), 7);
  EXPECT_EQ(tokenizer->vocab_size(), 9);
}

}  // namespace
}  // namespace lacuna::io::tokenizer
