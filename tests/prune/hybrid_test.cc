#include "lacuna/prune/hybrid.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "lacuna/prune/selection.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using testing::correlated_inputs;
using testing::dropped;
using ::testing::HasSubstr;
using testing::random_matrix;
using testing::statistics_of;

Request two_of_four_beside(double sparsity) {
  return {.pattern = Pattern::unstructured(), .sparsity = sparsity, .rest = Pattern::keep_of(2, 4)};
}

Pruned prune(const char* method, const at::Tensor& weight, const InputStatistics& statistics,
             const Request& request) {
  const auto made = compose({.method = method});
  EXPECT_TRUE(made.ok());
  auto pruned = made->prune(weight, statistics, request);
  EXPECT_TRUE(pruned.ok()) << (pruned.ok() ? "" : pruned.error().message);
  return *pruned;
}

double error_of(const at::Tensor& weight, const Pruned& pruned, const InputStatistics& statistics) {
  return relative_error(weight, pruned.weight, statistics.gram);
}

TEST(Hybrid, LeavesWholeColumnsDenseAndTheOthersUnderThePattern) {
  const InputStatistics statistics = statistics_of(correlated_inputs(300, 64, 1));
  const at::Tensor weight = random_matrix(24, 64, 2);
  for (const char* method : {"magnitude", "wanda", "sparsegpt", "alps"}) {
    const Pruned pruned = prune(method, weight, statistics, two_of_four_beside(0.375));
    EXPECT_EQ(dropped(pruned.mask), 24 * 64 * 3 / 8) << method;
    const at::Tensor kept = pruned.mask.sum({0});
    const at::Tensor others = (kept < 24).nonzero().flatten();
    ASSERT_EQ(others.numel(), 48) << method;
    // Of every four of the others that lie side by side a row keeps two.
    const at::Tensor groups = pruned.mask.index_select(1, others).view({24, 12, 4}).sum({2});
    EXPECT_TRUE((groups == 2).all().item<bool>()) << method;
    EXPECT_TRUE(at::equal(pruned.weight == 0, pruned.mask.logical_not())) << method;
  }
}

TEST(Hybrid, KeepsTheColumnsOfTheMostMassDense) {
  InputStatistics statistics = testing::identity_statistics(8);
  statistics.square_sums = at::tensor({1.f, 1.f, 9.f, 1.f, 1.f, 16.f, 4.f, 1.f});
  at::Tensor weight = at::ones({2, 8});
  weight.select(1, 0).fill_(-5);
  const Pruned pruned = prune("wanda", weight, statistics, two_of_four_beside(0.25));
  const at::Tensor dense = at::tensor({1, 0, 1, 0, 0, 1, 1, 0}).to(at::kBool);
  EXPECT_TRUE(at::equal(pruned.mask.all(0).logical_and(dense), dense));
  EXPECT_EQ(dropped(pruned.mask), 4);
}

TEST(Hybrid, DenseColumnsMakeGoodWhatTheyCan) {
  const InputStatistics statistics = statistics_of(correlated_inputs(300, 32, 3));
  const at::Tensor weight = random_matrix(16, 32, 4);
  const Pruned pruned = prune("sparsegpt", weight, statistics, two_of_four_beside(0.25));
  const at::Tensor dense = pruned.mask.all(0);
  ASSERT_EQ(dense.sum().item<int64_t>(), 16);
  // At the least squares optimum the error has no slope along a dense column's weights, but for
  // the damping.
  const at::Tensor left = at::mm(weight - pruned.weight, statistics.gram);
  const double scale = at::mm(weight, statistics.gram).abs().mean().item<double>();
  EXPECT_LT(left.masked_select(dense.unsqueeze(0)).abs().max().item<double>(), 0.02 * scale);
  // So they are better than dense columns that stay as they were.
  Pruned still = pruned;
  still.weight = at::where(dense.unsqueeze(0), weight, pruned.weight);
  EXPECT_LT(error_of(weight, pruned, statistics), error_of(weight, still, statistics));
}

