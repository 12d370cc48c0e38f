#include "lacuna/prune/allocation.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <numeric>

#include "lacuna/core/random.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using testing::correlated_inputs;
using ::testing::HasSubstr;
using testing::random_matrix;
using testing::statistics_of;

/// Layers of blocks in pairs, one larger than the other.
std::vector<LayerShare> some_shares(int64_t blocks, int64_t step = 1) {
  std::vector<LayerShare> shares;
  for (int64_t block = 0; block < blocks; ++block)
    for (const int64_t rows : {24, 56}) {
      LayerShare share{fmt::format("{}.{}", block, rows), block, rows, 40, step > 1 ? rows : 1};
      share.outliers = 1 + static_cast<double>(block * block);
      share.half_error = 0.1 + 0.02 * static_cast<double>(block);
      const double scale = random_uniform(5, 0, static_cast<uint64_t>(shares.size())) + 0.2;
      for (const double s : kCurveSparsities)
        share.squared_errors.push_back(scale * std::pow(s, 2 + scale));
      shares.push_back(std::move(share));
    }
  return shares;
}

LayerCost kept_weights(const std::vector<LayerShare>& shares) {
  return [&shares](size_t layer, double sparsity) {
    return static_cast<double>(shares[layer].weights()) * (1 - sparsity);
  };
}

double total(const LayerCost& cost, const std::vector<double>& sparsities) {
  double sum = 0;
  for (size_t i = 0; i < sparsities.size(); ++i) sum += cost(i, sparsities[i]);
  return sum;
}

constexpr Allocation kAll[] = {Allocation::kUniform, Allocation::kOwl, Allocation::kError,
                               Allocation::kCurves};

TEST(Allocation, IsFoundByName) {
  for (const Allocation each : kAll) EXPECT_EQ(*parse_allocation(allocation_name(each)), each);
  const auto unknown = parse_allocation("lsa");
  ASSERT_FALSE(unknown.ok());
  EXPECT_THAT(unknown.error().message, HasSubstr("uniform, owl, error, curves"));
}

TEST(Budget, IsReadWithItsUnits) {
  EXPECT_EQ(Budget::parse("sparsity=0.6")->amount, 0.6);
  EXPECT_EQ(Budget::parse("bytes=2.1GB")->amount, 2.1e9);
  EXPECT_EQ(Budget::parse("bytes=3MiB")->amount, 3 * 1048576.0);
  EXPECT_EQ(Budget::parse("bytes=17")->amount, 17);
  EXPECT_EQ(Budget::parse("tpot=12.5ms")->amount, 12.5);
  EXPECT_EQ(Budget::parse("tpot=500us")->amount, 0.5);
  for (const char* text : {"sparsity=0.625", "bytes=2100000000B", "tpot=12.5ms"})
    EXPECT_EQ(Budget::parse(text)->text(), text);
  for (const char* wrong :
       {"", "0.6", "sparsity", "sparsity=", "sparsity=1.5", "sparsity=-1", "sparsity=0.6x",
        "bytes=0", "bytes=2XB", "tpot=3", "tpot=nanms", "speed=3ms"})
    EXPECT_FALSE(Budget::parse(wrong).ok()) << wrong;
}

TEST(Allocation, MeetsAnyTargetToTheLastStepThatFits) {
  for (const int64_t step : {1, 2}) {
    const auto shares = some_shares(5, step);
    const LayerCost cost = kept_weights(shares);
    const double all = total(cost, std::vector<double>(shares.size(), 0.0));
    double smallest = 1e9;
    for (const LayerShare& share : shares)
      smallest = std::min(smallest, static_cast<double>(share.step));
    for (const Allocation by : kAll)
      for (const double sparsity : {0.05, 0.5, 0.613, 0.7, 0.9, 0.97}) {
        const double target = all - std::floor(all * sparsity);
        const auto given = allocate(shares, {.by = by}, cost, target);
        ASSERT_TRUE(given.ok()) << given.error().message;
        const double came = total(cost, *given);
        EXPECT_LE(came, target + 1e-6) << allocation_name(by) << " " << sparsity;
        EXPECT_GT(came, target - smallest + 1e-6 * (step > 1))
            << allocation_name(by) << " " << sparsity << " step " << step;
        for (size_t i = 0; i < given->size(); ++i) {
          EXPECT_GE((*given)[i], 0);
          EXPECT_LE((*given)[i], 1);
          const double steps = (*given)[i] * static_cast<double>(shares[i].weights()) /
                               static_cast<double>(shares[i].step);
          EXPECT_NEAR(steps, std::round(steps), 1e-6);
        }
      }
  }
}

TEST(Allocation, RefusesWhatIsOutOfReachAndNamesBothEnds) {
  const auto shares = some_shares(2);
  const LayerCost cost = kept_weights(shares);
  for (const double target : {-1.0, 1e6}) {
    const auto given = allocate(shares, {}, cost, target);
    ASSERT_FALSE(given.ok());
    EXPECT_EQ(given.error().code, Code::kUsage);
    EXPECT_THAT(given.error().message, HasSubstr("6400"));
  }
}

