#include "lacuna/io/json.h"

#include "io/sample_model.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::string nested(int depth) {
  const auto n = static_cast<size_t>(depth);
  return std::string(n, '[') + std::string(n, ']');
}

TEST(ParseJson, GivesTheValueAndSaysWhereAMistakeIs) {
  EXPECT_EQ(parse_json(R"([1, {"a": "b"}])", "f").value(), (json{1, {{"a", "b"}}}));
  EXPECT_THAT(message_of(parse_json("[1, 2", "file")),
              AllOf(HasSubstr("file: not JSON"), HasSubstr("byte 6")));
  EXPECT_THAT(message_of(parse_json("", "file")), HasSubstr("file: not JSON"));
  EXPECT_THAT(message_of(parse_json_object("[]", "file")),
              HasSubstr("file: not a JSON object (got array)"));
  EXPECT_THAT(message_of(parse_json("[1e999]", "file")), HasSubstr("not JSON"));
}

TEST(ParseJson, RefusesWhatNestsTooDeep) {
  EXPECT_TRUE(parse_json(nested(kDeepestJson), "f").ok());
  EXPECT_THAT(message_of(parse_json(nested(kDeepestJson + 1), "f")),
              AllOf(HasSubstr("too deep"), HasSubstr("got 65; need 64")));
  EXPECT_FALSE(parse_json(nested(1'000'000), "f").ok());
  EXPECT_FALSE(parse_json(std::string(1'000'000, '['), "f").ok());
  std::string objects;
  for (int i = 0; i < 100; ++i) objects += R"({"a":[)";
  EXPECT_THAT(message_of(parse_json(objects, "f")), HasSubstr("too deep"));
}

TEST(ParseJson, CountsNoBracketsInStrings) {
  const std::string text = json(std::string(1000, '[') + "\"" + std::string(1000, '{')).dump();
  EXPECT_TRUE(parse_json("[" + text + "]", "f").ok());
  EXPECT_TRUE(parse_json(R"(["\\", "]", "\"[["])", "f").ok());
}

TEST(ParseJson, IsWhatEveryReaderUses) {
  const std::string deep = R"({"a": )" + nested(200'000) + "}";
  const auto damaged = [&](const char* file) {
    const fs::path model = write_model(sample_weights(), Store::kCompact);
    put_text(model / file, deep);
    return model;
  };
  for (const char* file : {"config.json", "checksums.json"})
    EXPECT_THAT(message_of(Checkpoint::open(damaged(file))),
                AllOf(HasSubstr(file), HasSubstr("too deep")));
  const uint64_t size = deep.size();
  const std::string text = std::string(reinterpret_cast<const char*>(&size), 8) + deep;
  EXPECT_THAT(message_of(SafetensorsFile::parse(
                  Bytes::take(std::vector<char>(text.begin(), text.end())), "weights")),
              AllOf(HasSubstr("weights: the header"), HasSubstr("too deep")));
}

}  // namespace
}  // namespace lacuna::io
