// What every tokenizer promises of every text: it comes back, streams whole characters, and takes
// no age.
#include <ctime>

#include "io/tokenizer/samples.h"

namespace lacuna::io {
namespace {

class RoundTrip : public EveryKind {};

TEST_P(RoundTrip, TenThousandRandomTexts) {
  std::mt19937_64 random(7);
  const int count = sanitized() ? 1000 : 10000;
  for (int i = 0; i < count; ++i) {
    const std::string text = random_text(random, 30);
    const auto ids = tokenizer()->encode(text, false);
    ASSERT_EQ(tokenizer()->decode(ids, false), GetParam().normalized(text))
        << i << ::testing::PrintToString(text);
    expect_streams(tokenizer(), ids, false);
  }
}

TEST_P(RoundTrip, RandomIdsStreamWholeCharacters) {
  std::mt19937_64 random(8);
  // Tokens of single bytes, which the random ids of a large vocabulary would seldom hit.
  std::vector<int32_t> bytes;
  for (const char* text : {"\xF0\x9F\x98\x80", "\xC3\xA9", "\xE1\xA0\x8E", "\xF3\xA0\x81\x81"})
    for (const int32_t id : tokenizer()->encode(text, true)) bytes.push_back(id);
  for (int i = 0; i < 2000; ++i) {
    std::vector<int32_t> ids(random() % 20);
    for (int32_t& id : ids)
      id = static_cast<int32_t>(random() % 2 == 0
                                    ? bytes[random() % bytes.size()]
                                    : random() % static_cast<uint64_t>(tokenizer()->vocab_size()));
    expect_streams(tokenizer(), ids, i % 2 == 0);
  }
}

TEST_P(RoundTrip, TakesIllFormedTextAsReplacementCharacters) {
  for (const auto& repair : golden().at("repairs")) {
    std::string raw;
    const auto hex = repair.at("hex").get<std::string>();
    for (size_t i = 0; i < hex.size(); i += 2)
      raw += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    const auto text = repair.at("text").get<std::string>();
    EXPECT_EQ(tokenizer()->encode(raw, true), tokenizer()->encode(text, true)) << hex;
  }
}

TEST_P(RoundTrip, AnEmptyTextHasNoTokens) {
  EXPECT_TRUE(tokenizer()->encode("", false).empty());
  EXPECT_EQ(tokenizer()->decode({}, false), "");
  EXPECT_EQ(tokenizer()->decode({-1, 1 << 30}, false), "") << "ids that are no tokens";
}

// Eight times the text may take a little more than eight times as long (a megabyte leaves the
// caches), never the square. Processor time, so that neither a slow machine nor a busy one decides.
TEST_P(RoundTrip, AMegabyteOnOneLineTakesTimeInProportion) {
  constexpr size_t kSize = 1 << 20, kParts = 8;
  std::mt19937_64 random(9);
  std::string letters(kSize, ' ');
  for (char& c : letters) c = static_cast<char>('a' + random() % 26);
  const std::string texts[] = {letters, std::string(kSize, 'a'), std::string(kSize, ' '),
                               std::string(kSize, '\n')};
  const auto seconds_of = [&](const std::string& text) {
    const std::clock_t start = std::clock();
    const auto ids = tokenizer()->encode(text, false);
    const double seconds = static_cast<double>(std::clock() - start) / CLOCKS_PER_SEC;
    EXPECT_TRUE(tokenizer()->decode(ids, false) == GetParam().normalized(text))
        << text.substr(0, 8);
    return seconds;
  };
  for (const std::string& text : texts) {
    const double part = seconds_of(text.substr(0, kSize / kParts)), whole = seconds_of(text);
    RecordProperty("seconds_" + std::to_string(int{text[0]}) + (text == letters ? "_mixed" : ""),
                   std::to_string(whole) + " of " + std::to_string(part));
    if (!sanitized()) {
      EXPECT_LT(whole, 3 * kParts * part + 0.1) << text.substr(0, 8);
    }
  }
}

LACUNA_EVERY_KIND(RoundTrip);

TEST(ToValidUtf8, ReplacesWhatPythonReplaces) {
  ASSERT_EQ(golden().at("repairs").size(), 70u);
  for (const auto& repair : golden().at("repairs")) {
    std::string raw;
    const auto hex = repair.at("hex").get<std::string>();
    for (size_t i = 0; i < hex.size(); i += 2)
      raw += static_cast<char>(std::stoi(hex.substr(i, 2), nullptr, 16));
    EXPECT_EQ(tokenizer::to_valid_utf8(raw), repair.at("text")) << hex;
    EXPECT_EQ(tokenizer::is_valid_utf8(raw), raw == repair.at("text")) << hex;
  }
}

}  // namespace
}  // namespace lacuna::io
