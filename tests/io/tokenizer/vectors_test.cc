// The ids that other implementations give: llama.cpp's vectors, Hugging Face's goldens, the
// reference prompts.
#include <sstream>

#include "io/tokenizer/samples.h"

namespace lacuna::io {
namespace {

using ::testing::ElementsAreArray;

struct VectorFile {
  std::string name, tokenizer, vectors;
};
void PrintTo(const VectorFile& file, std::ostream* out) { *out << file.name; }

class Vectors : public ::testing::TestWithParam<VectorFile> {};

TEST_P(Vectors, GiveTheSameIds) {
  const std::string vectors = "tokenizers/vectors/ggml-vocab-" + GetParam().vectors + ".gguf";
  LACUNA_NEEDS_DATA(path, GetParam().tokenizer);
  LACUNA_NEEDS_DATA(inputs, vectors + ".inp");
  LACUNA_NEEDS_DATA(outputs, vectors + ".out");
  const TokenizerPointer tokenizer = open_tokenizer(path);
  const std::string texts = read_text(inputs).value();
  std::istringstream lines(read_text(outputs).value());
  const std::string separator = "\n__ggml_vocab_test__\n";
  int cases = 0;
  for (size_t at = 0, end = 0; (end = texts.find(separator, at)) != std::string::npos; ++cases) {
    const std::string text = texts.substr(at, end - at);
    at = end + separator.size();
    std::string line;
    ASSERT_TRUE(std::getline(lines, line));
    std::istringstream numbers(line);
    const std::vector<int32_t> ids{std::istream_iterator<int32_t>(numbers), {}};
    EXPECT_THAT(tokenizer->encode(text, false), ElementsAreArray(ids)) << text;
  }
  EXPECT_EQ(cases, 46);
  EXPECT_FALSE(lines >> cases) << "an id list without a text";
}

INSTANTIATE_TEST_SUITE_P(
    LlamaCpp, Vectors,
    ::testing::Values(
        VectorFile{"gpt2", "tokenizers/gpt2", "gpt-2"},
        VectorFile{"qwen2", "tokenizers/qwen2", "qwen2"},
        VectorFile{"llama3_tiktoken", "tokenizers/llama3/tokenizer.model", "llama-bpe"},
        VectorFile{"llama2_json", "tokenizers/llama2/tokenizer.json", "llama-spm"},
        VectorFile{"llama2_sentencepiece", "tokenizers/llama2/tokenizer.model", "llama-spm"}),
    [](const auto& test) { return test.param.name; });

void expect_cases(const TokenizerPointer& tokenizer, const nlohmann::json& cases) {
  ASSERT_FALSE(cases.empty());
  for (const auto& row : cases) {
    const auto text = row.at("text").get<std::string>();
    const auto ids = row.at("ids").get<std::vector<int32_t>>();
    EXPECT_THAT(tokenizer->encode(text, true), ElementsAreArray(ids)) << row["text"];
    EXPECT_EQ(tokenizer->decode(ids, false), row.at("decoded")) << row["text"];
    EXPECT_EQ(tokenizer->decode(ids, true), row.at("decoded_skip")) << row["text"];
    expect_streams(tokenizer, ids, false);
    expect_streams(tokenizer, ids, true);
  }
}

class HuggingFaceFolder : public ::testing::TestWithParam<const char*> {};

TEST_P(HuggingFaceFolder, GivesTheSameIdsAndTexts) {
  LACUNA_NEEDS_DATA(folder, GetParam());
  expect_cases(open_tokenizer(folder), golden().at("folders").at(GetParam()));
}

INSTANTIATE_TEST_SUITE_P(Golden, HuggingFaceFolder,
                         ::testing::Values("tokenizers/gpt2", "tokenizers/qwen2",
                                           "tokenizers/llama2", "tokenizers/dolma2",
                                           "models/lab-16m"));

TEST(HuggingFaceComponents, GiveTheSameIdsAndTexts) {
  const auto& files = golden().at("components");
  ASSERT_EQ(files.size(), 40u);
  for (size_t i = 0; i < files.size(); ++i) {
    nlohmann::json file = files[i].at("file");
    file["model"] = golden().at("bases").at(files[i].at("base").get<std::string>());
    file["model"].update(files[i].at("patch"));
    SCOPED_TRACE(files[i]["file"].dump() + files[i]["patch"].dump());
    const auto read = tokenizer::parse_huggingface(file.dump(), {}, "golden");
    ASSERT_TRUE(read.ok()) << read.error().message;
    expect_cases(*read, files[i].at("cases"));
    std::mt19937_64 random(i);
    for (int sequence = 0; sequence < 100; ++sequence) {
      std::vector<int32_t> ids(random() % 12);
      for (int32_t& id : ids)
        id = static_cast<int32_t>(random() % static_cast<uint64_t>((*read)->vocab_size()));
      expect_streams(*read, ids, sequence % 2 == 0);
    }
  }
}

void expect_reference_prompt(const std::filesystem::path& folder,
                             const std::filesystem::path& reference) {
  const TokenizerPointer tokenizer = open_tokenizer(folder);
  const auto expected = nlohmann::json::parse(read_text(reference).value());
  EXPECT_EQ(tokenizer->encode(expected.at("prompt").get<std::string>(), true),
            expected.at("prompt_ids").get<std::vector<int32_t>>());
  EXPECT_EQ(tokenizer->decode(expected.at("greedy_64_ids").get<std::vector<int32_t>>(), true),
            expected.at("greedy_64_text"));
}

TEST(ReferenceModels, EncodeTheirPromptsAndDecodeTheirAnswers) {
  const auto repository = lacuna::testing::source_folder();
  expect_reference_prompt(repository / "examples/demo-model",
                          repository / "tests/golden/demo-5m-reference.json");
  for (const std::string name : {"lab-16m", "lab-relu2-16m", "demo-5m"}) {
    LACUNA_NEEDS_DATA(folder, "models/" + name);
    expect_reference_prompt(folder, folder / "reference.json");
  }
}

// Trained with llama2.c, whose decoder keeps the space that SentencePiece puts before a text.
TEST(ReferenceModels, SmallSentencePieceModels) {
  for (const auto& [model, space] : {std::pair{"models/stories260K/tok512.model", ""},
                                     std::pair{"models/babyllama-tok105/tok105.model", " "}}) {
    LACUNA_NEEDS_DATA(path, model);
    const TokenizerPointer tokenizer = open_tokenizer(path);
    const auto expected =
        nlohmann::json::parse(read_text(path.parent_path() / "reference.json").value());
    const auto ids = expected.at("greedy_from_bos_200").get<std::vector<int32_t>>();
    EXPECT_EQ(space + tokenizer->decode(ids, true), expected.at("greedy_text"));
    const auto encoded = tokenizer->encode("Once upon a time, there was a", true);
    ASSERT_GT(encoded.size(), 8u);
    EXPECT_EQ(encoded.front(), 1) << "BOS";
    EXPECT_TRUE(std::equal(encoded.begin() + 1, encoded.end(), ids.begin()));
  }
}

// The special tokens that tiktoken's form doesn't hold.
TEST(Llama3Tiktoken, KnowsItsSpecialTokens) {
  LACUNA_NEEDS_DATA(path, "tokenizers/llama3/tokenizer.model");
  const TokenizerPointer tokenizer = open_tokenizer(path);
  EXPECT_EQ(tokenizer->vocab_size(), 128256);
  EXPECT_EQ(tokenizer->bos(), 128000);
  EXPECT_EQ(tokenizer->eos(), 128001);
  EXPECT_EQ(tokenizer->token_id("<|eot_id|>"), 128009);
  EXPECT_EQ(tokenizer->token_id("<|reserved_special_token_247|>"), 128255);
  EXPECT_EQ(tokenizer->encode("<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>", true),
            (std::vector<int32_t>{128000, 128006, 882, 128007, 271, 13347, 128009}));
}

}  // namespace
}  // namespace lacuna::io
