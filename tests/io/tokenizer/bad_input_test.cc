// Files that must be refused, by name of what is wrong in them.
#include "io/tokenizer/samples.h"
#include "lacuna/io/json.h"
#include "lacuna/io/tokenizer/legacy.h"
#include "lacuna/io/tokenizer/tiktoken.h"

namespace lacuna::io {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;

/// A tokenizer.json of five tokens.
json small() {
  return json::parse(R"({
    "added_tokens": [{"id": 4, "content": "<s>", "special": true}],
    "normalizer": {"type": "NFC"},
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false},
    "decoder": {"type": "ByteLevel"},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "aab": 3},
              "merges": [["a", "b"], ["a", "ab"]]}})");
}

std::string refusal(const json& file) {
  const auto read = tokenizer::parse_huggingface(file.dump(), {}, "dir/tokenizer.json");
  EXPECT_FALSE(read.ok()) << file;
  if (read.ok()) return "";
  EXPECT_EQ(read.error().code, Code::kBadInput);
  EXPECT_THAT(read.error().message, HasSubstr("dir/tokenizer.json"));
  return read.error().message;
}

TEST(BadTokenizerJson, TheSmallFileIsGood) {
  const auto read = tokenizer::parse_huggingface(small().dump(), {}, "small").value();
  EXPECT_EQ(read->encode("aab<s>b", true), (std::vector<int32_t>{3, 4, 1}));
  json old = small();  // before ["a", "b"] merges were "a b", and the model had no type
  old["model"]["merges"] = {"a b", "a ab"};
  old["model"].erase("type");
  EXPECT_EQ(tokenizer::parse_huggingface(old.dump(), {}, "small").value()->encode("aab<s>b", true),
            (std::vector<int32_t>{3, 4, 1}));
}

