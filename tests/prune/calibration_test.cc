#include "lacuna/prune/calibration.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "lacuna/io/file.h"
#include "lacuna/io/safetensors.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

/// One token a byte.
class ByteTokenizer final : public io::Tokenizer {
 public:
  std::vector<int32_t> encode(std::string_view text, bool) const override {
    std::vector<int32_t> ids;
    for (const char c : text) ids.push_back(static_cast<unsigned char>(c));
    return ids;
  }
  std::string decode(const std::vector<int32_t>& ids, bool) const override {
    return {ids.begin(), ids.end()};
  }
  int64_t vocab_size() const override { return 256; }
  std::optional<int32_t> token_id(std::string_view) const override { return {}; }
  std::optional<int32_t> bos() const override { return {}; }
  std::optional<int32_t> eos() const override { return {}; }
};

fs::path file_with(const std::string& name, const std::string& text) {
  const fs::path path = testing::scratch_folder("calibration") / name;
  EXPECT_TRUE(io::write_text(path, text).ok());
  return path;
}

std::string jsonl(int documents, size_t length) {
  std::string lines;
  for (int i = 0; i < documents; ++i) {
    std::string text;
    for (size_t j = 0; j < length; ++j) text += static_cast<char>('a' + (i + j) % 26);
    lines += "{\"text\": \"" + text + "\"}\n";
  }
  return lines;
}

TEST(CalibrationFromText, TakesOneWindowEachOfDocumentsThatAreLongEnough) {
  const fs::path file = file_with("long.jsonl", jsonl(20, 100));
  const auto calibration = calibration_from_text(file, ByteTokenizer(), 20, 60, 1);
  ASSERT_TRUE(calibration.ok()) << calibration.error().message;
  EXPECT_EQ(calibration->samples(), 20);
  EXPECT_EQ(calibration->length(), 60);
  EXPECT_EQ(calibration->source, "long.jsonl");
  for (const auto& ids : calibration->ids)  // no window crosses a border between documents
    for (size_t i = 1; i < ids.size(); ++i) EXPECT_EQ((ids[i] - ids[i - 1] + 26) % 26, 1);
}

TEST(CalibrationFromText, JoinsDocumentsWhenTooFewAreLongEnough) {
  const fs::path file = file_with("short.jsonl", jsonl(30, 40));
  const auto calibration = calibration_from_text(file, ByteTokenizer(), 8, 500, 1);
  ASSERT_TRUE(calibration.ok()) << calibration.error().message;
  EXPECT_EQ(calibration->samples(), 8);
  EXPECT_EQ(calibration->length(), 500);
}

TEST(CalibrationFromText, IsTheSameForTheSameSeedOnly) {
  const fs::path file = file_with("text.jsonl", jsonl(50, 300));
  const auto draw = [&](uint64_t seed) {
    return calibration_from_text(file, ByteTokenizer(), 10, 128, seed)->ids;
  };
  EXPECT_EQ(draw(3), draw(3));
  EXPECT_NE(draw(3), draw(4));
}

TEST(CalibrationFromText, RefusesATextShorterThanOneWindow) {
  const auto result =
      calibration_from_text(file_with("tiny.txt", "too short"), ByteTokenizer(), 4, 64, 0);
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().code, Code::kBadInput);
  EXPECT_THAT(result.error().message, HasSubstr("got 9 tokens; need 64"));
  EXPECT_FALSE(calibration_from_text(file_with("none.txt", ""), ByteTokenizer(), 4, 64, 0).ok());
}

TEST(CalibrationIds, SurviveWritingAndReading) {
  const fs::path file = testing::scratch_folder("calibration") / "ids.safetensors";
  const Calibration before{"here", {{1, 2, 3}, {4, 5, 6}}};
  ASSERT_TRUE(save_calibration_ids(before, file).ok());
  const auto after = calibration_from_ids(file, 10);
  ASSERT_TRUE(after.ok()) << after.error().message;
  EXPECT_EQ(after->ids, before.ids);
  EXPECT_EQ(after->source, "ids:ids.safetensors");
  const auto json = calibration_from_ids(file_with("ids.json", "[[1,2,3],[4,5,6]]"), 10);
  ASSERT_TRUE(json.ok()) << json.error().message;
  EXPECT_EQ(json->ids, before.ids);
}

