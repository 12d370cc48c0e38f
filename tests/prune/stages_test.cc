#include "lacuna/prune/stages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include "lacuna/model/torch.h"
#include "lacuna/prune/builtin.h"
#include "lacuna/prune/damped_gram.h"
#include "lacuna/prune/selection.h"
#include "lacuna/prune/spectrum.h"
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

Method made(const MethodChoice& choice) {
  auto method = compose(choice);
  EXPECT_TRUE(method.ok()) << (method.ok() ? "" : method.error().message);
  return *method;
}

Pruned prune(const MethodChoice& choice, const at::Tensor& weight,
             const InputStatistics& statistics, const Request& request) {
  auto pruned = made(choice).prune(weight, statistics, request);
  EXPECT_TRUE(pruned.ok()) << (pruned.ok() ? "" : pruned.error().message);
  return *pruned;
}

/// By definition, in float64: d (G + damping mean I) d^T for each row d.
at::Tensor damped64(const at::Tensor& gram, double damping) {
  at::Tensor damped = gram.to(at::kDouble).clone();
  damped.diagonal().add_(damped.diagonal().mean() * damping);
  return damped;
}
at::Tensor errors64(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& gram,
                    double damping = 0.01) {
  const at::Tensor distance = weight.to(at::kDouble) - pruned.to(at::kDouble);
  return (at::mm(distance, damped64(gram, damping)) * distance).sum(1);
}
double error64(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& gram) {
  return errors64(weight, pruned, gram).sum().item<double>();
}

/// Least squares of one row on the kept columns, in float64: the error that no other weights on
/// this mask go below.
double least_error(const at::Tensor& row, const std::vector<int64_t>& kept,
                   const at::Tensor& damped) {
  const at::Tensor index = at::tensor(kept), w = row.to(at::kDouble);
  const at::Tensor target = at::mv(damped, w).index_select(0, index);
  const at::Tensor system = damped.index_select(0, index).index_select(1, index);
  const at::Tensor x = at::linalg_solve(system, target);
  at::Tensor best = at::zeros_like(w);
  best.index_copy_(0, index, x);
  return (w - best).dot(at::mv(damped, w - best)).item<double>();
}

std::vector<int64_t> columns_of(uint32_t bits) {
  std::vector<int64_t> columns;
  for (; bits != 0; bits &= bits - 1) columns.push_back(std::countr_zero(bits));
  return columns;
}

uint32_t bits_of(const at::Tensor& mask) {
  uint32_t bits = 0;
  for (int64_t j = 0; j < mask.numel(); ++j) bits |= uint32_t{mask[j].item<bool>()} << j;
  return bits;
}

/// Whether a mask of 12 columns is under 2:4.
bool two_of_four(uint32_t bits) {
  for (int first = 0; first < 12; first += 4)
    if (std::popcount(bits >> first & 15u) != 2) return false;
  return true;
}

TEST(Compose, FindsCombinationsAndSpellsTheOthersOut) {
  EXPECT_EQ(made({.method = "alps"}).name(), "alps");
  EXPECT_EQ(made({.score = "wanda"}).name(), "wanda");
  EXPECT_EQ(made({.solve = "sparsegpt"}).name(), "sparsegpt");
  EXPECT_EQ(made({.score = "hessian", .solve = "exact"}).name(), "hessian");
  EXPECT_EQ(made({.method = "wanda", .refine = {"dsnot"}}).name(), "dsnot");
  EXPECT_EQ(made({.method = "dsnot", .refine = {"none"}}).name(), "wanda");
  EXPECT_EQ(made({.method = "alps", .score = "wanda", .refine = {"swaps", "polish"}}).name(),
            "score=wanda solve=alps refine=swaps,polish");
  EXPECT_EQ(made({.method = "wanda", .score = "own", .solve = "sparsegpt"}).name(), "sparsegpt");
  // What a person would get from the parts is what the stages need.
  EXPECT_FALSE(made({.score = "magnitude"}).needs_inputs());
  EXPECT_TRUE(made({.score = "magnitude", .refine = {"swaps"}}).needs_gram());
  EXPECT_FALSE(made({.score = "ria"}).needs_gram());
}

