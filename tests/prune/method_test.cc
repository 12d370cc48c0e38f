#include "lacuna/prune/method.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "lacuna/prune/selection.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using testing::correlated_inputs;
using testing::dropped;
using ::testing::HasSubstr;
using testing::identity_statistics;
using testing::random_matrix;
using testing::statistics_of;
using testing::tied_matrix;

const Method& method(std::string_view name) { return **find_method(name); }

/// DSnoT knows no blocks.
bool takes_blocks(const Method& method) { return method.name() != "dsnot"; }

/// With a gradient for those that want one.
Pruned prune(std::string_view name, const at::Tensor& weight, const InputStatistics& statistics,
             Request request) {
  request.gradient = random_matrix(weight.size(0), weight.size(1), 99);
  auto pruned = method(name).prune(weight, statistics, request);
  EXPECT_TRUE(pruned.ok()) << (pruned.ok() ? "" : pruned.error().message);
  return *pruned;
}

TEST(Methods, AreFoundByNameAndAnUnknownNameListsThem) {
  EXPECT_EQ(methods().size(), 8u);
  for (const Method* known : methods()) EXPECT_EQ(*find_method(known->name()), known);
  const auto unknown = find_method("alps2");
  ASSERT_FALSE(unknown.ok());
  EXPECT_EQ(unknown.error().code, Code::kUsage);
  EXPECT_THAT(unknown.error().message,
              HasSubstr("sparsegpt, alps, wanda, ria, dsnot, hessian, gradient, magnitude"));
  EXPECT_FALSE(parse_group("columns").ok());
  EXPECT_EQ(*parse_group("block128"), Group::kBlock128);
}

TEST(Methods, PruneNothingAtSparsityZero) {
  const at::Tensor weight = random_matrix(40, 200, 1);
  at::Tensor x = correlated_inputs(300, 200, 2);
  x.select(1, 7).zero_();  // a dead input stays too
  for (const Method* each : methods()) {
    for (const Pattern& pattern : {Pattern::unstructured(), Pattern::block(8, 8)}) {
      const Pruned pruned =
          prune(each->name(), weight, statistics_of(x), {.pattern = pattern, .sparsity = 0.0});
      EXPECT_TRUE(at::equal(pruned.weight, weight)) << each->name();
      EXPECT_EQ(dropped(pruned.mask), 0) << each->name();
    }
  }
}

TEST(Methods, HitExactCountsForEveryPatternAndGroup) {
  const InputStatistics statistics = statistics_of(correlated_inputs(500, 150, 3));
  for (const at::Tensor& weight : {random_matrix(70, 150, 4), tied_matrix(70, 150, 4)}) {
    for (const Method* each : methods()) {
      for (Group group : {Group::kRow, Group::kLayer, Group::kBlock128}) {
        const Pruned half = prune(each->name(), weight, statistics, {.group = group});
        EXPECT_EQ(dropped(half.mask), 70 * 150 / 2) << each->name() << " " << group_name(group);
        if (!takes_blocks(*each)) continue;
        const Pruned blocks = prune(each->name(), weight, statistics,
                                    {.pattern = Pattern::block(10, 25), .group = group});
        EXPECT_EQ(dropped(blocks.mask), 7 * 6 / 2 * 250)
            << each->name() << " " << group_name(group);
      }
      const Pruned two =
          prune(each->name(), weight, statistics, {.pattern = Pattern::keep_of(2, 4)});
      EXPECT_EQ(dropped(two.mask), 70 * 148 / 2) << each->name();  // short last group of 2 keeps 2
      const Pruned of5 =
          prune(each->name(), weight, statistics, {.pattern = Pattern::keep_of(1, 5)});
      EXPECT_EQ(dropped(of5.mask), 70 * 120) << each->name();
      for (const Pruned* result : {&two, &of5})
        EXPECT_EQ(result->weight.masked_select(result->mask.logical_not())
                      .count_nonzero()
                      .item<int64_t>(),
                  0);
    }
  }
}

TEST(Methods, AreIdempotent) {
  const InputStatistics statistics = statistics_of(correlated_inputs(500, 128, 5));
  const at::Tensor weight = random_matrix(48, 128, 6);
  for (const Method* each : methods()) {
    for (const Pattern& pattern :
         {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::block(8, 16)}) {
      if (pattern.kind == format::PatternKind::kBlock && !takes_blocks(*each)) continue;
      const Request request{.pattern = pattern};
      const Pruned once = prune(each->name(), weight, statistics, request);
      const Pruned twice = prune(each->name(), once.weight, statistics, request);
      // Least squares finds the same weights again, but for rounding.
      const bool solves = each->name() == "alps" || each->name() == "hessian";
      EXPECT_TRUE(solves ? at::allclose(twice.weight, once.weight, 1e-4, 1e-4)
                         : at::equal(twice.weight, once.weight))
          << each->name() << " " << pattern.text();
      EXPECT_TRUE(at::equal(twice.mask, once.mask)) << each->name() << " " << pattern.text();
    }
  }
}