TEST(Allocation, OwlFollowsItsPaper) {
  // Equal blocks of one layer, so that the paper's mean is that of the weights.
  std::vector<LayerShare> shares;
  const std::vector<double> outliers = {3, 9, 5, 4};
  for (int64_t block = 0; block < 4; ++block) {
    shares.push_back({fmt::format("{}", block), block, 1000, 1000});
    shares.back().outliers = outliers[static_cast<size_t>(block)];
  }
  const LayerCost cost = kept_weights(shares);
  const auto given = allocate(shares, {.by = Allocation::kOwl}, cost, 0.3 * 4e6);
  ASSERT_TRUE(given.ok());
  const double lambda = 0.08;
  std::vector<double> stretched;
  for (const double d : outliers) stretched.push_back((d - 3) / (9 - 3) * 2 * lambda);
  const double mean = std::accumulate(stretched.begin(), stretched.end(), 0.0) / 4;
  for (size_t i = 0; i < 4; ++i) {
    const double keep = stretched[i] - mean + (1 - 0.7);
    EXPECT_NEAR((*given)[i], 1 - keep, 2e-6) << i;
  }
}

TEST(Allocation, CurvesComeWithinAStepOfTheBestOfAllCombinations) {
  std::vector<LayerShare> shares;
  for (int64_t i = 0; i < 3; ++i) {
    shares.push_back({fmt::format("{}", i), i, 10, 10});
    for (const double s : kCurveSparsities)  // convex, so that the hull is the curve
      shares.back().squared_errors.push_back((0.2 + 0.4 * static_cast<double>(i)) *
                                             std::pow(s, 3.0 + static_cast<double>(i)));
  }
  const LayerCost cost = kept_weights(shares);
  const auto error = [&](const std::vector<double>& at) {
    double sum = 0;
    for (size_t i = 0; i < 3; ++i) sum += squared_error_at(shares[i], at[i]);
    return sum;
  };
  for (const int dropped : {60, 150, 210, 255}) {
    const auto given = allocate(shares, {.by = Allocation::kCurves}, cost, 300 - dropped);
    ASSERT_TRUE(given.ok());
    double best = 1e9;
    for (int a = 0; a <= 100; ++a)
      for (int b = 0; b <= 100; ++b)
        if (const int c = dropped - a - b; c >= 0 && c <= 100)
          best = std::min(best, error({a / 100.0, b / 100.0, c / 100.0}));
    EXPECT_LE(error(*given), best * 1.02 + 1e-9) << dropped;
    EXPECT_NEAR(total(cost, *given), 300 - dropped, 1e-6);
  }
}

TEST(Curve, PassesThroughItsPointsAndRisesBetweenThem) {
  const LayerShare share = some_shares(1).front();
  for (size_t i = 0; i < std::size(kCurveSparsities); ++i)
    EXPECT_DOUBLE_EQ(squared_error_at(share, kCurveSparsities[i]), share.squared_errors[i]);
  EXPECT_EQ(squared_error_at(share, 0), 0);
  EXPECT_EQ(squared_error_at(share, 1), 1);
  for (int i = 1; i <= 1000; ++i)
    EXPECT_GE(squared_error_at(share, i / 1000.0), squared_error_at(share, (i - 1) / 1000.0)) << i;
}

TEST(Measure, CountsOutliersOverAllLayersOfABlock) {
  const std::vector<at::Tensor> weights = {random_matrix(16, 24, 1), 3 * random_matrix(8, 24, 2)};
  const InputStatistics inputs = statistics_of(correlated_inputs(200, 24, 3));
  std::vector<LayerShare> shares = {{"a", 0, 16, 24}, {"b", 0, 8, 24}};
  AllocationOptions options{.by = Allocation::kOwl, .owl_multiple = 2};
  measure(shares, weights, {&inputs, &inputs}, options, {});
  const at::Tensor scores = at::cat({weights[0], weights[1]}).abs() * inputs.square_sums.sqrt();
  const double expected = 100 * (scores > 2 * scores.mean()).to(at::kDouble).mean().item<double>();
  EXPECT_GT(expected, 1);
  for (const LayerShare& share : shares) EXPECT_NEAR(share.outliers, expected, 1e-9);
}

TEST(Measure, CurvesAreTheErrorsOfWandasMasks) {
  const at::Tensor weight = random_matrix(20, 32, 4);
  const InputStatistics inputs = statistics_of(correlated_inputs(300, 32, 5));
  std::vector<LayerShare> shares = {{"a", 0, 20, 32}};
  measure(shares, {weight}, {&inputs}, {.by = Allocation::kCurves}, {});
  ASSERT_EQ(shares[0].squared_errors.size(), std::size(kCurveSparsities));
  for (size_t i = 0; i < std::size(kCurveSparsities); ++i) {
    Request request{.sparsity = kCurveSparsities[i], .group = Group::kLayer};
    const auto pruned = (*find_method("wanda"))->prune(weight, inputs, request);
    const double error = relative_error(weight, pruned->weight, inputs.gram);
    EXPECT_NEAR(shares[0].squared_errors[i], error * error, 1e-9);
  }
  const double half = shares[0].squared_errors[4];
  measure(shares, {weight}, {&inputs}, {.by = Allocation::kError}, {});
  EXPECT_DOUBLE_EQ(std::pow(shares[0].half_error, 2), half);
  EXPECT_TRUE(shares[0].squared_errors.empty());
}

}  // namespace
}  // namespace lacuna::prune
