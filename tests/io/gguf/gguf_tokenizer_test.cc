#include "lacuna/io/gguf/gguf_tokenizer.h"

#include <limits>

#include "io/gguf/gguf_builder.h"
#include "lacuna/io/tokenizer/chat_template.h"
#include "lacuna/io/tokenizer/huggingface.h"
#include "lacuna/io/tokenizer/tokenizer.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

using Ids = std::vector<int32_t>;

/// The tokenizer as a folder would give it.
std::shared_ptr<const Tokenizer> open(const GgufTokenizer& made) {
  const fs::path folder = lacuna::testing::scratch_folder("gguf");
  put_text(folder / "tokenizer.json", made.tokenizer_json);
  put_text(folder / "tokenizer_config.json", made.tokenizer_config_json);
  const auto opened = Tokenizer::open(folder);
  EXPECT_TRUE(opened.ok()) << opened.error().message;
  return opened.ok() ? *opened : nullptr;
}

GgufTokenizer made_from(const GgufFile& file) {
  auto made = gguf_tokenizer(file);
  EXPECT_TRUE(made.ok()) << made.error().message;
  return made.ok() ? *std::move(made) : GgufTokenizer();
}

GgufTokenizer made_from(const GgufBuilder& builder) {
  return made_from(parse_gguf(builder).value());
}

std::string refusal(const GgufBuilder& builder) {
  return message_of(gguf_tokenizer(parse_gguf(builder).value()));
}

/// Strings and ids of a conformance file pair.
void expect_vectors(const Tokenizer& tokenizer, const fs::path& inputs, const fs::path& outputs) {
  const std::string separator = "\n__ggml_vocab_test__\n";
  std::string text = file_text(inputs);
  std::istringstream lines(file_text(outputs));
  size_t checked = 0;
  for (size_t at = 0; at <= text.size();) {
    const size_t end = std::min(text.find(separator, at), text.size());
    std::string line;
    std::getline(lines, line);  // the last string is empty, and the file without a last line
    std::istringstream numbers(line);
    const Ids expected{std::istream_iterator<int32_t>(numbers), std::istream_iterator<int32_t>()};
    EXPECT_EQ(tokenizer.encode(text.substr(at, end - at), false), expected)
        << text.substr(at, end - at);
    ++checked;
    at = end + separator.size();
  }
  EXPECT_EQ(checked, 47u);
}

TEST(GgufTokenizer, Gpt2FileGivesThePublishedIds) {
  LACUNA_NEEDS_DATA(file, "tokenizers/gguf/ggml-vocab-gpt-2.gguf");
  LACUNA_NEEDS_DATA(vectors, "tokenizers/vectors");
  const auto made = made_from(GgufFile::open(file).value());
  EXPECT_EQ(made.tokens, 50257);
  EXPECT_EQ(made.bos, 50256);
  EXPECT_THAT(made.eos, ElementsAre(50256));
  const auto tokenizer = open(made);
  expect_vectors(*tokenizer, vectors / "ggml-vocab-gpt-2.gguf.inp",
                 vectors / "ggml-vocab-gpt-2.gguf.out");
  EXPECT_EQ(tokenizer->encode("a<|endoftext|>", true), (Ids{64, 50256}));
}

TEST(GgufTokenizer, Llama2FileGivesThePublishedIdsAndMerges) {
  LACUNA_NEEDS_DATA(file, "tokenizers/gguf/ggml-vocab-llama-spm.gguf");
  LACUNA_NEEDS_DATA(vectors, "tokenizers/vectors");
  LACUNA_NEEDS_DATA(published, "tokenizers/llama2/tokenizer.json");
  const auto made = made_from(GgufFile::open(file).value());
  const auto tokenizer = open(made);
  expect_vectors(*tokenizer, vectors / "ggml-vocab-llama-spm.gguf.inp",
                 vectors / "ggml-vocab-llama-spm.gguf.out");
  EXPECT_EQ(tokenizer->encode("a</s>b", true), (Ids{1, 263, 2, 289}));
  EXPECT_EQ(tokenizer->decode({1, 15043, 3186}, true), "Hello world");
  const json ours = json::parse(made.tokenizer_json), theirs = json::parse(file_text(published));
  // Not EXPECT_EQ: nobody wants to see both lists.
  EXPECT_TRUE(ours["model"]["merges"] == theirs["model"]["merges"]);
  EXPECT_TRUE(ours["model"]["vocab"] == theirs["model"]["vocab"]);
  EXPECT_EQ(ours["normalizer"], theirs["normalizer"]);
  EXPECT_EQ(ours["decoder"], theirs["decoder"]);
  EXPECT_EQ(ours["post_processor"], theirs["post_processor"]);
}

