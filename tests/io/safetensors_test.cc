#include "lacuna/io/safetensors.h"

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string with_header(const std::string& header, size_t data_bytes) {
  const uint64_t size = header.size();
  return std::string(reinterpret_cast<const char*>(&size), 8) + header +
         std::string(data_bytes, '\0');
}

Result<SafetensorsFile> parse(const std::string& text) {
  return SafetensorsFile::parse(Bytes::take(std::vector<char>(text.begin(), text.end())), "F");
}

json entry(const char* dtype, json shape, uint64_t begin, uint64_t end) {
  return {{"dtype", dtype}, {"shape", std::move(shape)}, {"data_offsets", {begin, end}}};
}

TEST(Safetensors, ReadsBackWhatItWroteInTheSameOrder) {
  const fs::path file = lacuna::testing::scratch_folder("st") / "m.safetensors";
  const std::vector<NamedTensor> tensors = {
      {"z", random_matrix(3, 5, DType::kF32, {})},
      {"a", random_matrix(2, 7, DType::kBF16, {})},
      {"empty", {DType::kI64, {0, 4}, {}}},
      {"scalar", {DType::kU8, {}, Bytes::take<uint8_t>({7})}},
      {"f8", {DType::kF8E4M3, {3}, Bytes::take<uint8_t>({1, 2, 3})}},
      {"i32", {DType::kI32, {2}, Bytes::take<int32_t>({-1, 5})}}};
  ASSERT_TRUE(write_safetensors(file, tensors, {{"format", "pt"}}).ok());
  const auto read = SafetensorsFile::open(file).value();
  EXPECT_EQ(read.metadata().at("format"), "pt");
  ASSERT_EQ(read.entries().size(), tensors.size());
  std::vector<std::string> names;
  for (const auto& e : read.entries()) names.push_back(e.name);
  EXPECT_THAT(names, ElementsAre("z", "a", "empty", "scalar", "f8", "i32"));
  for (const auto& [name, tensor] : tensors)
    EXPECT_TRUE(equal(read.tensor(name).value(), tensor)) << name;
  EXPECT_TRUE(read.contains("a"));
  EXPECT_FALSE(read.contains("b"));
  EXPECT_THAT(message_of(read.tensor("b")), AllOf(HasSubstr("m.safetensors"), HasSubstr("\"b\"")));
}

TEST(Safetensors, DataStartsAlignedAndEqualCallsGiveEqualBytes) {
  const fs::path folder = lacuna::testing::scratch_folder("st");
  for (int i = 0; i < 70; ++i) {
    const std::vector<NamedTensor> tensors = {
        {std::string(static_cast<size_t>(i), 'n'), random_matrix(1, 3, DType::kF16, {})}};
    ASSERT_TRUE(write_safetensors(folder / "a", tensors).ok());
    ASSERT_TRUE(write_safetensors(folder / "b", tensors).ok());
    const std::string text = file_text(folder / "a");
    EXPECT_EQ((8 + read_unaligned<uint64_t>(text.data())) % 64, 0u);
    EXPECT_EQ(text, file_text(folder / "b"));
  }
}

TEST(Safetensors, WritingRefusesWhatNobodyCouldRead) {
  const fs::path file = lacuna::testing::scratch_folder("st") / "m";
  const Tensor two{DType::kF32, {2}, Bytes::take<float>({1, 2})};
  EXPECT_THAT(message_of(write_safetensors(file, {{"a", two}, {"a", two}})),
              AllOf(HasSubstr(file.string()), HasSubstr("\"a\""), HasSubstr("twice")));
  EXPECT_THAT(message_of(write_safetensors(file, {{"a", {DType::kF32, {3}, two.bytes}}})),
              AllOf(HasSubstr("\"a\""), HasSubstr("got 8; need 12")));
  EXPECT_THAT(message_of(write_safetensors(file, {{"\xff", two}})), HasSubstr("UTF-8"));
  EXPECT_FALSE(fs::exists(file));
}

TEST(Safetensors, MissingAndForeignFilesAreNamed) {
  EXPECT_THAT(message_of(SafetensorsFile::open("/no/such.safetensors")),
              HasSubstr("/no/such.safetensors"));
  EXPECT_THAT(message_of(parse("1234567")), HasSubstr("got 7 bytes"));
  EXPECT_THAT(message_of(parse("")), HasSubstr("got 0 bytes"));
  EXPECT_THAT(message_of(parse(with_header("[1]", 0))), HasSubstr("not a JSON object"));
  EXPECT_THAT(message_of(parse(with_header("{\"a\": ", 0))), HasSubstr("not a JSON object"));
}