TEST(BadTokenizerJson, RefusesValuesThatNestTooDeep) {
  std::string text = R"({"normalizer": )";
  constexpr std::string_view kOpen = R"({"type": "Sequence", "normalizers": [)";
  for (int i = 0; i < 100'000; ++i) text += kOpen;
  for (int i = 0; i < 100'000; ++i) text += "]}";
  const auto read = tokenizer::parse_huggingface(text + "}", {}, "dir/tokenizer.json");
  ASSERT_FALSE(read.ok());
  EXPECT_THAT(read.error().message, AllOf(HasSubstr("dir/tokenizer.json"), HasSubstr("too deep")));
}

TEST(BadTokenizerJson, NamesUnknownComponents) {
  const std::vector<std::pair<std::string, std::vector<std::string>>> sections = {
      {"model", {"Unigram", "WordPiece", "WordLevel", ""}},
      {"normalizer", {"Lowercase", "Precompiled", "BertNormalizer", "Strip", "StripAccents", ""}},
      {"pre_tokenizer",
       {"Metaspace", "Whitespace", "WhitespaceSplit", "Punctuation", "BertPreTokenizer",
        "CharDelimiterSplit", "UnicodeScripts", ""}},
      {"post_processor", {"BertProcessing", "RobertaProcessing", ""}},
      {"decoder", {"WordPiece", "Metaspace", "CTC", "BPEDecoder", ""}}};
  for (const auto& [section, types] : sections)
    for (const std::string& type : types) {
      json file = small();
      file[section]["type"] = type;
      EXPECT_THAT(refusal(file), AllOf(HasSubstr(section), HasSubstr("\"" + type + "\"")));
      if (section == "model") continue;
      const std::string list = section == "normalizer"       ? "normalizers"
                               : section == "pre_tokenizer"  ? "pretokenizers"
                               : section == "post_processor" ? "processors"
                                                             : "decoders";
      file[section] = {{"type", "Sequence"}, {list, json::array({{{"type", type}}})}};
      EXPECT_THAT(refusal(file), AllOf(HasSubstr(section), HasSubstr("\"" + type + "\"")));
    }
}

/// What `text` at `pointer` in the small file must bring up.
struct Flaw {
  const char* pointer;
  const char* value;
  std::vector<std::string> named;
};

TEST(BadTokenizerJson, NamesEveryFlaw) {
  // Within three others: as deep as a file may nest, and a level more.
  const auto nested = [](size_t levels) {
    return std::string(levels, '[') + std::string(levels, ']');
  };
  const std::string deep = nested(kDeepestJson - 3), too_deep = nested(kDeepestJson - 2);
  const std::vector<Flaw> flaws = {
      {"/model", "null", {"model"}},
      {"/model/vocab", "[]", {"vocab"}},
      {"/model/vocab/b", "\"1\"", {"\"b\"", "\"1\""}},
      {"/model/vocab/b", "-1", {"\"b\"", "-1"}},
      {"/model/vocab/b", "4294967296", {"\"b\"", "4294967296"}},
      {"/model/vocab/b", "1.5", {"\"b\"", "1.5"}},
      {"/model/vocab/b", "0", {"id 0", "\"a\"", "\"b\""}},
      {"/model/vocab/b", deep.c_str(), {"\"b\"", "array"}},
      {"/model/merges", "{}", {"merges"}},
      {"/model/merges/1", "\"ab\"", {"merge 1", "\"ab\""}},
      {"/model/merges/1", "\"a a b\"", {"merge 1", "a a b"}},
      {"/model/merges/1", "[\"a\"]", {"merge 1"}},
      {"/model/merges/1", "[\"a\", 3]", {"merge 1"}},
      {"/model/merges/1", deep.c_str(), {"merge 1", "array"}},
      {"/model/vocab/b", too_deep.c_str(), {"too deep", "got 65; need 64"}},
      {"/model/merges/1", too_deep.c_str(), {"too deep", "got 65; need 64"}},
      {"/model/merges/1", "[\"a\", \"x\"]", {"merge 1", "\"x\" is not in it"}},
      {"/model/merges/1", "[\"b\", \"a\"]", {"merge 1", "\"ba\" is not in it"}},
      {"/model/unk_token", "\"<unk>\"", {"unk_token", "<unk>"}},
      {"/model/dropout", "0.1", {"dropout", "0.1"}},
      {"/model/end_of_word_suffix", "\"</w>\"", {"end_of_word_suffix", "</w>"}},
      {"/model/continuing_subword_prefix", "\"##\"", {"continuing_subword_prefix", "##"}},
      {"/model/ignore_merges", "1", {"ignore_merges", "number"}},
      {"/added_tokens", "{}", {"added_tokens"}},
      {"/added_tokens/0", "3", {"added token", "number"}},
      {"/added_tokens/0", "{}", {"added token", "content"}},
      {"/added_tokens/0/id", "null", {"<s>", "-1"}},
      {"/added_tokens/0/id", "2097152", {"<s>", "2097152"}},
      {"/added_tokens/0/id", "1", {"<s>", "\"b\""}},
      {"/added_tokens/0/content", "\"ab\"", {"\"ab\"", "it at 2"}},
      {"/added_tokens/0/lstrip", "\"yes\"", {"lstrip", "string"}},
      {"/added_tokens/1", R"({"id": 4, "content": "<t>"})", {"<t>", "4"}},
      {"/normalizer", "3", {"normalizer", "number"}},
      {"/normalizer", R"({"type": "Prepend"})", {"prepend"}},
      {"/normalizer", R"({"type": "Replace", "content": ""})", {"pattern"}},
      {"/normalizer", R"({"type": "Replace", "pattern": {"String": " "}})", {"content"}},
      {"/normalizer", R"({"type": "Sequence"})", {"normalizer", "normalizers"}},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"Regex": "(a"}})", {"\"(a\""}},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"Regex": "\\w+"}})", {"\\w"}},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"Glob": "*"}})", {"pattern"}},
      {"/pre_tokenizer", R"({"type": "Split", "pattern": {"String": "a"}})", {"behavior"}},
      {"/pre_tokenizer",
       R"({"type": "Split", "pattern": {"String": "a"}, "behavior": "Kept"})",
       {"behavior", "\"Kept\""}},
      {"/decoder", R"({"type": "Replace", "pattern": {"Regex": "a"}, "content": ""})", {"Replace"}},
      {"/decoder", R"({"type": "Strip", "content": " ", "start": 0, "stop": 1})", {"stop 1"}},
      {"/decoder", R"({"type": "Strip", "content": "ab", "start": 1, "stop": 0})", {"\"ab\""}},
      {"/decoder",
       R"({"type": "Sequence", "decoders": [{"type": "Fuse"}, {"type": "ByteFallback"}]})",
       {"ByteFallback", "Fuse"}},
      {"/post_processor", R"({"type": "TemplateProcessing"})", {"single"}},
      {"/post_processor", R"({"type": "TemplateProcessing", "single": []})", {"sequence"}},
      {"/post_processor",
       R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<t>"}}],
           "special_tokens": {"<s>": {"ids": [4]}}})",
       {"special_tokens", "\"<t>\""}},
      {"/post_processor",
       R"({"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}],
           "special_tokens": {"<s>": {"ids": [4, 5]}}})",
       {"ids", "\"<s>\"", "got 5"}}};
  for (const Flaw& flaw : flaws) {
    json file = small();
    file[json::json_pointer(flaw.pointer)] = json::parse(flaw.value);
    const std::string text = file.dump();
    const std::string message =
        message_of(tokenizer::parse_huggingface(text, {}, "dir/tokenizer.json"));
    EXPECT_THAT(message, HasSubstr("dir/tokenizer.json")) << flaw.pointer;
    for (const std::string& name : flaw.named)
      EXPECT_THAT(message, HasSubstr(name)) << flaw.pointer << " " << text.substr(0, 1000);
    EXPECT_LT(message.size(), 600u) << flaw.pointer;
  }
}