TEST(GgufTokenizer, Qwen2VocabularyGivesThePublishedIds) {
  LACUNA_NEEDS_DATA(source, "tokenizers/qwen2");
  LACUNA_NEEDS_DATA(vectors, "tokenizers/vectors");
  const json vocabulary = json::parse(file_text(source / "vocab.json"));
  std::vector<std::string> tokens(vocabulary.size()), merges;
  for (const auto& [token, id] : vocabulary.items()) tokens.at(id.get<size_t>()) = token;
  std::istringstream lines(file_text(source / "merges.txt"));
  for (std::string line; std::getline(lines, line);)
    if (!line.empty() && !line.starts_with("#version")) merges.push_back(line);
  GgufBuilder file;
  file.put("tokenizer.ggml.model", "gpt2");
  file.put("tokenizer.ggml.pre", "qwen2");
  file.put("tokenizer.ggml.tokens", tokens);
  file.put("tokenizer.ggml.merges", merges);
  expect_vectors(*open(made_from(file)), vectors / "ggml-vocab-qwen2.gguf.inp",
                 vectors / "ggml-vocab-qwen2.gguf.out");
}

TEST(GgufTokenizer, PreDecidesHowTextIsSplit) {
  const auto pieces = [](const char* pre) {
    GgufBuilder file;
    put_byte_level_tokenizer(file, pre);
    const json tokenizer = json::parse(made_from(file).tokenizer_json);
    return std::pair(tokenizer["pre_tokenizer"].dump(), tokenizer["normalizer"].dump());
  };
  for (const char* pre : {"gpt-2", "default"})
    EXPECT_THAT(pieces(pre).first,
                AllOf(HasSubstr("\"use_regex\":true"), ::testing::Not(HasSubstr("Sequence"))));
  EXPECT_THAT(pieces("smollm").first, HasSubstr("\"individual_digits\":true"));
  EXPECT_THAT(pieces("llama-bpe").first, HasSubstr("{1,3}"));
  EXPECT_THAT(pieces("qwen2").first, AllOf(HasSubstr("Regex"), ::testing::Not(HasSubstr("{1,3}"))));
  EXPECT_THAT(pieces("qwen2").second, HasSubstr("NFC"));
  EXPECT_EQ(pieces("llama-bpe").second, "null");
}

TEST(GgufTokenizer, KindsOfTokensDecideHowTheyAreFoundAndShown) {
  GgufBuilder file;
  put_byte_level_tokenizer(file, "qwen2");
  const auto tokenizer = open(made_from(file));
  EXPECT_EQ(tokenizer->encode("he he<|end|><tool>", true), (Ids{256, 257, 259, 260}));
  EXPECT_EQ(tokenizer->decode({256, 257, 259, 260}, true), "he he<tool>");
  EXPECT_EQ(tokenizer->decode({258, 256, 259}, false), "<|start|>he<|end|>");
  EXPECT_EQ(tokenizer->bos(), 258);
  EXPECT_EQ(tokenizer->eos(), 259);
  EXPECT_EQ(tokenizer->token_id("[PAD261]"), std::nullopt);
  // Whatever the metadata name is special, even if its type doesn't say so.
  file.put("tokenizer.ggml.eot_token_id", uint32_t{260});
  const auto made = made_from(file);
  EXPECT_THAT(made.eos, ElementsAre(259, 260));
  EXPECT_EQ(open(made)->decode({256, 260}, true), "he");
  file.put("tokenizer.ggml.padding_token_id", 0xFFFFFFFFu);
  EXPECT_EQ(made_from(file).pad, std::nullopt);
}