TEST(Hybrid, LiesBetweenThePatternAndTheDenseMatrix) {
  const InputStatistics statistics = statistics_of(correlated_inputs(300, 64, 5));
  const at::Tensor weight = random_matrix(24, 64, 6);
  for (const char* method : {"wanda", "alps"}) {
    const Pruned none = prune(method, weight, statistics, two_of_four_beside(0));
    EXPECT_TRUE(at::equal(none.weight, weight));
    double last = 0;
    for (const double sparsity : {0.125, 0.25, 0.375, 0.5}) {
      const double error = error_of(
          weight, prune(method, weight, statistics, two_of_four_beside(sparsity)), statistics);
      EXPECT_GT(error, last) << method << sparsity;
      last = error;
    }
    const Pruned all = prune(method, weight, statistics, {.pattern = Pattern::keep_of(2, 4)});
    EXPECT_FLOAT_EQ(last, error_of(weight, all, statistics)) << "no column is dense";
  }
}

TEST(Hybrid, CountsWholeGroups) {
  EXPECT_EQ(dense_columns(two_of_four_beside(0.5), 384), 0);
  EXPECT_EQ(dense_columns(two_of_four_beside(0), 384), 384);
  EXPECT_EQ(dense_columns(two_of_four_beside(0.4), 384), 384 - 308);  // 307.2 to a multiple of 4
  EXPECT_EQ(dense_columns(two_of_four_beside(0.5), 10), 2);           // a short group stays dense
}

TEST(Hybrid, WeightsMakeUpForEachOthersWholeGroups) {
  const std::vector<Shape> shapes = {{384, 384}, {384, 384}, {1024, 384}, {384, 1024}, {384, 12}};
  for (const double wanted : {0.1, 0.25, 0.4, 0.49, 0.5}) {
    const auto sparsities = hybrid_sparsities(shapes, two_of_four_beside(wanted));
    double zeros = 0, all = 0;
    for (size_t i = 0; i < shapes.size(); ++i) {
      const auto columns = shapes[i][1];
      const auto weights = static_cast<double>(shapes[i][0] * columns);
      const auto pruned = columns - dense_columns(two_of_four_beside(sparsities[i]), columns);
      EXPECT_EQ(sparsities[i], static_cast<double>(pruned) / static_cast<double>(columns) / 2);
      EXPECT_NEAR(sparsities[i], wanted, i < 4 ? 0.015 : 0.2) << "near the others'";
      zeros += sparsities[i] * weights;
      all += weights;
    }
    EXPECT_NEAR(zeros, wanted * all, 384 * 4 * 0.5 / 2) << "half a group of the last one's";
  }
}

TEST(Hybrid, RefusesWhatItHasNoFormFor) {
  const auto method = compose({.method = "magnitude"});
  const at::Tensor weight = random_matrix(4, 8, 1);
  Request most = two_of_four_beside(0.6), group = two_of_four_beside(0.4),
          codes = two_of_four_beside(0.4), blocks = two_of_four_beside(0.4);
  group.group = Group::kRow;
  codes.quantization = {.code = format::Code::kInt8};
  blocks.rest = Pattern::block(2, 2);
  const std::pair<Request, const char*> cases[] = {{most, "0.5 at most (got 0.6)"},
                                                   {group, "neither --group"},
                                                   {codes, "neither --group nor --quantize"},
                                                   {blocks, "go with KEEP:OF alone"}};
  for (const auto& [request, named] : cases) {
    const auto refused = method->prune(weight, testing::identity_statistics(8), request);
    ASSERT_FALSE(refused.ok()) << named;
    EXPECT_EQ(refused.error().code, Code::kUsage);
    EXPECT_THAT(refused.error().message, HasSubstr(named));
  }
}

}  // namespace
}  // namespace lacuna::prune