TEST(Safetensors, AHeaderOfTwoToTheSixtyBytesIsRefused) {
  const uint64_t huge = uint64_t{1} << 60;
  EXPECT_THAT(message_of(parse(std::string(reinterpret_cast<const char*>(&huge), 8) + "{}")),
              HasSubstr("1152921504606846976"));
}

TEST(Safetensors, EveryTruncationIsRefused) {
  const fs::path file = lacuna::testing::scratch_folder("st") / "m";
  ASSERT_TRUE(write_safetensors(file, {{"first", random_matrix(2, 3, DType::kF32, {})},
                                       {"last", random_matrix(1, 4, DType::kBF16, {})}})
                  .ok());
  const std::string whole = file_text(file);
  ASSERT_TRUE(parse(whole).ok());
  for (size_t size = 0; size < whole.size(); ++size)
    EXPECT_FALSE(parse(whole.substr(0, size)).ok()) << size;
  EXPECT_THAT(
      message_of(parse(whole.substr(0, whole.size() - 1))),
      AllOf(HasSubstr("\"last\""), HasSubstr("ends at byte 32 of 31"), HasSubstr("truncated")));
  EXPECT_THAT(message_of(parse(whole + "x")), HasSubstr("1 bytes follow"));
}

TEST(Safetensors, OverlapsAndHolesAreRefusedByName) {
  EXPECT_THAT(
      message_of(parse(with_header(
          json{{"a", entry("F32", {4}, 0, 16)}, {"b", entry("F32", {4}, 8, 24)}}.dump(), 24))),
      AllOf(HasSubstr("\"b\""), HasSubstr("\"a\""), HasSubstr("overlaps")));
  EXPECT_THAT(
      message_of(parse(with_header(
          json{{"a", entry("F32", {4}, 0, 16)}, {"b", entry("F32", {2}, 20, 28)}}.dump(), 28))),
      AllOf(HasSubstr("\"b\""), HasSubstr("begins at byte 20; need 16")));
}

TEST(Safetensors, EntriesThatContradictThemselvesAreRefusedByName) {
  const struct {
    json header;
    const char* message;
  } cases[] = {
      {{{"t", entry("F99", {1}, 0, 4)}}, "unknown dtype (got F99"},
      {{{"t", entry("F32", {2}, 0, 4)}}, "got 4; need 8"},
      {{{"t", entry("F32", {-1}, 0, 4)}}, "not a list of sizes"},
      {{{"t", entry("F32", {1.5}, 0, 4)}}, "not a list of sizes"},
      {{{"t", entry("F32", "x", 0, 4)}}, "no dtype, shape"},
      {{{"t", entry("F32", {uint64_t{1} << 40, uint64_t{1} << 40}, 0, 4)}}, "impossible shape"},
      {{{"t", entry("F32", {uint64_t{1} << 55, 16}, 0, 4)}}, "impossible shape"},
      {{{"t", entry("F32", {1}, 4, 0)}}, "ends before it begins"},
      {{{"t", 5}}, "no dtype, shape"},
      {{{"t", {{"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {0}}}}}, "no dtype, shape"},
      {{{"t", {{"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {0, "4"}}}}}, "no positions"},
      {{{"t", {{"dtype", "F32"}, {"shape", {1}}, {"data_offsets", {-4, 0}}}}}, "no positions"},
  };
  for (const auto& bad : cases)
    EXPECT_THAT(message_of(parse(with_header(bad.header.dump(), 4))),
                AllOf(HasSubstr("F: tensor \"t\""), HasSubstr(bad.message)))
        << bad.header;
  EXPECT_THAT(message_of(parse(with_header(R"({"__metadata__": {"a": 1}})", 0))),
              HasSubstr("__metadata__"));
  EXPECT_THAT(message_of(parse(with_header(R"({"__metadata__": "a"})", 0))),
              HasSubstr("__metadata__"));
}

TEST(Safetensors, ReadsRealShards) {
  LACUNA_NEEDS_DATA(folder, "models/lab-16m");
  size_t tensors = 0;
  for (const char* shard :
       {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}) {
    const auto file = SafetensorsFile::open(folder / shard);
    ASSERT_TRUE(file.ok()) << file.error().message;
    for (const auto& e : file->entries()) EXPECT_EQ(e.dtype, DType::kBF16) << e.name;
    tensors += file->entries().size();
  }
  EXPECT_EQ(tensors, 1u + 8u * 9u + 1u);
}

}  // namespace
}  // namespace lacuna::io