TEST(GgufTokenizer, BeginAndEndAreAddedWhereTheFileOrItsKindSaysSo) {
  GgufBuilder file;
  const auto ids = [&] { return open(made_from(file))->encode("he", true); };
  put_byte_level_tokenizer(file, "qwen2");
  EXPECT_EQ(ids(), (Ids{256}));
  put_byte_level_tokenizer(file, "llama-bpe");
  EXPECT_EQ(ids(), (Ids{258, 256}));
  file.put("tokenizer.ggml.add_eos_token", true);
  EXPECT_EQ(ids(), (Ids{258, 256, 259}));
  file.put("tokenizer.ggml.add_bos_token", false);
  EXPECT_EQ(ids(), (Ids{256, 259}));
}

TEST(GgufTokenizer, TheChatTemplateComesAlong) {
  GgufBuilder file;
  put_byte_level_tokenizer(file, "smollm");
  file.put("tokenizer.chat_template", "{{ '<|im_start|>' }}{{ \"é\" }}");
  const json config = json::parse(made_from(file).tokenizer_config_json);
  EXPECT_EQ(config["chat_template"], "{{ '<|im_start|>' }}{{ \"é\" }}");
  file.put("tokenizer.chat_template", "\xff");
  EXPECT_THAT(refusal(file), AllOf(HasSubstr("F.gguf"), HasSubstr("tokenizer.chat_template")));
}

/// Pieces with scores, as SentencePiece numbers them.
GgufBuilder small_sentencepiece() {
  GgufBuilder file;
  file.put("tokenizer.ggml.model", "llama");
  file.put("tokenizer.ggml.tokens", std::vector<std::string>{"<unk>", "<s>", "</s>", "<0x41>", "a",
                                                             "b", "▁", "ab", "▁a", "▁ab"});
  file.put("tokenizer.ggml.token_type", std::vector<int32_t>{2, 3, 3, 6, 1, 1, 1, 1, 1, 1});
  file.put("tokenizer.ggml.scores", std::vector<float>{0, 0, 0, 0, -10, -11, -12, -1, -2, -3});
  file.put("tokenizer.ggml.bos_token_id", uint32_t{1});
  file.put("tokenizer.ggml.eos_token_id", uint32_t{2});
  return file;
}

TEST(GgufTokenizer, MergesFollowFromScores) {
  GgufBuilder file = small_sentencepiece();
  const auto made = made_from(file);
  const json model = json::parse(made.tokenizer_json)["model"];
  EXPECT_EQ(model["merges"], (json{"a b", "▁ a", "▁ ab", "▁a b"}));
  EXPECT_EQ(model["unk_token"], "<unk>");
  EXPECT_EQ(model["byte_fallback"], true);
  const auto tokenizer = open(made);
  EXPECT_EQ(tokenizer->encode("ab Ac", true), (Ids{1, 9, 6, 3, 0}));
  EXPECT_EQ(tokenizer->decode({1, 9, 6, 3}, true), "ab A");
  file.put("tokenizer.ggml.add_space_prefix", false);
  const auto without = open(made_from(file));
  EXPECT_EQ(without->encode("ab ab", true), (Ids{1, 7, 9}));
  EXPECT_EQ(without->decode({7, 9}, true), "ab ab");
}

TEST(GgufTokenizer, SentencePieceFilesThatContradictThemselvesAreRefusedByKey) {
  const auto broken = [](const auto& change) {
    GgufBuilder file = small_sentencepiece();
    change(file);
    return refusal(file);
  };
  using File = GgufBuilder;
  EXPECT_THAT(broken([](File& f) { f.erase("tokenizer.ggml.scores"); }),
              AllOf(HasSubstr("F.gguf: "), HasSubstr("tokenizer.ggml.scores"),
                    HasSubstr("got 0; need 10")));
  EXPECT_THAT(broken([](File& f) {
                std::vector<float> scores(10, 0.0f);
                scores[4] = std::numeric_limits<float>::quiet_NaN();
                f.put("tokenizer.ggml.scores", scores);
              }),
              AllOf(HasSubstr("tokenizer.ggml.scores"), HasSubstr("no number")));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.remove_extra_whitespaces", true); }),
              HasSubstr("remove_extra_whitespaces"));
  EXPECT_THAT(broken([](File& f) {
                f.put("tokenizer.ggml.tokens", std::vector<std::string>{std::string(5000, 'a')});
                f.put("tokenizer.ggml.token_type", std::vector<int32_t>{1});
                f.put("tokenizer.ggml.scores", std::vector<float>{1});
                f.erase("tokenizer.ggml.bos_token_id");
                f.erase("tokenizer.ggml.eos_token_id");
              }),
              AllOf(HasSubstr("token 0 is too long"), HasSubstr("got 5000")));
}