TEST(Magnitude, CompetesOverTheWholeLayerByDefault) {
  const at::Tensor weight = random_matrix(30, 64, 7);
  const Pruned pruned = prune("magnitude", weight, {}, {.sparsity = 0.25});
  const at::Tensor kept = pruned.weight.abs().masked_select(pruned.mask);
  const at::Tensor gone = weight.abs().masked_select(pruned.mask.logical_not());
  EXPECT_GE(kept.min().item<float>(), gone.max().item<float>());
  EXPECT_TRUE(at::equal(pruned.weight, weight * pruned.mask));
}

TEST(Magnitude, TreatsMinusZeroAsZero) {
  const at::Tensor weight = at::tensor({-0.0f, 0.0f, -0.0f, 1.0f}).view({1, 4});
  const Pruned pruned = prune("magnitude", weight, {}, {.pattern = Pattern::keep_of(2, 4)});
  EXPECT_TRUE(pruned.mask[0][0].item<bool>());
  EXPECT_TRUE(pruned.mask[0][3].item<bool>());
}

TEST(Wanda, WithEqualNormsIsMagnitudePerRow) {
  for (const at::Tensor& weight : {random_matrix(30, 96, 8), tied_matrix(30, 96, 8)}) {
    for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)}) {
      const bool free = pattern.kind == format::PatternKind::kUnstructured;
      Request row{.pattern = pattern, .sparsity = 0.6};
      const Pruned wanda = prune("wanda", weight, identity_statistics(96), row);
      if (free) row.group = Group::kRow;
      const Pruned magnitude = prune("magnitude", weight, {}, row);
      EXPECT_TRUE(at::equal(wanda.mask, magnitude.mask));
      EXPECT_TRUE(at::equal(wanda.weight, magnitude.weight));
    }
  }
}

TEST(Wanda, PrefersAWeightWhoseInputIsLoud) {
  InputStatistics statistics;
  statistics.square_sums = at::tensor({100.f, 1.f, 4.f, 1.f});
  const at::Tensor weight = at::tensor({0.2f, 1.9f, -0.9f, 1.0f}).view({1, 4});
  const Pruned pruned = prune("wanda", weight, statistics, {});
  EXPECT_TRUE(at::equal(pruned.weight, at::tensor({0.2f, 1.9f, 0.f, 0.f}).view({1, 4})));
}

TEST(Methods, NameTheNaNInAWeightAndInTheInputs) {
  at::Tensor weight = random_matrix(8, 16, 9);
  weight[3][5] = std::numeric_limits<float>::quiet_NaN();
  for (const Method* each : methods()) {
    const auto result = each->prune(weight, identity_statistics(16), {});
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().code, Code::kBadInput);
    EXPECT_THAT(result.error().message, HasSubstr("got nan in row 3, column 5"));
  }
  at::Tensor x = random_matrix(20, 16, 10);
  x[4][11] = std::numeric_limits<float>::infinity();
  for (const char* name : {"wanda", "sparsegpt"}) {
    const auto result = method(name).prune(random_matrix(8, 16, 9), statistics_of(x), {});
    ASSERT_FALSE(result.ok());
    EXPECT_EQ(result.error().code, Code::kBadInput);
    EXPECT_THAT(result.error().message, HasSubstr("inputs"));
    EXPECT_THAT(result.error().message, HasSubstr("column 11"));
  }
}

TEST(Methods, RefuseWhatTheyCannotDo) {
  const at::Tensor weight = random_matrix(8, 16, 9);
  for (const Method* each : methods()) {
    for (const Request& request :
         {Request{.sparsity = 1.5}, Request{.sparsity = std::nan("")},
          Request{.pattern = Pattern{}}, Request{.pattern = Pattern::keep_of(4, 4)},
          Request{.pattern = Pattern::keep_of(2, 65)}, Request{.pattern = Pattern::block(0, 4)},
          Request{.pattern = Pattern::keep_of(2, 4), .group = Group::kRow}}) {
      const auto result = each->prune(weight, identity_statistics(16), request);
      ASSERT_FALSE(result.ok());
      EXPECT_EQ(result.error().code, Code::kUsage);
    }
    EXPECT_EQ(each->prune(weight, {}, {}).ok(), !each->needs_inputs());
    EXPECT_FALSE(each->prune(weight.view({-1}), identity_statistics(16), {}).ok());
    EXPECT_EQ(each->prune(weight, identity_statistics(15), {}).ok(), !each->needs_inputs());
  }
}

TEST(RelativeError, IsTheErrorOfTheOutputs) {
  const at::Tensor weight = random_matrix(12, 40, 11), x = correlated_inputs(90, 40, 12);
  const at::Tensor pruned = weight * (random_matrix(12, 40, 13) > 0);
  const double direct =
      (at::mm(x, (weight - pruned).t()).norm() / at::mm(x, weight.t()).norm()).item<double>();
  EXPECT_NEAR(relative_error(weight, pruned, statistics_of(x).gram), direct, 1e-5 * direct);
  EXPECT_EQ(relative_error(weight, weight, statistics_of(x).gram), 0);
  EXPECT_EQ(relative_error(at::zeros({2, 40}), at::zeros({2, 40}), statistics_of(x).gram), 0);
}

}  // namespace
}  // namespace lacuna::prune
