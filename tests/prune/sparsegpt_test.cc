#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <vector>

#include "lacuna/model/torch.h"
#include "lacuna/prune/column_loop.h"
#include "lacuna/prune/inverse_factor.h"
#include "lacuna/prune/selection.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using testing::correlated_inputs;
using testing::dropped;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::identity_statistics;
using testing::random_matrix;
using testing::statistics_of;
using testing::tied_matrix;

const Method& sparsegpt() { return **find_method("sparsegpt"); }

Pruned prune(const at::Tensor& weight, const InputStatistics& statistics, const Request& request) {
  auto pruned = sparsegpt().prune(weight, statistics, request);
  EXPECT_TRUE(pruned.ok()) << (pruned.ok() ? "" : pruned.error().message);
  return *pruned;
}

/// Optimal brain surgeon by definition, in float64 and without a Cholesky factor: the inverse
/// Hessian of the columns that are left is updated by Gaussian elimination, column by column.
struct Reference {
  at::Tensor weight, mask;

  Reference(const at::Tensor& start, const at::Tensor& gram, double damping, const Pattern& pattern,
            double sparsity, int64_t sequences) {
    const int64_t columns = start.size(1), stripe = stripe_columns(pattern);
    at::Tensor hessian = gram.to(at::kDouble) * (2.0 / static_cast<double>(sequences));
    const at::Tensor dead = hessian.diagonal() == 0;
    hessian.diagonal().masked_fill_(dead, 1);
    hessian.diagonal().add_(hessian.diagonal().mean() * damping);
    weight = start.to(at::kDouble).masked_fill(dead, 0);
    mask = at::ones(start.sizes(), at::kBool);

    // Rows of the inverses as each column finds them, its own diagonal entry first.
    std::vector<at::Tensor> inverse_row;
    at::Tensor left = at::linalg_inv(hessian);
    at::Tensor own = at::empty({columns}, at::kDouble);
    for (int64_t j = 0; j < columns; ++j) {
      inverse_row.push_back(left[0].clone());
      own[j] = left[0][0];
      left = (left - at::outer(left.select(1, 0), left[0]) / left[0][0])
                 .narrow(0, 1, columns - j - 1)
                 .narrow(1, 1, columns - j - 1);
    }
    Share share{sparsity};
    for (int64_t j = 0; j < columns; ++j) {
      const auto scores = [&](int64_t n) {
        return (weight.narrow(1, j, n).square() / own.narrow(0, j, n)).to(at::kFloat);
      };
      if (pattern.kind == format::PatternKind::kKeepOf) {
        const int64_t n = std::min<int64_t>(pattern.of, columns - j);
        if (j % pattern.of == 0)
          mask.narrow(1, j, n).copy_(select(scores(n), pattern, 0, Group::kRow));
      } else if (j % stripe == 0) {
        const int64_t n = std::min(stripe, columns - j);
        mask.narrow(1, j, n).copy_(select_stripe(scores(n), pattern, share));
      }
      const at::Tensor error =
          weight.select(1, j).masked_fill(mask.select(1, j), 0) / inverse_row[j][0];
      weight.narrow(1, j, columns - j).sub_(at::outer(error, inverse_row[j]));
      weight.select(1, j).mul_(mask.select(1, j));
    }
  }
};

double relative_distance(const at::Tensor& a, const at::Tensor& b) {
  return ((a.to(at::kDouble) - b).norm() / b.norm()).item<double>();
}

TEST(SparseGpt, AgreesWithOptimalBrainSurgeonByDefinition) {
  const at::Tensor weight = random_matrix(24, 200, 1), x = correlated_inputs(600, 200, 2);
  const InputStatistics statistics = statistics_of(x);
  for (const Pattern& pattern :
       {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(4, 8),
        Pattern::keep_of(3, 7), Pattern::block(4, 8), Pattern::block(3, 150)}) {
    for (double sparsity : {0.3, 0.5, 0.8}) {
      const Pruned pruned = prune(weight, statistics, {.pattern = pattern, .sparsity = sparsity});
      const Reference reference(weight, statistics.gram, 0.01, pattern, sparsity, 1);
      EXPECT_TRUE(at::equal(pruned.mask, reference.mask)) << pattern.text() << " " << sparsity;
      EXPECT_LT(relative_distance(pruned.weight, reference.weight), 2e-5) << pattern.text();
      EXPECT_EQ(pruned.damping, 0.01);
      EXPECT_TRUE(pruned.warnings.empty());
    }
  }
}