TEST(Compose, RefusesByNameWhatDoesNotFit) {
  const struct {
    MethodChoice choice;
    const char* named;
  } cases[] = {{{.score = "loudness"}, "--score: unknown stage (got loudness; need one of magnit"},
               {{.score = "wanda", .solve = "magic"}, "need one of none, sparsegpt, exact, alps"},
               {{.method = "wanda", .refine = {"swap"}}, "need one of swaps, polish, dsnot"},
               {{.solve = "exact"}, "--solve exact: can't choose weights by itself. Give --score"},
               {{}, "--solve none: can't choose"},
               {{.method = "alps", .refine = {"dsnot"}}, "--refine dsnot: takes weights as they"}};
  for (const auto& bad : cases) {
    const auto method = compose(bad.choice);
    ASSERT_FALSE(method.ok()) << bad.named;
    EXPECT_EQ(method.error().code, Code::kUsage);
    EXPECT_THAT(method.error().message, HasSubstr(bad.named));
  }
}

TEST(Compose, EveryPairOfScoreAndSolverHitsItsCounts) {
  const InputStatistics statistics = statistics_of(correlated_inputs(400, 90, 1));
  const at::Tensor weight = random_matrix(40, 90, 2);
  const at::Tensor gradient = random_matrix(40, 90, 3).abs();
  for (const std::string& score : score_names())
    for (const std::string& solve : solver_names()) {
      const auto method = compose({.score = score, .solve = solve});
      if (!method.ok()) continue;  // what chooses by itself only
      for (const Pattern& pattern :
           {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::block(4, 9)}) {
        const auto pruned =
            method->prune(weight, statistics, {.pattern = pattern, .gradient = gradient});
        ASSERT_TRUE(pruned.ok()) << method->name() << pruned.error().message;
        const int64_t due = pattern.kind == format::PatternKind::kKeepOf ? 40 * 44 : 40 * 90 / 2;
        EXPECT_EQ(dropped(pruned->mask), due) << method->name() << " " << pattern.text();
        EXPECT_EQ(pruned->weight.masked_select(pruned->mask.logical_not())
                      .count_nonzero()
                      .item<int64_t>(),
                  0);
        // A given mask is kept by all but ADMM, which starts from it.
        if (score != "own" && solve != "alps") {
          EXPECT_TRUE(at::equal(pruned->mask, prune({.score = score}, weight, statistics,
                                                    {.pattern = pattern, .gradient = gradient})
                                                  .mask))
              << method->name() << " " << pattern.text();
        }
      }
    }
}

TEST(Ria, ScoresAWeightByItsShareOfRowAndColumn) {
  InputStatistics statistics;
  statistics.square_sums = at::tensor({16.f, 1.f});
  const at::Tensor weight = at::tensor({1.f, -3.f, 3.f, 0.f}).view({2, 2});
  // Norms 4 and 1; their roots 2 and 1.
  const at::Tensor expected =
      at::tensor({2 * (1.f / 4 + 1.f / 4), 3.f / 4 + 1.f, 2 * (1.f + 3.f / 4), 0.f}).view({2, 2});
  EXPECT_TRUE(at::allclose(ria_score().scores({weight, statistics, {}, {}}), expected));
  const at::Tensor zeros = at::zeros({3, 2});
  EXPECT_TRUE(ria_score().scores({zeros, statistics, {}, {}}).isfinite().all().item<bool>());
}

TEST(Hessian, ScoresWhatRemovingOneWeightCosts) {
  const at::Tensor weight = random_matrix(1, 12, 3);
  InputStatistics statistics = statistics_of(correlated_inputs(60, 12, 4));
  ASSERT_TRUE(hessian_score().prepare(statistics, {}).ok());
  const at::Tensor scores = hessian_score().scores({weight, statistics, {}, {}});
  const at::Tensor damped = damped64(statistics.gram, 0.01);
  for (int64_t j = 0; j < 12; ++j) {
    // H = 2/sequences G, and the loss of removing w_j is w_j^2 / [G^-1]_jj.
    const double cost = least_error(weight[0], columns_of(0xfffu & ~(1u << j)), damped);
    EXPECT_NEAR(scores[0][j].item<double>(), 2 * cost, 1e-4 * 2 * cost) << j;
  }
}

