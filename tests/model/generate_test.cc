#include "lacuna/model/generate.h"

#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using testing::must;

class Generate : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto folder = testing::demo_model_folder();
    tokenizer_ = must(io::Tokenizer::open(folder));
    decoder_ = testing::open_decoder(folder);
    prompt_ = tokenizer_->encode("The history of the city began when", true);
  }

  Generation run(const GenerateOptions& options, std::string* streamed = nullptr) const {
    std::string pieces;
    const Generation generation =
        must(generate(decoder_, *tokenizer_, prompt_, options, [&](std::string_view piece) {
          EXPECT_FALSE(piece.empty());
          pieces += piece;
        }));
    EXPECT_EQ(pieces, generation.text);
    if (streamed != nullptr) *streamed = pieces;
    return generation;
  }

  std::shared_ptr<const io::Tokenizer> tokenizer_;
  Decoder decoder_;
  std::vector<int32_t> prompt_;
};

TEST_F(Generate, StreamsTheTextOfItsTokens) {
  for (const uint64_t seed : {1, 2, 3}) {
    const Generation generation =
        run({.max_new_tokens = 40, .temperature = 1.5, .ignore_eos = true, .seed = seed});
    EXPECT_EQ(generation.token_ids.size(), 40u);
    EXPECT_EQ(generation.finish_reason, "length");
    EXPECT_EQ(generation.text, tokenizer_->decode(generation.token_ids, /*skip_special=*/true));
  }
}

TEST_F(Generate, GivesTheSameTokensForTheSameSeed) {
  const GenerateOptions options{.max_new_tokens = 24, .temperature = 1, .seed = 5};
  const auto first = run(options).token_ids;
  EXPECT_EQ(first, run(options).token_ids);
  GenerateOptions other = options;
  other.seed = 6;
  EXPECT_NE(first, run(other).token_ids);
}

TEST_F(Generate, EndsBeforeAStopTextThatSpansTokens) {
  const std::string text = run({.max_new_tokens = 24}).text;
  ASSERT_GT(text.size(), 20u);
  const std::string stop = text.substr(9, 7);
  const Generation stopped = run({.max_new_tokens = 24, .stop = {"no such text", stop}});
  EXPECT_EQ(stopped.text, text.substr(0, text.find(stop)));
  EXPECT_EQ(stopped.finish_reason, "stop");
  EXPECT_LT(stopped.token_ids.size(), 24u);
}

TEST_F(Generate, SendsHeldBackTextWhenTheStopTextNeverComes) {
  const std::string text = run({.max_new_tokens = 12}).text;
  // The whole text is the beginning of this stop text, so all of it waits until the end.
  const Generation whole = run({.max_new_tokens = 12, .stop = {text + "#"}});
  EXPECT_EQ(whole.text, text);
  EXPECT_EQ(whole.finish_reason, "length");
}

TEST_F(Generate, EndsAtTheEndOfTextUnlessToldToGoOn) {
  const Generation greedy = run({.max_new_tokens = 4});
  // The greedy first token stands in for the end-of-text token.
  std::filesystem::path folder = testing::scratch_folder("eos");
  const auto source = testing::demo_model_folder();
  for (const auto& entry : std::filesystem::directory_iterator(source))
    if (entry.path().filename() != "generation_config.json")
      std::filesystem::copy(entry.path(), folder / entry.path().filename());
  auto config = testing::read_json(folder / "config.json");
  config["eos_token_id"] = greedy.token_ids[1];
  std::ofstream(folder / "config.json") << config;
  decoder_ = testing::open_decoder(folder);
  const Generation ended = run({.max_new_tokens = 4});
  EXPECT_EQ(ended.finish_reason, "stop");
  EXPECT_EQ(ended.token_ids,
            std::vector<int32_t>(greedy.token_ids.begin(), greedy.token_ids.begin() + 2));
  EXPECT_EQ(run({.max_new_tokens = 4, .ignore_eos = true}).token_ids, greedy.token_ids);
}

TEST_F(Generate, StopsWhenInterrupted) {
  std::atomic<bool> interrupted = false;
  int pieces = 0;
  const Generation generation = must(generate(
      decoder_, *tokenizer_, prompt_, {.max_new_tokens = 50},
      [&](std::string_view) { interrupted = ++pieces == 3; }, &interrupted));
  EXPECT_EQ(generation.finish_reason, "interrupted");
  EXPECT_LT(generation.token_ids.size(), 50u);
}

TEST_F(Generate, RefusesPromptsThatCannotBe) {
  const auto code = [&](const std::vector<int32_t>& ids) {
    const auto result = generate(decoder_, *tokenizer_, ids, {});
    return result.ok() ? Code{} : result.error().code;
  };
  EXPECT_EQ(code({}), Code::kBadInput);
  EXPECT_EQ(code({5, 4096}), Code::kBadInput);
  EXPECT_EQ(code({5, -1}), Code::kBadInput);
  EXPECT_EQ(code(std::vector<int32_t>(static_cast<size_t>(decoder_.spec().max_positions) + 1, 5)),
            Code::kBadInput);
}

TEST_F(Generate, EndsAtTheModelsLastPosition) {
  prompt_.assign(static_cast<size_t>(decoder_.spec().max_positions) - 3, 300);
  const Generation generation = run({.max_new_tokens = 50, .ignore_eos = true});
  EXPECT_EQ(generation.token_ids.size(), 4u) << "the last one is not fed back";
  EXPECT_EQ(generation.finish_reason, "length");
}

TEST_F(Generate, MeasuresTheFirstTokenApart) {
  const Generation one = run({.max_new_tokens = 1});
  EXPECT_GT(one.ttft_ms, 0);
  EXPECT_EQ(one.tpot_ms, 0);
  const Generation more = run({.max_new_tokens = 8});
  EXPECT_GT(more.tpot_ms, 0);
  EXPECT_DOUBLE_EQ(more.tokens_per_second, 1000 / more.tpot_ms);
}

}  // namespace
}  // namespace lacuna::model
