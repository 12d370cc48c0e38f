// Perplexity: its definition, its protocols, and the numbers of transformers.
#include "lacuna/eval/perplexity.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstdlib>

#include "lacuna/io/file.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::eval {
namespace {
using ::testing::HasSubstr;
using testing::must;

std::filesystem::path demo_folder() { return testing::source_folder() / "examples/demo-model"; }

struct Demo {
  model::Decoder decoder = testing::open_decoder(demo_folder());
  std::shared_ptr<const io::Tokenizer> tokenizer = must(io::Tokenizer::open(demo_folder()));
  std::vector<int32_t> ids;
  Demo() {
    const auto golden =
        testing::read_json(testing::source_folder() / "tests/golden/demo-5m-reference.json");
    for (int copy = 0; copy < 6; ++copy)
      for (const int32_t id : golden["greedy_64_ids"]) ids.push_back((id + copy) % 4096);
  }
};

const Demo& demo() {
  static const Demo held;
  return held;
}

/// Mean NLL of positions 1 .. L-1 of one window, straight from the logits.
double window_nll(const model::Decoder& decoder, const std::vector<int32_t>& ids, size_t first,
                  size_t length) {
  const std::vector<int32_t> window(ids.begin() + static_cast<std::ptrdiff_t>(first),
                                    ids.begin() + static_cast<std::ptrdiff_t>(first + length));
  const at::Tensor log_p =
      at::log_softmax(decoder.forward(testing::ids_tensor(window))[0].to(at::kDouble), -1);
  double sum = 0;
  for (size_t i = 1; i < length; ++i)
    sum -= log_p[static_cast<int64_t>(i - 1)][window[i]].item<double>();
  return sum / static_cast<double>(length - 1);
}

TEST(Perplexity, IsTheExponentOfTheMeanOverWindows) {
  const auto& [decoder, tokenizer, ids] = demo();
  const auto report = must(perplexity(decoder, ids, {.length = 100}));
  ASSERT_EQ(report.windows, 3);  // 384 tokens; the tail is dropped
  EXPECT_EQ(report.tokens, 384);
  double sum = 0, squares = 0;
  for (size_t w = 0; w < 3; ++w) sum += window_nll(decoder, ids, 100 * w, 100);
  for (size_t w = 0; w < 3; ++w)
    squares += std::pow(window_nll(decoder, ids, 100 * w, 100) - sum / 3, 2);
  EXPECT_NEAR(report.mean_nll, sum / 3, 1e-5);
  EXPECT_NEAR(report.perplexity, std::exp(sum / 3), 1e-4 * report.perplexity);
  EXPECT_NEAR(report.std_error.value(), report.perplexity * std::sqrt(squares / 2 / 3),
              1e-3 * *report.std_error);
}

TEST(Perplexity, LooksAtWindowsSpreadEvenly) {
  const auto& [decoder, tokenizer, ids] = demo();
  const auto report = must(perplexity(decoder, ids, {.length = 50, .windows = 3}));
  ASSERT_EQ(report.windows, 3);  // of 7: numbers 0, 2 and 4
  const double expected = (window_nll(decoder, ids, 0, 50) + window_nll(decoder, ids, 100, 50) +
                           window_nll(decoder, ids, 200, 50)) /
                          3;
  EXPECT_NEAR(report.mean_nll, expected, 1e-5);
}

TEST(Perplexity, IsTheSameInBatches) {
  const auto& [decoder, tokenizer, ids] = demo();
  const double one = must(perplexity(decoder, ids, {.length = 48})).mean_nll;
  const double three = must(perplexity(decoder, ids, {.length = 48, .batch = 3})).mean_nll;
  EXPECT_NEAR(one, three, 1e-5);
}

TEST(Perplexity, ComparesWithAReference) {
  const auto& [decoder, tokenizer, ids] = demo();
  const auto coarse = testing::open_decoder(demo_folder(), at::kBFloat16);
  const auto report = must(perplexity(coarse, ids, {.length = 64}, &decoder));
  ASSERT_TRUE(report.kl.has_value());
  EXPECT_GT(report.kl->kl_mean, 0);
  EXPECT_LT(report.kl->kl_mean, 0.01);
  EXPECT_GT(report.kl->same_top, 0.95);
  const double dense = must(perplexity(decoder, ids, {.length = 64})).perplexity;
  EXPECT_NEAR(report.kl->perplexity_reference, dense, 1e-4 * dense);
  EXPECT_NEAR(report.kl->ppl_delta, report.perplexity - dense, 1e-3 * dense);
}

TEST(Perplexity, RefusesWhatItCantScore) {
  const auto& [decoder, tokenizer, ids] = demo();
  const auto message = [&](const std::vector<int32_t>& text, const PerplexityOptions& options) {
    const auto report = perplexity(decoder, text, options);
    return report.ok() ? "accepted" : report.error().message;
  };
  EXPECT_THAT(message(ids, {.length = 1}), HasSubstr("at least 2 tokens (got 1)"));
  EXPECT_THAT(message(ids, {.length = 1 << 20}), HasSubstr("longer than the model's positions"));
  EXPECT_THAT(message({1, 2, 3}, {.length = 64}), HasSubstr("got 3 tokens; need 64"));
  std::vector<int32_t> foreign = ids;
  foreign[7] = 4096;
  EXPECT_THAT(message(foreign, {.length = 64}), HasSubstr("token 7 of the text"));
}

TEST(EvaluationIds, FollowTheProtocol) {
  const auto& tokenizer = *demo().tokenizer;
  const auto file = testing::scratch_folder("protocol") / "text.txt";
  must(io::write_text(file, " = Title = \n \n First line. \n\t\nSecond line. \n"));
  EXPECT_EQ(must(evaluation_ids(file.string(), Protocol::kRawFile, tokenizer)),
            tokenizer.encode(" = Title = \n \n First line. \n\t\nSecond line. \n", false));
  // Rows keep their line ends, blank rows are empty, and "\n\n" stands between all of them.
  EXPECT_EQ(must(evaluation_ids(file.string(), Protocol::kHfRows, tokenizer)),
            tokenizer.encode(" = Title = \n\n\n\n\n First line. \n\n\n\n\nSecond line. \n", true));
  const auto documents = testing::scratch_folder("protocol") / "rows.jsonl";
  must(io::write_text(documents, "{\"text\": \"One\"}\n{\"text\": \"Two\"}\n"));
  EXPECT_EQ(must(evaluation_ids(documents.string(), Protocol::kRawFile, tokenizer)),
            tokenizer.encode("One\nTwo", false));
  EXPECT_EQ(must(evaluation_ids(documents.string(), Protocol::kHfRows, tokenizer)),
            tokenizer.encode("One\n\nTwo", true));
}

TEST(Protocol, IsKnownByItsName) {
  EXPECT_EQ(must(parse_protocol("raw-file")), Protocol::kRawFile);
  EXPECT_EQ(must(parse_protocol("hf-rows")), Protocol::kHfRows);
  EXPECT_THAT(parse_protocol("c4").error().message, HasSubstr("got c4"));
}

// --- The numbers of transformers -----------------------------------------------------------------

/// What transformers 5.24 says in float32 of so many windows, evenly spread over WikiText-2 test
/// (tools/golden/perplexity.py);
/// of all of them where none is given, from the model's reference.json.
struct Trained {
  const char* model;
  int64_t length;
  int64_t windows = 0;
  double perplexity = 0;
};

class WikiText : public ::testing::TestWithParam<Trained> {};

TEST_P(WikiText, HasThePerplexityOfTransformers) {
  if (std::getenv("LACUNA_SANITIZED")) GTEST_SKIP() << "minutes under a sanitizer";
  const auto [name, length, windows, given] = GetParam();
  LACUNA_NEEDS_DATA(folder, std::string("models/") + name);
  LACUNA_NEEDS_DATA(text, "text/wikitext-2/wiki.test.raw");
  const auto reference = testing::read_json(folder / "reference.json")["wikitext2_raw_test"];
  const auto tokenizer = must(io::Tokenizer::open(folder));
  const auto ids = must(evaluation_ids(text.string(), Protocol::kRawFile, *tokenizer));
  EXPECT_EQ(ids.size(), reference["tokens"].get<size_t>());
  const auto report = must(perplexity(testing::open_decoder(folder), ids,
                                      {.length = length, .windows = windows, .batch = 2}));
  const auto whole = "ppl_L" + std::to_string(length) + "_fp32";
  EXPECT_NEAR(report.perplexity, windows > 0 ? given : reference[whole].get<double>(), 0.01);
}

// `lacuna eval` gives those of the whole file (docs/results/quality.md), which take minutes.
INSTANTIATE_TEST_SUITE_P(Models, WikiText,
                         ::testing::Values(Trained{"demo-5m", 512},
                                           Trained{"demo-5m", 1024, 48, 32.214929},
                                           Trained{"demo-5m", 2048, 24, 29.614436},
                                           Trained{"lab-16m", 2048, 24, 48.250303},
                                           Trained{"lab-relu2-16m", 512, 96, 46.738708}),
                         [](const auto& test) {
                           std::string label = test.param.model;
                           for (char& c : label)
                             if (c == '-') c = '_';
                           return label + "_" + std::to_string(test.param.length);
                         });

}  // namespace
}  // namespace lacuna::eval
