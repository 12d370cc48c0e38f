#include <gtest/gtest.h>

#include <cmath>
#include <set>

#include "lacuna/model/generate.h"

namespace lacuna::model {
namespace {

/// Logits whose softmax at temperature 1 is exactly these shares.
at::Tensor logits_of(const std::vector<double>& shares) {
  at::Tensor logits = at::empty({static_cast<int64_t>(shares.size())});
  for (size_t i = 0; i < shares.size(); ++i) logits[static_cast<int64_t>(i)] = std::log(shares[i]);
  return logits;
}

/// How often each of `vocab` tokens comes in `draws` draws.
std::vector<double> frequencies(const at::Tensor& logits, const GenerateOptions& options,
                                int draws = 20000) {
  std::vector<double> counts(static_cast<size_t>(logits.size(0)));
  for (int i = 0; i < draws; ++i)
    counts[static_cast<size_t>(sample(logits, {}, options, static_cast<uint64_t>(i)))] +=
        1.0 / draws;
  return counts;
}

void expect_close(const std::vector<double>& got, const std::vector<double>& expected) {
  for (size_t i = 0; i < expected.size(); ++i) {
    if (expected[i] == 0)
      EXPECT_EQ(got[i], 0) << "token " << i;
    else
      EXPECT_NEAR(got[i], expected[i], 0.015) << "token " << i;  // four deviations of 20,000 draws
  }
}

const std::vector<double> kShares = {0.1, 0.4, 0.2, 0.05, 0.25};

TEST(Sample, IsGreedyAtTemperatureZero) {
  EXPECT_EQ(sample(logits_of(kShares), {}, {}, 0), 1);
  EXPECT_EQ(sample(logits_of({0.2, 0.3, 0.3, 0.2}), {}, {}, 0), 1) << "of equals the lower id";
}

TEST(Sample, DrawsByProbability) {
  expect_close(frequencies(logits_of(kShares), {.temperature = 1}), kShares);
}

TEST(Sample, SharpensWithTemperature) {
  // Squares: 0.01, 0.16, 0.04, 0.0025, 0.0625 of 0.275.
  expect_close(frequencies(logits_of(kShares), {.temperature = 0.5}),
               {0.0364, 0.5818, 0.1455, 0.0091, 0.2273});
}

TEST(Sample, KeepsTheTopK) {
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_k = 2}),
               {0, 0.4 / 0.65, 0, 0, 0.25 / 0.65});
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_k = 1}), {0, 1, 0, 0, 0});
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_k = 9}), kShares);
}

TEST(Sample, KeepsTheSmallestSetThatReachesTopP) {
  // 0.4 + 0.25 = 0.65 falls short of 0.7; with 0.2 it is 0.85.
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_p = 0.7}),
               {0, 0.4 / 0.85, 0.2 / 0.85, 0, 0.25 / 0.85});
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_p = 0.3}), {0, 1, 0, 0, 0});
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_p = 0}), {0, 1, 0, 0, 0});
}

TEST(Sample, DropsWhatIsBelowMinPOfTheLargest) {
  // 0.3 x 0.4 = 0.12: 0.1 and 0.05 go.
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .min_p = 0.3}),
               {0, 0.4 / 0.85, 0.2 / 0.85, 0, 0.25 / 0.85});
}

TEST(Sample, AppliesTopPToWhatTopKLeft) {
  // top-k 3 leaves 0.4, 0.25, 0.2 of 0.85; 0.4 / 0.85 = 0.47 falls short of 0.6, with 0.25 it is
  // 0.76.
  expect_close(frequencies(logits_of(kShares), {.temperature = 1, .top_k = 3, .top_p = 0.6}),
               {0, 0.4 / 0.65, 0, 0, 0.25 / 0.65});
}

TEST(Sample, PenalisesTokensAlreadyPresentOnce) {
  const at::Tensor logits = at::tensor({2.0f, 1.5f, -1.0f, -1.2f});
  EXPECT_EQ(sample(logits, {}, {.repetition_penalty = 2}, 0), 0);
  EXPECT_EQ(sample(logits, {0, 0, 0}, {.repetition_penalty = 1.3}, 0), 0) << "2 / 1.3 = 1.54";
  EXPECT_EQ(sample(logits, {0}, {.repetition_penalty = 1.4}, 0), 1) << "2 / 1.4 = 1.43";
  const at::Tensor negative = at::tensor({-1.0f, -1.2f});
  EXPECT_EQ(sample(negative, {0}, {.repetition_penalty = 1.3}, 0), 1) << "-1 x 1.3 = -1.3";
}

TEST(Sample, DependsOnSeedAndPositionAlone) {
  const at::Tensor logits = logits_of(std::vector<double>(50, 0.02));
  std::set<std::vector<int32_t>> sequences;
  for (const uint64_t seed : {1, 2, 3, 1}) {
    std::vector<int32_t> ids;
    for (uint64_t position = 0; position < 20; ++position)
      ids.push_back(sample(logits, {}, {.temperature = 1, .seed = seed}, position));
    EXPECT_GT(std::set<int32_t>(ids.begin(), ids.end()).size(), 5u);
    sequences.insert(ids);
  }
  EXPECT_EQ(sequences.size(), 3u) << "seed 1 gives the same twice";
}

}  // namespace
}  // namespace lacuna::model