TEST(SparseGpt, RemovesOneWeightOfThreeByTheClosedForm) {
  // Dropping column 0 alone: w' = w - w_0 / C_00 * C_0, C = H^-1 (the constrained least squares).
  InputStatistics statistics;
  statistics.sequences = 2;
  statistics.gram = at::tensor({4.f, 1.f, 0.f, 1.f, 3.f, 1.f, 0.f, 1.f, 2.f}).view({3, 3});
  statistics.square_sums = statistics.gram.diagonal().clone();
  const at::Tensor weight = at::tensor({0.1f, 2.f, -3.f}).view({1, 3});
  const Pruned pruned = prune(weight, statistics, {.sparsity = 1.0 / 3, .damping = 1e-9});
  // det H = 18; first row of H^-1 = (5, -2, 1) / 18.
  EXPECT_TRUE(at::allclose(pruned.weight, at::tensor({0.f, 2.04f, -3.02f}).view({1, 3}), 1e-5));
}

TEST(SparseGpt, WithAnIdentityHessianIsMagnitudePer128Columns) {
  for (const at::Tensor& weight : {random_matrix(20, 300, 3), tied_matrix(20, 300, 3)}) {
    for (const Pattern& pattern :
         {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(1, 3)}) {
      const Pruned surgeon = prune(weight, identity_statistics(300), {.pattern = pattern});
      Request request{.pattern = pattern};
      if (pattern.kind == format::PatternKind::kUnstructured) request.group = Group::kBlock128;
      const auto magnitude = (*find_method("magnitude"))->prune(weight, {}, request);
      EXPECT_TRUE(at::equal(surgeon.mask, magnitude->mask)) << pattern.text();
      EXPECT_TRUE(at::equal(surgeon.weight, magnitude->weight)) << pattern.text();
    }
  }
}

TEST(SparseGpt, LosesLessThanWandaAndMagnitude) {
  const at::Tensor weight = random_matrix(64, 256, 4);
  const InputStatistics statistics = statistics_of(correlated_inputs(2000, 256, 5));
  for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)}) {
    const auto error = [&](const char* name) {
      const auto pruned = (*find_method(name))->prune(weight, statistics, {.pattern = pattern});
      return relative_error(weight, pruned->weight, statistics.gram);
    };
    EXPECT_LT(error("sparsegpt"), 0.9 * error("wanda"));
    EXPECT_LT(error("sparsegpt"), 0.9 * error("magnitude"));
  }
}

TEST(SparseGpt, ZeroesWeightsOfDeadInputs) {
  at::Tensor x = correlated_inputs(400, 160, 6);
  for (int64_t column : {0, 5, 130}) x.select(1, column).zero_();
  const at::Tensor weight = random_matrix(16, 160, 7);
  const InputStatistics statistics = statistics_of(x);
  for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)}) {
    const Pruned pruned = prune(weight, statistics, {.pattern = pattern});
    for (int64_t column : {0, 5, 130})
      EXPECT_EQ(pruned.weight.select(1, column).count_nonzero().item<int64_t>(), 0);
    const Reference reference(weight, statistics.gram, 0.01, pattern, 0.5, 1);
    EXPECT_LT(relative_distance(pruned.weight, reference.weight), 2e-5);
  }
}

TEST(SparseGpt, RaisesTheDampingAndSaysSoWhenCholeskyFails) {
  // Rank 3, with rounding: singular without damping.
  const at::Tensor x = at::mm(random_matrix(400, 3, 8), random_matrix(3, 64, 9));
  const InputStatistics statistics = statistics_of(x);
  const Pruned pruned = prune(random_matrix(8, 64, 10), statistics, {.damping = 1e-12});
  EXPECT_GT(pruned.damping, 1e-12);
  ASSERT_FALSE(pruned.warnings.empty());
  EXPECT_THAT(pruned.warnings[0], HasSubstr("Cholesky failed at 1e-12"));
  EXPECT_THAT(pruned.warnings.back(), HasSubstr(fmt::format("raised to {:g}", pruned.damping)));
  EXPECT_TRUE(pruned.weight.isfinite().all().item<bool>());
  EXPECT_EQ(dropped(pruned.mask), 8 * 64 / 2);
}