TEST(DampedGram, ScalesToAUnitDiagonalAndBack) {
  at::Tensor x = correlated_inputs(100, 20, 5);
  x.select(1, 3).zero_();
  const at::Tensor gram = statistics_of(x).gram;
  const auto damped = damped_gram(gram, 0.05, Executor::serial());
  ASSERT_TRUE(damped.ok());
  const at::Tensor norms = damped->norms.to(at::kDouble);
  EXPECT_TRUE(at::allclose(damped->unit.to(at::kDouble) * norms * norms.unsqueeze(1),
                           damped64(gram, 0.05), 1e-5, 1e-4));
  const at::Tensor weight = random_matrix(6, 20, 6), other = random_matrix(6, 20, 7);
  const double error = errors64(weight, other, gram, 0.05).sum().item<double>();
  EXPECT_NEAR(damped_error(weight, other, *damped, Executor::serial()), error, 1e-5 * error);
  const auto silent = damped_gram(at::zeros({4, 4}), 0.01, Executor::serial());
  ASSERT_TRUE(silent.ok());
  EXPECT_TRUE(at::equal(silent->unit, at::eye(4)));
}

TEST(Spectrum, InvertsForAnyRho) {
  model::set_threads(2);  // after this MKL no longer notices by itself where it must not fork
  for (const int64_t n : {5, 128, 300, 1024}) {
    const auto damped =
        damped_gram(statistics_of(correlated_inputs(3 * n, n, 8)).gram, 0.01, Executor::serial());
    const auto spectrum = Spectrum::of(*damped);
    ASSERT_TRUE(spectrum.ok());
    for (const double rho : {0.004, 0.1, 3.0, 1e4}) {
      at::Tensor shifted = damped->unit.to(at::kDouble).clone();
      shifted.diagonal().add_(rho);
      const at::Tensor product =
          at::mm(spectrum->shrinkage(rho, Executor::serial()).to(at::kDouble), shifted) / rho;
      EXPECT_TRUE(at::allclose(product, at::eye(n, at::kDouble), 0, 2e-4)) << n << " " << rho;
    }
    EXPECT_TRUE(spectrum->shrinkage(0.1, Executor::serial())
                    .is_same(spectrum->shrinkage(0.1, Executor::serial())));
  }
}

TEST(ConjugateGradients, ReachLeastSquaresAndNeverRaiseARow) {
  const at::Tensor gram = statistics_of(correlated_inputs(300, 60, 9)).gram;
  const auto damped = damped_gram(gram, 0.01, Executor::serial());
  const at::Tensor weight = random_matrix(20, 60, 10), mask = random_matrix(20, 60, 11) > 0;
  const at::Tensor dense = damped->scaled(weight);
  double last = std::numeric_limits<double>::infinity();
  for (const int64_t steps : {0, 1, 3, 10, 200}) {
    const at::Tensor scaled = dense * mask;
    conjugate_gradients(*damped, dense, mask, scaled, steps, 1e-6, Executor::serial());
    const at::Tensor after = errors64(weight, damped->weight(scaled, mask), gram);
    EXPECT_TRUE((after <= errors64(weight, weight * mask, gram) * (1 + 1e-6)).all().item<bool>());
    EXPECT_LE(after.sum().item<double>(), last);
    last = after.sum().item<double>();
  }
  double least = 0;
  for (int64_t r = 0; r < 20; ++r) {
    const at::Tensor kept = mask[r].nonzero().flatten();
    least += least_error(
        weight[r], {kept.const_data_ptr<int64_t>(), kept.const_data_ptr<int64_t>() + kept.numel()},
        damped64(gram, 0.01));
  }
  EXPECT_NEAR(last, least, 1e-4 * least);
}

TEST(Exact, IsLeastSquaresOnItsMask) {
  const InputStatistics statistics = statistics_of(correlated_inputs(60, 12, 12));
  const at::Tensor weight = random_matrix(12, 12, 13);
  for (const char* score : {"magnitude", "wanda", "ria", "hessian"})
    for (const Pattern& pattern :
         {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::block(3, 4)}) {
      const Pruned pruned =
          prune({.score = score, .solve = "exact"}, weight, statistics, {.pattern = pattern});
      EXPECT_FALSE(pruned.fell_back);
      const at::Tensor errors = errors64(weight, pruned.weight, statistics.gram);
      for (int64_t r = 0; r < 12; ++r) {
        const double least = least_error(weight[r], columns_of(bits_of(pruned.mask[r])),
                                         damped64(statistics.gram, 0.01));
        EXPECT_NEAR(errors[r].item<double>(), least, 1e-4 * least + 1e-6) << score << " " << r;
      }
    }
}

