// Trained models against the numbers that Hugging Face transformers gave for them.
#include "lacuna/model/generate.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using testing::must;

void expect_logits(const at::Tensor& logits, const std::vector<int64_t>& ids,
                   const std::vector<double>& expected) {
  const double largest = std::abs(expected.front());
  const at::Tensor top = std::get<1>(logits.topk(static_cast<int64_t>(ids.size())));
  for (size_t i = 0; i < ids.size(); ++i) {
    EXPECT_EQ(top[static_cast<int64_t>(i)].item<int64_t>(), ids[i]) << "place " << i;
    EXPECT_NEAR(logits[ids[i]].item<double>(), expected[i], 1e-4 * largest) << "token " << ids[i];
  }
}

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
  const at::Tensor logits = decoder.forward(testing::ids_tensor(ids), nullptr, true).view({-1});
  expect_logits(logits, top_ids, top_logits);

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
