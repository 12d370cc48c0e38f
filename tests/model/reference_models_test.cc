// Trained models against the numbers that Hugging Face transformers gave for them.
#include "lacuna/model/generate.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using testing::must;

class LabModel : public ::testing::TestWithParam<const char*> {};

TEST_P(LabModel, GivesTheLogitsAndGreedyTokensOfTransformers) {
  LACUNA_NEEDS_DATA(folder, std::string("models/") + GetParam());
  const auto reference = testing::read_json(folder / "reference.json");
  const Decoder decoder = testing::open_decoder(folder);
  const auto tokenizer = must(io::Tokenizer::open(folder));
  const std::vector<int32_t> ids = reference["prompt_ids"];
  EXPECT_EQ(tokenizer->encode(reference["prompt"].get<std::string>(), true), ids);

  std::vector<int64_t> top_ids;
  std::vector<double> top_logits;
  for (const auto& pair : reference["last_logits_top10"]) {
    top_ids.push_back(pair[0]);
    top_logits.push_back(pair[1]);
  }
  testing::expect_top_logits(testing::last_logits(decoder, ids), top_ids, top_logits);

  const auto generation =
      must(generate(decoder, *tokenizer, ids, {.max_new_tokens = 64, .ignore_eos = true}));
  EXPECT_EQ(generation.token_ids, reference["greedy_64_ids"].get<std::vector<int32_t>>());
  EXPECT_EQ(generation.text, reference["greedy_64_text"].get<std::string>());
}

INSTANTIATE_TEST_SUITE_P(Trained, LabModel,
                         ::testing::Values("lab-16m", "lab-relu2-16m", "demo-5m"),
                         [](const auto& test) {
                           std::string name = test.param;
                           std::replace(name.begin(), name.end(), '-', '_');
                           return name;
                         });

}  // namespace
}  // namespace lacuna::model