TEST(BadTokenizerJson, IsNoJson) {
  for (const char* text : {"", "{", "[]", "{\"model\": \"\xff\"}", "3"})
    EXPECT_THAT(message_of(tokenizer::parse_huggingface(text, {}, "dir/tokenizer.json")),
                HasSubstr("dir/tokenizer.json"))
        << text;
}

/// A folder of tokenizer files; opening it must fail.
class BadFolder : public ::testing::Test {
 protected:
  void put(const std::string& name, const std::string& text) { put_text(folder_ / name, text); }
  std::string refusal() const { return message_of(Tokenizer::open(folder_)); }
  const std::filesystem::path folder_ = lacuna::testing::scratch_folder("tokenizer");
};

TEST_F(BadFolder, WithoutTokenizerFilesIsToldWhatIsNeeded) {
  for (const char* lone : {"", "vocab.json", "merges.txt", "encoder.json"}) {
    if (*lone != '\0') put(lone, "{}");
    EXPECT_THAT(refusal(), AllOf(HasSubstr(folder_.string()), HasSubstr("tokenizer.json"),
                                 HasSubstr("merges.txt"), HasSubstr("tokenizer.model")));
    std::filesystem::remove(folder_ / lone);
    std::filesystem::create_directories(folder_);
  }
  EXPECT_THAT(message_of(Tokenizer::open(folder_ / "missing")), HasSubstr("missing"));
}

TEST_F(BadFolder, VocabAndMerges) {
  put("vocab.json", R"({"a": 0, "b": 1, "ab": 2})");
  put("merges.txt", "#version: 0.2\r\na b\r\n\r\n");
  const auto good = Tokenizer::open(folder_).value();
  EXPECT_EQ(good->encode("ab", true), (std::vector<int32_t>{2}));
  EXPECT_EQ(good->eos(), std::nullopt);
  for (const char* line : {"ab", "a b c", " ", "a\tb"}) {
    put("merges.txt", std::string("#version: 0.2\na b\n\n") + line + "\n");
    if (std::string(line) == " ") continue;  // two empty tokens: not in the vocabulary, below
    EXPECT_THAT(refusal(), AllOf(HasSubstr("merges.txt"), HasSubstr("line 4"), HasSubstr(line)));
  }
  put("merges.txt", "#version: 0.2\na b\nb a\n");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("merges.txt"), HasSubstr("merge 1"), HasSubstr("\"ba\"")));
  put("merges.txt", " \n");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("merges.txt"), HasSubstr("merge 0")));
  put("merges.txt", "a\xff");
  EXPECT_THAT(refusal(), HasSubstr("a\xEF\xBF\xBD"));
  put("vocab.json", R"({"a": 0, "b": "x"})");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("vocab.json"), HasSubstr("\"b\"")));
  put("vocab.json", R"(["a"])");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("vocab.json"), HasSubstr("array")));
}