TEST(GgufTokenizer, ByteLevelFilesThatContradictThemselvesAreRefusedByKey) {
  const auto broken = [](const auto& change) {
    GgufBuilder file;
    put_byte_level_tokenizer(file, "qwen2");
    change(file);
    return refusal(file);
  };
  using File = GgufBuilder;
  using Texts = std::vector<std::string>;
  for (const char* key : {"tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.ggml.tokens",
                          "tokenizer.ggml.merges"})
    EXPECT_THAT(broken([&](File& f) { f.erase(key); }),
                AllOf(HasSubstr("F.gguf: "), HasSubstr(key)));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.model", "bert"); }),
              HasSubstr("got \"bert\"; need gpt2 or llama"));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.pre", "tekken"); }),
              AllOf(HasSubstr("got \"tekken\""), HasSubstr("smollm")));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.pre", uint32_t{1}); }),
              AllOf(HasSubstr("tokenizer.ggml.pre"), HasSubstr("got 1; need text")));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.tokens", uint32_t{1}); }),
              AllOf(HasSubstr("tokenizer.ggml.tokens"), HasSubstr("a list")));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.tokens", std::vector<float>{1}); }),
              AllOf(HasSubstr("tokenizer.ggml.tokens"), HasSubstr("a list of texts")));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.token_type", std::vector<int32_t>{1}); }),
              AllOf(HasSubstr("tokenizer.ggml.token_type"), HasSubstr("got 1; need 262")));
  EXPECT_THAT(broken([](File& f) {
                f.put("tokenizer.ggml.tokens", Texts{"a", "b", "a"});
                f.erase("tokenizer.ggml.token_type");
                f.erase("tokenizer.ggml.bos_token_id");
                f.erase("tokenizer.ggml.eos_token_id");
              }),
              HasSubstr("token 2 stands there twice (\"a\", also 0)"));
  EXPECT_THAT(broken([](File& f) {
                f.put("tokenizer.ggml.tokens", Texts{"a", "\xff"});
                f.erase("tokenizer.ggml.token_type");
                f.erase("tokenizer.ggml.bos_token_id");
                f.erase("tokenizer.ggml.eos_token_id");
              }),
              HasSubstr("token 1 is not UTF-8"));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.bos_token_id", uint32_t{262}); }),
              AllOf(HasSubstr("tokenizer.ggml.bos_token_id"), HasSubstr("got 262 of 262")));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.eos_token_id", "x"); }),
              HasSubstr("tokenizer.ggml.eos_token_id"));
  EXPECT_THAT(broken([](File& f) {
                f.erase("tokenizer.ggml.bos_token_id");
                f.put("tokenizer.ggml.add_bos_token", true);
              }),
              HasSubstr("needs \"tokenizer.ggml.bos_token_id\""));
  EXPECT_THAT(broken([](File& f) { f.put("tokenizer.ggml.add_eos_token", uint32_t{1}); }),
              AllOf(HasSubstr("tokenizer.ggml.add_eos_token"), HasSubstr("true or false")));
  EXPECT_THAT(broken([](File& f) {
                f.put("tokenizer.ggml.merges", Texts{"h e", "he"});
              }),
              AllOf(HasSubstr("F.gguf"), HasSubstr("merge 1")));
  EXPECT_THAT(broken([](File& f) {
                f.put("tokenizer.ggml.merges", Texts{"h e", "e h"});
              }),
              AllOf(HasSubstr("F.gguf"), HasSubstr("merge 1"), HasSubstr("\"eh\"")));
  EXPECT_THAT(broken([](File& f) {
                f.put("tokenizer.ggml.merges", Texts{"h e", "\xff \xff"});
              }),
              AllOf(HasSubstr("tokenizer.ggml.merges"), HasSubstr("merge 1 is not UTF-8")));
}

}  // namespace
}  // namespace lacuna::io
