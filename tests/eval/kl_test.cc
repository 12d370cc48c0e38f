// KL divergence and its relatives, against their definitions in float64.
#include "lacuna/eval/kl.h"

#include <gtest/gtest.h>

#include <cmath>

namespace lacuna::eval {
namespace {

at::Tensor row(std::initializer_list<float> values) {
  return at::tensor(at::ArrayRef<float>(values.begin(), values.size())).unsqueeze(0);
}

TEST(TokenNll, IsTheNegativeLogProbabilityOfTheTarget) {
  const at::Tensor logits = row({1.0f, 2.0f, 4.0f});
  const double normaliser = std::exp(1.0) + std::exp(2.0) + std::exp(4.0);
  for (int64_t target = 0; target < 3; ++target) {
    const double expected = -std::log(std::exp(logits[0][target].item<double>()) / normaliser);
    EXPECT_NEAR(token_nll(logits, at::tensor({target}, at::kLong)).item<double>(), expected, 1e-6);
  }
}

TEST(KlCollector, FindsNothingBetweenEqualModels) {
  at::manual_seed(1);
  const at::Tensor logits = at::randn({50, 30});
  KlCollector collector;
  collector.add(logits, logits + 3.0, at::randint(30, {50}, at::kLong));  // a shift changes nothing
  const KlStatistics statistics = collector.statistics();
  EXPECT_NEAR(statistics.kl_mean, 0, 1e-6);
  EXPECT_NEAR(statistics.kl_max, 0, 1e-5);
  EXPECT_EQ(statistics.same_top, 1.0);
  EXPECT_NEAR(statistics.delta_p_rms, 0, 1e-6);
}

TEST(KlCollector, GivesTheDivergenceOfTheReferenceFromTheModel) {
  // p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL(p || q) = 1/2 ln 2 + 0 - 1/4 ln 2 = 1/4 ln 2.
  const at::Tensor p = row({std::log(2.0f), 0, 0}), q = row({0, 0, std::log(2.0f)});
  KlCollector collector;
  collector.add(/*model=*/q, /*reference=*/p, at::tensor({0}, at::kLong));
  KlStatistics statistics = collector.statistics();
  EXPECT_NEAR(statistics.kl_mean, 0.25 * std::log(2.0), 1e-6);
  EXPECT_NEAR(statistics.delta_p_mean, 0.25 - 0.5, 1e-6);
  EXPECT_EQ(statistics.same_top, 0.0);

  // The other way round it is another number: q = (1/2, 1/4, 1/4), p = (1/8, 1/8, 3/4).
  const at::Tensor sharp = row({0, 0, std::log(6.0f)});
  KlCollector other;
  other.add(/*model=*/p, /*reference=*/sharp, at::tensor({2}, at::kLong));
  const double expected = 0.125 * std::log(0.25) + 0.125 * std::log(0.5) + 0.75 * std::log(3.0);
  EXPECT_NEAR(other.statistics().kl_mean, expected, 1e-6);
  EXPECT_NEAR(other.statistics().delta_p_mean, 0.25 - 0.75, 1e-6);
}

TEST(KlCollector, SummarisesManyTokens) {
  at::manual_seed(2);
  const at::Tensor model = at::randn({101, 20}), reference = at::randn({101, 20});
  const at::Tensor targets = at::randint(20, {101}, at::kLong);
  KlCollector whole, parts;
  whole.add(model, reference, targets);
  parts.add(model.narrow(0, 0, 37), reference.narrow(0, 0, 37), targets.narrow(0, 0, 37));
  parts.add(model.narrow(0, 37, 64), reference.narrow(0, 37, 64), targets.narrow(0, 37, 64));
  const at::Tensor log_p = at::log_softmax(reference.to(at::kDouble), -1);
  const at::Tensor log_q = at::log_softmax(model.to(at::kDouble), -1);
  const at::Tensor kl = std::get<0>((log_p.exp() * (log_p - log_q)).sum(-1).sort());
  for (const KlCollector* collector : {&whole, &parts}) {
    const KlStatistics statistics = collector->statistics();
    EXPECT_NEAR(statistics.kl_mean, kl.mean().item<double>(), 1e-6);
    EXPECT_NEAR(statistics.kl_stderr, kl.std().item<double>() / std::sqrt(101.0), 1e-6);
    // Of 101 sorted values, the quantiles are elements: no interpolation to get right by accident.
    EXPECT_NEAR(statistics.kl_median, kl[50].item<double>(), 1e-6);
    EXPECT_NEAR(statistics.kl_p10, kl[10].item<double>(), 1e-6);
    EXPECT_NEAR(statistics.kl_p90, kl[90].item<double>(), 1e-6);
    EXPECT_NEAR(statistics.kl_p99, kl[99].item<double>(), 1e-6);
    EXPECT_NEAR(statistics.kl_max, kl[100].item<double>(), 1e-6);
    EXPECT_NEAR(statistics.same_top,
                model.argmax(-1).eq(reference.argmax(-1)).to(at::kDouble).mean().item<double>(),
                1e-12);
  }
}

}  // namespace
}  // namespace lacuna::eval