/// The least error of a row over all masks of 12 columns with as many kept, by brute force.
double best_of_all(const at::Tensor& row, int kept, bool grouped, const at::Tensor& damped) {
  double best = std::numeric_limits<double>::infinity();
  for (uint32_t bits = 0; bits < 1u << 12; ++bits)
    if (std::popcount(bits) == kept && (!grouped || two_of_four(bits)))
      best = std::min(best, least_error(row, columns_of(bits), damped));
  return best;
}

TEST(Alps, ComesCloseToTheBestOfAllMasksOf12Columns) {
  double alps = 0, sparsegpt = 0, best = 0;
  for (const bool grouped : {false, true})
    for (uint64_t seed = 0; seed < 3; ++seed) {
      const InputStatistics statistics = statistics_of(correlated_inputs(60, 12, 100 + seed));
      const at::Tensor weight = random_matrix(12, 12, 200 + seed);
      Request request{.pattern = grouped ? Pattern::keep_of(2, 4) : Pattern::unstructured()};
      if (!grouped) request.group = Group::kRow;
      const auto error = [&](const char* name) {
        return error64(weight, prune({.method = name}, weight, statistics, request).weight,
                       statistics.gram);
      };
      const at::Tensor damped = damped64(statistics.gram, 0.01);
      double least = 0;
      for (int64_t r = 0; r < 12; ++r) least += best_of_all(weight[r], 6, grouped, damped);
      EXPECT_GE(error("alps"), least * (1 - 1e-5)) << seed;
      alps += error("alps"), sparsegpt += error("sparsegpt"), best += least;
    }
  EXPECT_LT(alps, 1.25 * best);
  EXPECT_LT(alps, 0.9 * sparsegpt);
}

TEST(Alps, LosesLessThanSparseGptUnderEveryPattern) {
  const at::Tensor weight = random_matrix(64, 192, 14);
  const InputStatistics statistics = statistics_of(correlated_inputs(2000, 192, 15));
  for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4),
                                 Pattern::keep_of(1, 3), Pattern::block(4, 8)})
    for (const double sparsity : {0.3, 0.5, 0.7, 0.9})
      for (const std::optional<Group> group :
           {std::optional<Group>(), std::optional(Group::kRow), std::optional(Group::kBlock128)}) {
        if (group && pattern.kind == format::PatternKind::kKeepOf) continue;
        const Request request{.pattern = pattern, .sparsity = sparsity, .group = group};
        const Pruned alps = prune({.method = "alps"}, weight, statistics, request);
        const Pruned other = prune({.method = "sparsegpt"}, weight, statistics, request);
        EXPECT_EQ(dropped(alps.mask), dropped(other.mask));
        EXPECT_LT(error64(weight, alps.weight, statistics.gram),
                  error64(weight, other.weight, statistics.gram))
            << pattern.text() << " " << sparsity;
        EXPECT_GT(alps.iterations, 0);
        EXPECT_FALSE(alps.fell_back);
      }
}

TEST(Alps, RaisesTheDampingWhereInputsHaveAlmostNoRank) {
  // As calibration of a few tokens leaves it: float32 sums with directions of negative length.
  const at::Tensor x = at::mm(random_matrix(4, 4, 18), random_matrix(4, 256, 19));
  const InputStatistics statistics = statistics_of(x);
  const at::Tensor weight = random_matrix(64, 256, 20);
  for (const MethodChoice& choice :
       {MethodChoice{.method = "alps"}, MethodChoice{.method = "wanda", .refine = {"polish"}}}) {
    const Pruned pruned = prune(choice, weight, statistics, {.damping = 1e-12});
    EXPECT_LT(error64(weight, pruned.weight, statistics.gram),
              error64(weight, weight * pruned.mask, statistics.gram));
    ASSERT_FALSE(pruned.warnings.empty());
    EXPECT_THAT(pruned.warnings[0], HasSubstr("damping raised"));
    EXPECT_EQ(prune(choice, weight, statistics, {}).warnings.size(), 0u) << "at the usual damping";
  }
}

