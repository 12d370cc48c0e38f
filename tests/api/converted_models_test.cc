// Models of other programs, converted by us, against the numbers of independent forward passes.
#include <cstdlib>
#include <map>

#include "lacuna/api/jobs.h"
#include "lacuna/eval/kl.h"
#include "lacuna/eval/perplexity.h"
#include "lacuna/io/tokenizer/chat_template.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::api {
namespace {
namespace fs = std::filesystem;
using nlohmann::json;
using testing::must;

/// Converts into a scratch folder, once for all tests.
fs::path converted(const fs::path& model) {
  static std::map<fs::path, fs::path> done;
  fs::path& folder = done[model];
  if (folder.empty()) {
    folder = testing::scratch_folder("converted") / "model";
    must(convert(model, folder));
  }
  return folder;
}

// --- llama2.c ------------------------------------------------------------------------------------

class Llama2c : public ::testing::TestWithParam<std::pair<const char*, const char*>> {};

TEST_P(Llama2c, ReproducesItsReference) {
  const auto& [folder_name, file_name] = GetParam();
  LACUNA_NEEDS_DATA(source, fmt::format("models/{}/{}", folder_name, file_name));
  const json reference = testing::read_json(source.parent_path() / "reference.json");
  const fs::path folder = converted(source);
  const model::Decoder decoder = testing::open_decoder(folder);
  const auto tokenizer = must(io::Tokenizer::open(folder));

  const auto expect_logits = [&](const std::vector<int32_t>& ids, const char* key) {
    const std::vector<double> expected = reference[key];
    EXPECT_LE(testing::relative_difference(testing::last_logits(decoder, ids),
                                           at::tensor(at::ArrayRef<double>(expected), at::kDouble)),
              1e-5)
        << key;
  };
  expect_logits({1}, "logits_after_bos");
  expect_logits(reference["prompt16"], "logits_after_prompt16");

  const auto generation =
      must(model::generate(decoder, *tokenizer, {1}, {.max_new_tokens = 200, .ignore_eos = true}));
  EXPECT_EQ(generation.token_ids, reference["greedy_from_bos_200"].get<std::vector<int32_t>>());

  const json& records = reference["tinystories_nll"]["docs"];
  double sum = 0, expected_sum = 0;
  int64_t tokens = 0;
  for (const json& record : records) {
    const std::vector<int32_t> ids = record["ids"];
    const at::Tensor all = testing::ids_tensor(ids);
    const at::Tensor logits = decoder.forward(all)[0].narrow(0, 0, all.size(1) - 1);
    sum += eval::token_nll(logits, all[0].narrow(0, 1, all.size(1) - 1))
               .to(at::kDouble)
               .sum()
               .item<double>();
    expected_sum += record["nll_nats"].get<double>();
    tokens += all.size(1) - 1;
  }
  EXPECT_NEAR(sum / static_cast<double>(tokens), expected_sum / static_cast<double>(tokens), 1e-4);
}

INSTANTIATE_TEST_SUITE_P(Models, Llama2c,
                         ::testing::Values(std::pair("stories260K", "stories260K.bin"),
                                           std::pair("babyllama-tok105", "model5000.bin")),
                         [](const auto& test) {
                           return std::string(test.param.first).substr(0, 7);
                         });

// --- SmolLM2 from its GGUF file ------------------------------------------------------------------

class SmolLm2 : public ::testing::Test {
 protected:
  void SetUp() override {
    if (std::getenv("LACUNA_SANITIZED")) GTEST_SKIP() << "the demo model stands for the model tier";
    LACUNA_NEEDS_CACHE(gguf, "models/SmolLM2-135M-Instruct.Q4_1.gguf");
    LACUNA_NEEDS_DATA(reference, "models/smollm2-135m/reference.json");
    folder_ = converted(gguf);
    reference_ = testing::read_json(reference);
  }
  fs::path folder_;
  json reference_;
};

TEST_F(SmolLm2, AnswersEveryPromptAsTransformersDoes) {
  const model::Decoder decoder = testing::open_decoder(folder_);
  const auto tokenizer = must(io::Tokenizer::open(folder_));
  const auto chat = must(io::ChatTemplate::open(folder_));
  for (const json& prompt : reference_["prompts"]) {
    const std::string text = prompt.contains("chat_user")
                                 ? chat.render({{"user", prompt["chat_user"]}})
                                 : prompt["text"].get<std::string>();
    EXPECT_EQ(text, prompt["text"].get<std::string>());
    const std::vector<int32_t> ids = tokenizer->encode(text, false);
    ASSERT_EQ(ids, prompt["ids"].get<std::vector<int32_t>>()) << text;

    testing::expect_top_logits(testing::last_logits(decoder, ids), prompt["top10_ids"],
                               prompt["top10_logits"], " of " + text);
    const auto generation = must(model::generate(decoder, *tokenizer, ids, {.max_new_tokens = 64}));
    EXPECT_EQ(generation.token_ids, prompt["greedy_64_ids"].get<std::vector<int32_t>>()) << text;
  }
}

TEST_F(SmolLm2, HasItsPerplexityOnWikiText) {
  LACUNA_NEEDS_DATA(text, "text/wikitext-2/wiki.test.raw");
  const auto tokenizer = must(io::Tokenizer::open(folder_));
  const auto ids = must(eval::evaluation_ids(text.string(), eval::Protocol::kRawFile, *tokenizer));
  EXPECT_EQ(ids.size(), reference_["wikitext2_ids"]["tokens"].get<size_t>());
  const auto report =
      must(eval::perplexity(testing::open_decoder(folder_), ids, {.length = 512, .windows = 8}));
  // Ours, recorded once. All 148 windows of 2,048 (on a GPU) gave 21.76356; transformers 21.76355.
  EXPECT_NEAR(report.perplexity, 29.9038, 0.01);
}

}  // namespace
}  // namespace lacuna::api