TEST(SparseGpt, ClipsEigenvaluesWhereNoDampingHelpsAndGivesUpByName) {
  InputStatistics statistics = identity_statistics(4);
  statistics.gram = at::tensor({1.f, 50.f, 50.f, 1.f}).view({2, 2});  // no damping up to 10 helps
  statistics.square_sums = at::ones({2});
  const Pruned pruned = prune(random_matrix(2, 2, 1), statistics, {});
  ASSERT_FALSE(pruned.warnings.empty());
  EXPECT_THAT(pruned.warnings.back(), HasSubstr("eigenvalues clipped"));
  EXPECT_EQ(pruned.damping, 0.01);
  EXPECT_TRUE(pruned.weight.isfinite().all().item<bool>());
  EXPECT_EQ(dropped(pruned.mask), 2);

  statistics.gram = at::tensor({1.f, NAN, NAN, 1.f}).view({2, 2});
  const auto result = sparsegpt().prune(random_matrix(2, 2, 1), statistics, {});
  ASSERT_FALSE(result.ok());
  EXPECT_EQ(result.error().code, Code::kCheckFailed);
  EXPECT_THAT(result.error().message, HasSubstr("even with damping 10"));
}

TEST(SparseGpt, SharesOneFactorBetweenTheLinearsOfAnInput) {
  const at::Tensor weight = random_matrix(24, 96, 11);
  InputStatistics statistics = statistics_of(correlated_inputs(300, 96, 12));
  const Pruned alone = prune(weight, statistics, {});
  ASSERT_TRUE(sparsegpt().prepare(statistics, {}).ok());
  ASSERT_TRUE(statistics.factor);
  statistics.gram.fill_(1);  // no longer looked at
  EXPECT_TRUE(at::equal(prune(weight, statistics, {}).weight, alone.weight));
}

TEST(InverseFactor, IsTheUpperCholeskyFactorOfTheInverse) {
  const int64_t n = 300;  // several tiles and a short one
  const InputStatistics statistics = statistics_of(correlated_inputs(1500, n, 13));
  const auto factor = inverse_factor(statistics, 0.01, Executor::serial());
  ASSERT_TRUE(factor.ok());
  EXPECT_TRUE(at::equal(factor->upper, factor->upper.triu()));
  EXPECT_GT(factor->upper.diagonal().min().item<float>(), 0);
  const at::Tensor upper = factor->upper.to(at::kDouble);
  at::Tensor hessian = statistics.gram.to(at::kDouble) * 2;
  hessian.diagonal().add_(hessian.diagonal().mean() * 0.01);
  const at::Tensor product = at::mm(at::mm(upper.t(), upper), hessian);
  EXPECT_TRUE(at::allclose(product, at::eye(n, at::kDouble), 0, 1e-4));
}

TEST(ColumnLoop, ItsTwoFormsAgree) {
  const InputStatistics statistics = statistics_of(correlated_inputs(500, 150, 14));
  const auto factor = inverse_factor(statistics, 0.01, Executor::serial());
  for (auto [keep, of] : {std::pair{0, 0}, {2, 4}, {1, 6}}) {
    const at::Tensor rows = random_matrix(130, 150, 15), columns = rows.clone();
    const at::Tensor rows_mask = random_matrix(130, 150, 16) > 0, columns_mask = rows_mask.clone();
    for (auto [first, width] : {std::pair{0, 96}, {96, 54}}) {
      column_loop_rows({rows, rows_mask, factor->upper, first, width, keep, of},
                       Executor::serial());
      column_loop_torch({columns, columns_mask, factor->upper, first, width, keep, of});
    }
    EXPECT_TRUE(at::equal(rows_mask, columns_mask)) << keep << ":" << of;
    EXPECT_TRUE(at::allclose(rows, columns, 1e-4, 1e-5)) << keep << ":" << of;
  }
}

TEST(SparseGpt, GivesTheSameBitsOnAnyThreadCount) {
  const at::Tensor weight = random_matrix(200, 600, 17);
  const InputStatistics statistics = statistics_of(correlated_inputs(1000, 600, 18));
  at::Tensor first;
  for (int threads : {1, 2, 3}) {
    model::set_threads(threads);
    const Pruned pruned = prune(weight, statistics, {.executor = model::torch_executor()});
    if (!first.defined()) first = pruned.weight;
    EXPECT_TRUE(at::equal(pruned.weight, first)) << threads << " threads";
  }
  model::set_threads(0);
}

}  // namespace
}  // namespace lacuna::prune