TEST(Alps, GivesTheSameBitsOnAnyThreadCountAndSharesItsSpectrum) {
  const at::Tensor weight = random_matrix(200, 300, 16);
  InputStatistics statistics = statistics_of(correlated_inputs(1000, 300, 17));
  for (const MethodChoice& choice : {MethodChoice{.method = "alps", .refine = {"swaps", "polish"}},
                                     MethodChoice{.score = "ria", .solve = "exact"},
                                     MethodChoice{.score = "wanda", .refine = {"swaps"}}}) {
    at::Tensor first;
    for (int threads : {1, 2, 3}) {
      model::set_threads(threads);
      const Pruned pruned =
          prune(choice, weight, statistics, {.executor = model::torch_executor()});
      if (!first.defined()) first = pruned.weight;
      EXPECT_TRUE(at::equal(pruned.weight, first))
          << threads << " threads, " << made(choice).name();
    }
    model::set_threads(0);
  }
  const at::Tensor alone = prune({.method = "alps"}, weight, statistics, {}).weight;
  ASSERT_TRUE(made({.method = "alps"}).prepare(statistics, {}).ok());
  ASSERT_TRUE(statistics.spectrum);
  statistics.gram.fill_(1);  // no longer looked at
  EXPECT_TRUE(at::equal(prune({.method = "alps"}, weight, statistics, {}).weight, alone));
}

/// Of a row of 12: whether no exchange of a kept for a dropped weight lowers the error, kept ones
/// at their dense values.
bool no_swap_helps(const at::Tensor& row, uint32_t kept, bool grouped, const at::Tensor& damped) {
  const auto error = [&](uint32_t bits) {
    at::Tensor distance = row.to(at::kDouble).clone();
    for (int64_t j : columns_of(bits)) distance[j] = 0;
    return distance.dot(at::mv(damped, distance)).item<double>();
  };
  const double now = error(kept);
  for (int k = 0; k < 12; ++k)
    for (int q = 0; q < 12; ++q) {
      if (!(kept >> k & 1u) || (kept >> q & 1u) || (grouped && k / 4 != q / 4)) continue;
      if (error((kept & ~(1u << k)) | 1u << q) < now * (1 - 1e-5)) return false;
    }
  return true;
}

TEST(Swaps, EndWhereNoSwapHelpsAgainstABruteForce) {
  for (const bool grouped : {false, true})
    for (uint64_t seed = 0; seed < 8; ++seed) {
      const InputStatistics statistics = statistics_of(correlated_inputs(40, 12, 300 + seed));
      const at::Tensor weight = random_matrix(12, 12, 400 + seed);
      const Request request{.pattern = grouped ? Pattern::keep_of(2, 4) : Pattern::unstructured()};
      const Pruned before = prune({.score = "wanda"}, weight, statistics, request);
      const Pruned after =
          prune({.score = "wanda", .refine = {"swaps"}}, weight, statistics, request);
      EXPECT_TRUE(at::equal(after.mask.sum(1), before.mask.sum(1)));
      EXPECT_TRUE(at::equal(after.weight, weight * after.mask));
      const at::Tensor old = errors64(weight, before.weight, statistics.gram);
      EXPECT_TRUE((errors64(weight, after.weight, statistics.gram) <= old).all().item<bool>());
      for (int64_t r = 0; r < 12; ++r) {
        const uint32_t kept = bits_of(after.mask[r]);
        EXPECT_TRUE(!grouped || two_of_four(kept));
        EXPECT_TRUE(no_swap_helps(weight[r], kept, grouped, damped64(statistics.gram, 0.01)))
            << seed << " row " << r << (grouped ? " 2:4" : "");
      }
    }
}

TEST(Refinements, NeverRaiseTheDampedErrorAndKeepThePattern) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const int64_t n = 40 + 13 * static_cast<int64_t>(seed);
    const InputStatistics statistics = statistics_of(correlated_inputs(4 * n, n, 500 + seed));
    const at::Tensor weight = seed % 2 == 0 ? random_matrix(30, n, seed) : tied_matrix(30, n, seed);
    for (const Pattern& pattern :
         {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(3, 8)})
      for (const MethodChoice& start :
           {MethodChoice{.score = "magnitude"}, MethodChoice{.score = "wanda", .solve = "exact"},
            MethodChoice{.method = "sparsegpt"}, MethodChoice{.method = "alps"}}) {
        const Pruned before = prune(start, weight, statistics, {.pattern = pattern});
        const double old = error64(weight, before.weight, statistics.gram);
        for (const std::vector<std::string>& refine : std::vector<std::vector<std::string>>{
                 {"swaps"}, {"polish"}, {"swaps", "polish"}, {"polish", "swaps"}}) {
          MethodChoice refined = start;
          refined.refine = refine;
          const Pruned after = prune(refined, weight, statistics, {.pattern = pattern});
          EXPECT_LE(error64(weight, after.weight, statistics.gram), old * (1 + 1e-5))
              << made(refined).name() << " " << pattern.text();
          EXPECT_TRUE(at::equal(after.mask.sum(1), before.mask.sum(1))) << made(refined).name();
          if (pattern.kind == format::PatternKind::kKeepOf) {
            const int64_t whole = n / pattern.of * pattern.of;
            const at::Tensor groups = after.mask.narrow(1, 0, whole).reshape({-1, pattern.of});
            EXPECT_TRUE((groups.sum(1) == pattern.keep).all().item<bool>());
          }
        }
      }
  }
}

