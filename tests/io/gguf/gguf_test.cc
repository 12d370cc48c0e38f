#include "lacuna/io/gguf/gguf.h"

#include "io/gguf/gguf_builder.h"

namespace lacuna::io {
namespace {
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <class T>
T value_of(const GgufFile& file, const char* key) {
  const auto found = file.metadata().find(key);
  EXPECT_NE(found, file.metadata().end()) << key;
  const T* value = found == file.metadata().end() ? nullptr : std::get_if<T>(&found->second);
  EXPECT_NE(value, nullptr) << key;
  return value ? *value : T();
}

/// A small sound file with a list, texts and two tensors.
GgufBuilder sample() {
  GgufBuilder file;
  file.put("general.architecture", "llama");
  file.put("a.list", std::vector<std::string>{"one", "two"});
  file.put("a.number", uint32_t{7});
  file.add("first", {2, 3}, {1, 2, 3, 4, 5, 6});
  file.add("last", {1, 32}, 8, std::string(34, 'q'));
  return file;
}

TEST(Gguf, ReadsWhatTheReferenceWriterWrites) {
  const auto file =
      GgufFile::open(lacuna::testing::source_folder() / "tests/golden/gguf/blocks.gguf");
  ASSERT_TRUE(file.ok()) << file.error().message;
  EXPECT_EQ(value_of<uint64_t>(*file, "kinds.u8"), 200u);
  EXPECT_EQ(value_of<int64_t>(*file, "kinds.i8"), -100);
  EXPECT_EQ(value_of<uint64_t>(*file, "kinds.u16"), 60000u);
  EXPECT_EQ(value_of<int64_t>(*file, "kinds.i16"), -30000);
  EXPECT_EQ(value_of<uint64_t>(*file, "kinds.u32"), 4000000000u);
  EXPECT_EQ(value_of<int64_t>(*file, "kinds.i32"), -2000000000);
  EXPECT_EQ(value_of<uint64_t>(*file, "kinds.u64"), (uint64_t{1} << 63) + 5);
  EXPECT_EQ(value_of<int64_t>(*file, "kinds.i64"), -(int64_t{1} << 62));
  EXPECT_EQ(value_of<double>(*file, "kinds.f32"), static_cast<double>(1e-5f));
  EXPECT_EQ(value_of<double>(*file, "kinds.f64"), 0.1);
  EXPECT_TRUE(value_of<bool>(*file, "kinds.true"));
  EXPECT_FALSE(value_of<bool>(*file, "kinds.false"));
  EXPECT_EQ(value_of<std::string>(*file, "kinds.text"), "naïve 中文");
  EXPECT_THAT(value_of<GgufArray>(*file, "kinds.texts").strings, ElementsAre("a", "", "ccc"));
  EXPECT_THAT(value_of<GgufArray>(*file, "kinds.integers").integers, ElementsAre(1, -2, 3));
  EXPECT_THAT(value_of<GgufArray>(*file, "kinds.numbers").numbers, ElementsAre(0.5, -1.25));
  EXPECT_THAT(value_of<GgufArray>(*file, "kinds.flags").integers, ElementsAre(1, 0, 1));
  EXPECT_THAT(value_of<GgufArray>(*file, "kinds.bytes").integers, ElementsAre(7, 255));
  ASSERT_EQ(file->tensors().size(), 11u);
  EXPECT_EQ(file->tensors()[0].name, "f32");
  EXPECT_EQ(file->tensors()[0].shape, (Shape{3, 40}));
  EXPECT_EQ(file->tensors()[2].type, GgufType::kBF16);
  EXPECT_EQ(file->tensors()[2].shape, (Shape{3, 40}));
  EXPECT_EQ(file->tensors().back().type, GgufType::kQ6_K);
  EXPECT_EQ(file->tensors().back().shape, (Shape{16, 256}));
}

TEST(Gguf, ReadsVersionsTwoAndThreeAndNoOther) {
  GgufBuilder file = sample();
  for (const uint32_t version : {2u, 3u}) {
    file.version = version;
    const auto read = parse_gguf(file);
    ASSERT_TRUE(read.ok()) << read.error().message;
    ASSERT_EQ(read->tensors().size(), 2u);
    EXPECT_EQ(read->tensors()[0].shape, (Shape{2, 3}));
    EXPECT_EQ(read_unaligned<float>(read->tensors()[0].bytes.data() + 20), 6.0f);
    EXPECT_EQ(read->tensors()[1].bytes.size(), 34u);
  }
  file.version = 1;
  EXPECT_THAT(message_of(parse_gguf(file)), AllOf(HasSubstr("F.gguf"), HasSubstr("got 1; need 2")));
  file.version = 3u << 24;
  EXPECT_THAT(message_of(parse_gguf(file)), HasSubstr("big-endian"));
  EXPECT_THAT(message_of(parse_gguf("GGU")), HasSubstr("not a GGUF file"));
  EXPECT_THAT(message_of(parse_gguf("GGML" + sample().bytes().substr(4))),
              HasSubstr("not a GGUF file"));
  EXPECT_THAT(message_of(GgufFile::open("/no/such.gguf")), HasSubstr("/no/such.gguf"));
}

TEST(Gguf, EveryTruncationIsRefused) {
  const std::string whole = sample().bytes();
  ASSERT_TRUE(parse_gguf(whole).ok());
  // The padding behind the last tensor is nobody's.
  const size_t used = whole.size() - 30;
  for (size_t size = 0; size < used; ++size)
    EXPECT_THAT(message_of(parse_gguf(whole.substr(0, size))), HasSubstr("F.gguf")) << size;
  EXPECT_TRUE(parse_gguf(whole.substr(0, used)).ok());
  EXPECT_THAT(message_of(parse_gguf(whole.substr(0, used - 1))),
              AllOf(HasSubstr("\"last\""), HasSubstr("ends at byte 66 of 65")));
  EXPECT_THAT(message_of(parse_gguf(whole.substr(0, whole.find("first") + 7))),
              AllOf(HasSubstr("truncated?"), HasSubstr("tensor \"first\"")));
}

TEST(Gguf, CountsThatNoFileCouldHoldAreRefusedBeforeAnythingIsAllocated) {
  for (const uint64_t huge : {uint64_t{1} << 24, uint64_t{1} << 60, ~uint64_t{0}}) {
    for (const size_t at : {8u, 16u}) {  // tensors, keys
      std::string bytes = sample().bytes();
      std::memcpy(bytes.data() + at, &huge, sizeof(huge));
      EXPECT_THAT(message_of(parse_gguf(bytes)),
                  AllOf(HasSubstr("don't fit"), HasSubstr(std::to_string(huge))));
    }
    GgufBuilder file = sample();
    file.put("long.text", GgufBuilder::kString, raw(huge));
    EXPECT_THAT(message_of(parse_gguf(file)),
                AllOf(HasSubstr("\"long.text\""), HasSubstr("beyond the end")));
    file.erase("long.text");
    for (const uint32_t type : {0u, 5u, 8u, 12u}) {
      file.put_list("long.list", type, huge, "12345678");
      EXPECT_THAT(message_of(parse_gguf(file)),
                  AllOf(HasSubstr("\"long.list\""), HasSubstr("beyond the end")));
    }
  }
  std::string bytes = sample().bytes();
  const size_t name = bytes.find("first");
  const uint64_t huge = ~uint64_t{0} - 7;
  std::memcpy(bytes.data() + name - 8, &huge, sizeof(huge));
  EXPECT_THAT(message_of(parse_gguf(bytes)), HasSubstr("tensor number 1"));
}

TEST(Gguf, KeysThatContradictThemselvesAreRefusedByName) {
  const struct {
    uint32_t type;
    std::string value;
    const char* message;
  } cases[] = {
      {13, "", "unknown type"},
      {~0u, "", "unknown type"},
      {GgufBuilder::kBool, raw(uint8_t{2}), "neither 0 nor 1"},
      {GgufBuilder::kArray, raw(9u) + raw(uint64_t{1}), "list of lists"},
      {GgufBuilder::kArray, raw(77u) + raw(uint64_t{1}), "unknown type"},
      {GgufBuilder::kArray, raw(10u) + raw(uint64_t{1}) + raw(~uint64_t{0}), "above 2^63"},
  };
  for (const auto& bad : cases) {
    GgufBuilder file = sample();
    file.put("bad.key", bad.type, bad.value);
    EXPECT_THAT(message_of(parse_gguf(file)),
                AllOf(HasSubstr("F.gguf: key \"bad.key\""), HasSubstr(bad.message)));
  }
  std::string bytes = sample().bytes();
  bytes.replace(bytes.find("a.number"), 8, "a.list\xff!");
  EXPECT_THAT(message_of(parse_gguf(bytes)), HasSubstr("key number 3"));
  GgufBuilder twice = sample();
  twice.repeat("a.number");
  EXPECT_THAT(message_of(parse_gguf(twice)),
              AllOf(HasSubstr("\"a.number\""), HasSubstr("given twice")));
}

TEST(Gguf, TensorsThatContradictThemselvesAreRefusedByName) {
  const struct {
    Shape shape;
    uint32_t type;
    uint64_t begin;
    const char* message;
  } cases[] = {
      {{4}, 20, 96, "got IQ4_NL; need one of F32, F16, BF16"},
      {{4}, 4, 96, "got number 4"},
      {{4}, 1000, 96, "got number 1000"},
      {{1, 1, 1, 1, 1}, 0, 96, "got 5; need at most 4"},
      {{31}, 8, 96, "rows of 31 elements (need a multiple of 32 for Q8_0)"},
      {{2, 32}, 12, 96, "multiple of 256 for Q4_K"},
      {{int64_t{1} << 40, int64_t{1} << 40}, 0, 96, "impossible shape"},
      {{-1}, 0, 96, "impossible extent"},
      {{4}, 0, ~uint64_t{0} - 3, "ends beyond any file"},
      {{4}, 0, 97, "not aligned"},
      {{4}, 0, 1 << 20, "ends at byte 1048592 of 96"},
      {{int64_t{1} << 40}, 0, 96, "ends at byte 4398046511200 of 96"},
      {{4}, 0, 0, "overlaps"},
      {{4}, 0, 32, "overlaps"},
  };
  for (const auto& bad : cases) {
    GgufBuilder file = sample();
    file.describe("bad", bad.shape, bad.type, bad.begin);
    EXPECT_THAT(message_of(parse_gguf(file)),
                AllOf(HasSubstr("F.gguf: tensor \""), HasSubstr("bad"), HasSubstr(bad.message)))
        << bad.message;
  }
  GgufBuilder twice = sample();
  twice.add("first", {1}, {0});
  EXPECT_THAT(message_of(parse_gguf(twice)),
              AllOf(HasSubstr("\"first\""), HasSubstr("given twice")));
}

TEST(Gguf, AlignmentIsHonouredAndChecked) {
  GgufBuilder file;
  file.alignment = 64;
  file.put("general.alignment", uint32_t{64});
  file.add("a", {1}, {1});
  file.add("b", {1}, {2});
  const auto read = parse_gguf(file);
  ASSERT_TRUE(read.ok()) << read.error().message;
  EXPECT_EQ(read_unaligned<float>(read->tensors()[1].bytes.data()), 2.0f);
  for (const uint32_t bad : {0u, 48u, 1u << 30}) {
    file.put("general.alignment", bad);
    EXPECT_THAT(message_of(parse_gguf(file)),
                AllOf(HasSubstr("general.alignment"), HasSubstr(std::to_string(bad))));
  }
  file.put("general.alignment", "wide");
  EXPECT_THAT(message_of(parse_gguf(file)), HasSubstr("general.alignment"));
}

TEST(Gguf, EmptyTensorsAndFilesWithoutTensorsAreFine) {
  GgufBuilder file;
  EXPECT_TRUE(parse_gguf(file).ok());
  file.add("scalar", {}, {5});
  file.add("empty", {0, 4}, std::vector<float>());
  const auto read = parse_gguf(file);
  ASSERT_TRUE(read.ok()) << read.error().message;
  EXPECT_EQ(read->tensors()[0].elements(), 1);
  EXPECT_EQ(read->tensors()[1].bytes.size(), 0u);
}

}  // namespace
}  // namespace lacuna::io