TEST_F(BadFolder, Config) {
  put("vocab.json", R"({"a": 0, "b": 1, "ab": 2})");
  put("merges.txt", "a b\n");
  for (const auto& [config, named] : std::vector<std::pair<std::string, std::string>>{
           {"[]", "array"},
           {R"({"tokenizer_class": 3})", "tokenizer_class"},
           {R"({"eos_token": 3})", "eos_token"},
           {R"({"eos_token": "</s>"})", "</s>"},
           {R"({"bos_token": {"content": "<s>"}})", "<s>"},
           {R"({"add_bos_token": "yes"})", "add_bos_token"},
           {R"({"add_bos_token": true})", "add_bos_token"},
           {R"({"added_tokens_decoder": []})", "added_tokens_decoder"},
           {R"({"added_tokens_decoder": {"3x": {"content": "<s>"}}})", "3x"},
           {R"({"added_tokens_decoder": {"3": {}}})", "content"},
           {R"({"added_tokens_decoder": {"1": {"content": "<s>"}}})", "<s>"}}) {
    put("tokenizer_config.json", config);
    EXPECT_THAT(refusal(), HasSubstr(named)) << config;
  }
  put("tokenizer_config.json",
      R"({"bos_token": {"content": "a"}, "eos_token": "<s>", "add_bos_token": true,
          "add_eos_token": true, "pad_token": null,
          "added_tokens_decoder": {"3": {"content": "<s>", "special": true}}})");
  const auto good = Tokenizer::open(folder_).value();
  EXPECT_EQ(good->encode("ab<s>", true), (std::vector<int32_t>{0, 0, 1, 3, 3}))
      << "\"a\" is special: found before the merges";
  EXPECT_EQ(good->encode("b", false), (std::vector<int32_t>{1}));
  EXPECT_EQ(good->decode({0, 1, 3}, true), "b");
}

TEST_F(BadFolder, Tiktoken) {
  for (const char* line :
       {"YQ==", "YQ== ", "YQ== 1 ", "YQ== x", "YQ= 1", "Y*== 1", "==== 1", " 1"}) {
    put("tokenizer.model", std::string("IQ== 0\n\n") + line + "\n");
    EXPECT_THAT(refusal(),
                AllOf(HasSubstr("tokenizer.model"), HasSubstr("line 3"), HasSubstr(line)));
  }
  put("tokenizer.model", "IQ== 0\nYQ== 1\n");
  EXPECT_THAT(refusal(),
              AllOf(HasSubstr("2 ranks"), HasSubstr("128000"), HasSubstr("tokenizer.json")));
  put("tokenizer.model", "");
  EXPECT_THAT(refusal(), HasSubstr("0 ranks"));
  LACUNA_NEEDS_DATA(path, "tokenizers/llama3/tokenizer.model");
  std::string text = read_text(path).value();
  text.replace(0, text.find('\n'), "IQ== 99999999999999999999");
  put("tokenizer.model", text);
  EXPECT_THAT(refusal(), HasSubstr("line 1"));
  text.replace(0, text.find('\n'), "IQ== 1");
  put("tokenizer.model", text);
  EXPECT_THAT(refusal(), HasSubstr("id 1"));
}

TEST_F(BadFolder, SentencePiece) {
  put("tokenizer.model", "\n\x05hello");
  EXPECT_THAT(refusal(), AllOf(HasSubstr("tokenizer.model"), HasSubstr("SentencePiece")));
  LACUNA_NEEDS_DATA(path, "models/babyllama-tok105/tok105.model");
  const std::string whole = read_text(path).value();
  for (size_t size = 1; size < whole.size(); size += 7) {  // truncated anywhere: refused or usable
    put("tokenizer.model", whole.substr(0, size));
    const auto read = Tokenizer::open(folder_);
    if (read.ok()) (void)(*read)->encode("Once upon", true);
  }
}

}  // namespace
}  // namespace lacuna::io