TEST(Calibration, OfAFileWhoseNameIsNoUtf8IsRecordedByANameThatIs) {
  const auto file = testing::scratch_folder("ids") / "\xff.json";
  ASSERT_TRUE(io::write_text(file, "[[1, 2]]").ok());
  const auto read = calibration_from_ids(file, 10);
  ASSERT_TRUE(read.ok()) << read.error().message;
  EXPECT_EQ(read->source, "ids:\xEF\xBF\xBD.json");
}

TEST(Calibration, SizesHaveTheirBounds) {
  EXPECT_TRUE(check_sizes(kMostSamples, kLongestSample).ok());
  for (const auto& [samples, length] :
       {std::pair<int64_t, int64_t>{0, 2}, {1, 1}, {kMostSamples + 1, 2}, {1, int64_t{1} << 40}}) {
    const Status status = check_sizes(samples, length);
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.error().code, Code::kUsage);
  }
}

TEST(CalibrationIds, NameRowAndColumnOfWhatIsWrong) {
  const auto message = [](const std::string& text) {
    const auto result = calibration_from_ids(file_with("bad.json", text), 10);
    EXPECT_FALSE(result.ok()) << text;
    EXPECT_EQ(result.error().code, Code::kBadInput);
    return result.error().message;
  };
  EXPECT_THAT(message("[[1,2],[3,10]]"), HasSubstr("row 1, column 1"));
  EXPECT_THAT(message("[[1,-2]]"), HasSubstr("got -2"));
  EXPECT_THAT(message("[[1,2],[3]]"), HasSubstr("row 1 has 1 ids (need 2"));
  EXPECT_THAT(message("[[1,2],[3,\"x\"]]"), HasSubstr("row 1, column 1: not a token id"));
  EXPECT_THAT(message("[[4294967297]]"), HasSubstr("not a token id"));
  for (const char* text : {"", "{}", "[]", "[[]]", "[1]", "[[1,2]"}) message(text);
}

TEST(CalibrationIds, OfAnotherTypeOrShapeAreRefused) {
  const fs::path file = testing::scratch_folder("calibration") / "wrong.safetensors";
  const Tensor wide{DType::kI64, {1, 2}, Bytes::take(std::vector<int64_t>{1, 2})};
  ASSERT_TRUE(io::write_safetensors(file, {{"ids", wide}}).ok());
  EXPECT_THAT(calibration_from_ids(file, 10).error().message, HasSubstr("got I64 [1, 2]"));
  const Tensor flat{DType::kI32, {2}, Bytes::take(std::vector<int32_t>{1, 2})};
  ASSERT_TRUE(io::write_safetensors(file, {{"ids", flat}}).ok());
  EXPECT_THAT(calibration_from_ids(file, 10).error().message, HasSubstr("got I32 [2]"));
  EXPECT_FALSE(calibration_from_ids("/nowhere/ids.safetensors", 10).ok());
}

TEST(CalibrationFromModel, DrawsTheSameIdsOnAnyThreadCount) {
  const auto folder = lacuna::testing::demo_model_folder();
  const auto checkpoint = io::Checkpoint::open(folder);
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  const auto decoder = model::Decoder::load(*checkpoint, {});
  ASSERT_TRUE(decoder.ok()) << decoder.error().message;
  std::vector<std::vector<int32_t>> first;
  for (int threads : {1, 2}) {
    model::set_threads(threads);
    int64_t last = 0;
    const auto calibration =
        calibration_from_model(*decoder, 20, 24, 5, [&](int64_t done, int64_t) { last = done; });
    model::set_threads(0);
    ASSERT_TRUE(calibration.ok()) << calibration.error().message;
    EXPECT_EQ(calibration->samples(), 20);
    EXPECT_EQ(calibration->length(), 24);
    EXPECT_EQ(last, 20 * 24);
    if (first.empty()) first = calibration->ids;
    EXPECT_EQ(calibration->ids, first) << threads << " threads";
  }
  EXPECT_EQ(first[0][0], *decoder->spec().bos_token);
  EXPECT_NE(first[0], first[1]);
  for (const auto& row : first)
    EXPECT_LT(*std::max_element(row.begin(), row.end()), decoder->spec().vocab);
  EXPECT_FALSE(calibration_from_model(*decoder, 1, decoder->spec().max_positions + 1, 0).ok());
}

}  // namespace
}  // namespace lacuna::prune