/// Promises to make nothing worse, and does.
class Worse final : public Refinement {
 public:
  std::string_view name() const override { return "worse"; }
  Needs needs() const override { return Needs::kGram; }
  bool never_raises_the_damped_error() const override { return true; }
  bool takes_changed_weights() const override { return true; }
  Status prepare(InputStatistics& statistics, const Request& request) const override {
    return prepare_damped(statistics, request);
  }
  Status refine(const Problem&, bool, Pruned& pruned) const override {
    pruned.weight.mul_(0.99);
    return {};
  }
};

TEST(Refinements, ThatBreakTheirPromiseStopTheRun) {
  const Worse worse;
  const Method method("", nullptr, alps_solver(), {&worse});
  const auto pruned =
      method.prune(random_matrix(20, 40, 1), statistics_of(correlated_inputs(200, 40, 2)), {});
  ASSERT_FALSE(pruned.ok());
  EXPECT_EQ(pruned.error().code, Code::kCheckFailed);
  EXPECT_THAT(pruned.error().message, HasSubstr("worse: raised the damped error"));
}

TEST(Refinements, SayWhichPatternsTheyCantDo) {
  const InputStatistics statistics = statistics_of(correlated_inputs(200, 40, 2));
  for (const char* refine : {"swaps", "dsnot"}) {
    const auto pruned =
        made({.score = "wanda", .refine = {refine}})
            .prune(random_matrix(20, 40, 1), statistics, {.pattern = Pattern::block(4, 4)});
    ASSERT_FALSE(pruned.ok());
    EXPECT_EQ(pruned.error().code, Code::kUsage);
    EXPECT_THAT(pruned.error().message, HasSubstr("can't do block:4x4"));
  }
}

TEST(Dsnot, BringsTheMeanOutputsCloserAndKeepsTheCountsOfRows) {
  const at::Tensor x = correlated_inputs(500, 96, 18) + 0.5;
  const InputStatistics statistics = statistics_of(x);
  const at::Tensor weight = random_matrix(40, 96, 19);
  for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)}) {
    const Pruned before = prune({.score = "wanda"}, weight, statistics, {.pattern = pattern});
    const Pruned after = prune({.method = "dsnot"}, weight, statistics, {.pattern = pattern});
    const auto off = [&](const Pruned& one) {
      return at::mv(weight - one.weight, statistics.sums).abs();
    };
    if (pattern.kind == format::PatternKind::kUnstructured) {  // within a group signs may not fit
      EXPECT_TRUE((off(after) <= off(before) + 1e-3).all().item<bool>());
    }
    EXPECT_LT(off(after).sum().item<float>(), 0.5 * off(before).sum().item<float>());
    EXPECT_TRUE(at::equal(after.mask.sum(1), before.mask.sum(1)));
    EXPECT_TRUE(at::equal(after.weight, weight * after.mask));
  }
}

TEST(KeepLargestOfAll, IsKeepLargestOfOneRow) {
  for (const int64_t n : {1, 5, 1000, 70000, 200001})
    for (const at::Tensor& scores :
         {random_matrix(1, n, 20), random_matrix(1, n, 20).abs(), tied_matrix(1, n, 21),
          at::zeros({1, n}), random_matrix(1, n, 22) * 1e-40})
      for (const int64_t keep : {int64_t{0}, int64_t{1}, n / 3, n / 2, n - 1, n})
        EXPECT_TRUE(at::equal(keep_largest_of_all(scores, keep, model::torch_executor()),
                              keep_largest(scores, keep)))
            << keep << " of " << n;
}

}  // namespace
}  // namespace lacuna::prune
