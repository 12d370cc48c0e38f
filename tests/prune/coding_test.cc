#include "lacuna/prune/coding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "lacuna/format/quantize.h"
#include "lacuna/model/torch.h"
#include "lacuna/prune/column_loop.h"
#include "lacuna/prune/damped_gram.h"
#include "lacuna/prune/grid.h"
#include "lacuna/prune/inverse_factor.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using format::Quantization;
using testing::correlated_inputs;
using ::testing::HasSubstr;
using testing::identity_statistics;
using testing::random_matrix;
using testing::statistics_of;

Quantization codes(const char* text) { return *Quantization::parse(text); }

Pruned prune(MethodChoice choice, const at::Tensor& weight, const InputStatistics& statistics,
             const Request& request) {
  choice.codes = !request.quantization.none();
  const auto method = compose(choice);
  EXPECT_TRUE(method.ok()) << (method.ok() ? "" : method.error().message);
  auto pruned = method->prune(weight, statistics, request);
  EXPECT_TRUE(pruned.ok()) << (pruned.ok() ? "" : pruned.error().message);
  return *pruned;
}

/// By definition, in float64.
at::Tensor damped64(const at::Tensor& gram) {
  at::Tensor damped = gram.to(at::kDouble).clone();
  damped.diagonal().add_(damped.diagonal().mean() * 0.01);
  return damped;
}
double error64(const at::Tensor& weight, const at::Tensor& other, const at::Tensor& gram) {
  const at::Tensor distance = weight.to(at::kDouble) - other.to(at::kDouble);
  return (at::mm(distance, damped64(gram)) * distance).sum().item<double>();
}

format::CompactMatrix stored(const Pruned& pruned, const Pattern& pattern,
                             DType values = DType::kF32) {
  auto matrix = coded_matrix(pruned, pattern, values, Executor::serial());
  EXPECT_TRUE(matrix.ok()) << (matrix.ok() ? "" : matrix.error().message);
  return *matrix;
}

/// The mask that a matrix stores, whatever its codes stand for.
at::Tensor stored_mask(const format::CompactMatrix& matrix) {
  at::Tensor mask = at::zeros({matrix.rows, matrix.columns}, at::kBool);
  bool* bits = mask.mutable_data_ptr<bool>();
  for (format::RowWalk walk(matrix, 0); walk.row() < matrix.rows; walk.next())
    for (int64_t j = 0; j < matrix.columns; ++j)
      *bits++ = (walk.bitmap()[j / 8] >> (j % 8) & 1) != 0;
  return mask;
}

/// A pruned weight rounded afterwards, as convert --quantize does.
at::Tensor rounded(const Pruned& pruned, const Pattern& pattern, const Quantization& quantization) {
  const auto compact = format::compress(model::unwrap(pruned.weight), pattern);
  EXPECT_TRUE(compact.ok());
  const auto coded = format::quantize(*compact, quantization);
  EXPECT_TRUE(coded.ok());
  return model::wrap(format::expand(*coded)).clone();
}

const char* const kCodes[] = {"int8",     "int8g64",  "int4", "int4g32z", "int4row",
                              "int4rowz", "int4g128", "fp8",  "fp8g64"};

TEST(Coding, WhatIsStoredIsTheSolversOutputBitByBitAndItsMask) {
  const at::Tensor weight = random_matrix(70, 200, 1);
  const InputStatistics statistics = statistics_of(correlated_inputs(600, 200, 2));
  for (const char* text : kCodes)
    for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4),
                                   Pattern::keep_of(3, 5), Pattern::block(3, 8)})
      for (const MethodChoice& choice :
           {MethodChoice{.method = "sparsegpt"}, MethodChoice{.method = "alps"},
            MethodChoice{.method = "wanda"}}) {
        const Request request{.pattern = pattern, .quantization = codes(text)};
        const Pruned pruned = prune(choice, weight, statistics, request);
        ASSERT_TRUE(pruned.grid);
        const format::CompactMatrix matrix = stored(pruned, pattern);
        EXPECT_TRUE(format::validate(matrix).empty()) << text << " " << pattern.text();
        EXPECT_EQ(matrix.quantization.text(), codes(text).text());
        const Tensor values = format::expand(matrix);
        ASSERT_EQ(values.bytes.size(), pruned.weight.nbytes());
        EXPECT_EQ(
            std::memcmp(values.bytes.data(), pruned.weight.const_data_ptr(), values.bytes.size()),
            0)
            << text << " " << pattern.text() << " " << choice.method;
        EXPECT_TRUE(at::equal(stored_mask(matrix), pruned.mask)) << text << " " << pattern.text();
        // In the file they are rounded where the values' type asks for it, the codes never.
        const format::CompactMatrix half = stored(pruned, pattern, DType::kBF16);
        EXPECT_TRUE(std::ranges::equal(half.values.span(), matrix.values.span()));
      }
}

TEST(Coding, AKeptWeightThatBecomesZeroStaysKept) {
  at::Tensor weight = random_matrix(8, 64, 3);
  weight.slice(1, 0, 64, 2).mul_(1e-3);  // far below a step of the others
  for (const char* method : {"sparsegpt", "alps"}) {
    const Request request{.sparsity = 0.25, .quantization = codes("int4")};
    const Pruned pruned = prune({.method = method}, weight, identity_statistics(64), request);
    const format::CompactMatrix matrix = stored(pruned, request.pattern);
    EXPECT_EQ(format::count_kept(matrix), pruned.mask.sum().item<int64_t>());
    EXPECT_EQ(format::count_kept(matrix), 8 * 64 * 3 / 4);
    EXPECT_GT(format::count_zeros(matrix), 8 * 64 / 4 + 60) << method;
  }
}

TEST(Coding, EncodingRefusesWhatLiesBesideTheGrid) {
  const at::Tensor weight = random_matrix(8, 64, 4);
  const Request request{.quantization = codes("int8")};
  Pruned pruned =
      prune({.method = "alps"}, weight, statistics_of(correlated_inputs(200, 64, 5)), request);
  pruned.weight = pruned.weight * 1.0001;
  const auto matrix = coded_matrix(pruned, request.pattern, DType::kBF16, Executor::serial());
  ASSERT_FALSE(matrix.ok());
  EXPECT_EQ(matrix.error().code, Code::kCheckFailed);
  EXPECT_THAT(matrix.error().message, HasSubstr("no code of its group"));
}

TEST(Coding, TheColumnLoopSpreadsRoundingErrorsByDefinition) {
  // Gaussian elimination instead of a Cholesky factor, in float64.
  const int64_t rows = 12, columns = 40;
  const at::Tensor weight = random_matrix(rows, columns, 6);
  const InputStatistics statistics = statistics_of(correlated_inputs(300, columns, 7));
  const at::Tensor mask = random_matrix(rows, columns, 8) > 0;
  const Request request{.quantization = codes("int4row")};
  Grid grid(request, weight);
  grid.choose(0, weight, mask, at::ones({columns}), Executor::serial());

  at::Tensor hessian = damped64(statistics.gram) * 2.0;  // of one sequence
  at::Tensor left = at::linalg_inv(hessian), expected = weight.to(at::kDouble).clone();
  for (int64_t j = 0; j < columns; ++j) {
    const at::Tensor now = expected.select(1, j).clone();
    const at::Tensor becomes =
        at::where(mask.select(1, j), grid.nearest(j, now.to(at::kFloat)).to(at::kDouble), 0.0);
    expected.narrow(1, j, columns - j).sub_(at::outer((now - becomes) / left[0][0], left[0]));
    expected.select(1, j).copy_(becomes);
    left = (left - at::outer(left.select(1, 0), left[0]) / left[0][0])
               .narrow(0, 1, columns - j - 1)
               .narrow(1, 1, columns - j - 1);
  }

  const auto factor = inverse_factor(statistics, 0.01, Executor::serial());
  ASSERT_TRUE(factor.ok());
  const at::Tensor ours = weight.clone();
  column_loop({ours, mask.clone(), factor->upper, 0, columns, 0, 0, &grid}, Executor::serial());
  // A value within float32's rounding of the middle between two codes may go either way.
  EXPECT_LE((ours.to(at::kDouble) - expected).abs().gt(1e-4).sum().item<int64_t>(), 2);
}

TEST(Coding, TogetherLosesLessThanPruningAndThenRounding) {
  const at::Tensor weight = random_matrix(64, 256, 9);
  const InputStatistics statistics = statistics_of(correlated_inputs(2000, 256, 10));
  for (const char* text : {"int4", "int4row", "int4g64z", "int8", "fp8"})
    for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)})
      for (const MethodChoice& choice :
           {MethodChoice{.method = "sparsegpt"}, MethodChoice{.method = "alps"},
            MethodChoice{.method = "sparsegpt", .refine = {"swaps", "polish"}},
            MethodChoice{.method = "wanda"}}) {
        Request request{.pattern = pattern};
        const Pruned before = prune(choice, weight, statistics, request);
        request.quantization = codes(text);
        const Pruned together = prune(choice, weight, statistics, request);
        EXPECT_EQ(testing::dropped(together.mask), testing::dropped(before.mask));
        EXPECT_LT(error64(weight, together.weight, statistics.gram),
                  error64(weight, rounded(before, pattern, request.quantization), statistics.gram))
            << text << " " << pattern.text() << " " << choice.method;
      }
}

TEST(Coding, OtherMethodsKeepTheMaskThatTheyHaveWithoutCodes) {
  const at::Tensor weight = random_matrix(40, 128, 11);
  const InputStatistics statistics = statistics_of(correlated_inputs(500, 128, 12));
  for (const MethodChoice& choice :
       {MethodChoice{.method = "alps"}, MethodChoice{.method = "wanda"},
        MethodChoice{.method = "alps", .refine = {"swaps", "polish"}},
        MethodChoice{.score = "ria", .solve = "exact"}}) {
    Request request{.pattern = Pattern::keep_of(2, 4)};
    const at::Tensor mask = prune(choice, weight, statistics, request).mask;
    request.quantization = codes("int4");
    EXPECT_TRUE(at::equal(prune(choice, weight, statistics, request).mask, mask));
  }
}

TEST(Coding, DescentEndsWhereNoOtherCodeOfOneWeightIsBetter) {
  for (uint64_t seed = 0; seed < 6; ++seed) {
    const at::Tensor weight = random_matrix(10, 24, 20 + seed);
    const InputStatistics statistics = statistics_of(correlated_inputs(80, 24, 30 + seed));
    const at::Tensor damped = damped64(statistics.gram);
    const Request request{.quantization = codes(seed % 2 == 0 ? "int4row" : "int8")};
    const Pruned pruned = prune({.method = "sparsegpt"}, weight, statistics, request);
    for (int64_t r = 0; r < 10; ++r) {
      const at::Tensor row = weight[r].to(at::kDouble), now = pruned.weight[r].to(at::kDouble);
      const auto error = [&](const at::Tensor& of) {
        return (row - of).dot(at::mv(damped, row - of)).item<double>();
      };
      const format::CodeScale scale = pruned.grid->scales()[static_cast<size_t>(r)];
      for (int64_t j = 0; j < 24; ++j) {
        if (!pruned.mask[r][j].item<bool>()) continue;
        for (int code = 0; code < (seed % 2 == 0 ? 16 : 256); ++code) {
          if (seed % 2 != 0 && code == 0x80) continue;  // int8 has no -128
          at::Tensor other = now.clone();
          other[j] = double{scale.value(static_cast<uint8_t>(code))};
          EXPECT_GE(error(other), error(now) * (1 - 1e-4)) << seed << " " << r << " " << j;
        }
      }
    }
  }
}

TEST(Coding, DescentNeverRaisesTheDampedError) {
  for (const char* text : kCodes) {
    const at::Tensor weight = random_matrix(30, 150, 40);
    const Request request{.quantization = codes(text)};
    InputStatistics statistics = statistics_of(correlated_inputs(400, 150, 41));
    ASSERT_TRUE(prepare_coding(statistics, request).ok());
    const Problem problem{weight, statistics, request, {}};
    Pruned pruned;
    pruned.mask = random_matrix(30, 150, 42) > 0;
    auto grid = std::make_shared<Grid>(request, weight);
    pruned.weight = at::zeros_like(weight);
    for (int64_t group = 0; group < grid->groups(); ++group) {
      const int64_t first = group * grid->width(), width = std::min(grid->width(), 150 - first);
      grid->choose(group, weight.narrow(1, first, width), pruned.mask.narrow(1, first, width),
                   at::ones({width}), Executor::serial());
    }
    for (int64_t j = 0; j < 150; ++j)
      pruned.weight.select(1, j).copy_(grid->nearest(j, weight.select(1, j)));
    pruned.weight.masked_fill_(pruned.mask.logical_not(), 0);
    pruned.grid = grid;
    const double first = error64(weight, pruned.weight, statistics.gram);
    const auto [before, after] = descend(problem, pruned);
    EXPECT_NEAR(before, first, 1e-4 * first);
    EXPECT_LE(after, before);
    EXPECT_NEAR(after, error64(weight, pruned.weight, statistics.gram), 1e-4 * first);
    EXPECT_LT(after, 0.9 * before) << text;  // the mask's errors are made good too
    EXPECT_TRUE(stored(pruned, request.pattern).values.size() > 0);
  }
}

TEST(Coding, GivesTheSameBitsOnAnyThreadCount) {
  const at::Tensor weight = random_matrix(200, 300, 16);
  const InputStatistics statistics = statistics_of(correlated_inputs(1000, 300, 17));
  for (const char* method : {"sparsegpt", "alps"}) {
    at::Tensor first;
    for (const int threads : {1, 2, 3}) {
      model::set_threads(threads);
      const Request request{.quantization = codes("int4"), .coder = model::torch_executor()};
      const Pruned pruned = prune({.method = method}, weight, statistics, request);
      if (!first.defined()) first = pruned.weight;
      EXPECT_TRUE(at::equal(pruned.weight, first)) << threads << " threads, " << method;
    }
    model::set_threads(0);
  }
}

TEST(Coding, ASparsityOfZeroLeavesAQuantisedDenseWeight) {
  const at::Tensor weight = random_matrix(32, 128, 18);
  const InputStatistics statistics = statistics_of(correlated_inputs(500, 128, 19));
  const Request request{.sparsity = 0, .quantization = codes("int4")};
  const Pruned pruned = prune({.method = "alps"}, weight, statistics, request);
  EXPECT_EQ(testing::dropped(pruned.mask), 0);
  const auto nearest = format::quantize(model::unwrap(weight), request.quantization);
  ASSERT_TRUE(nearest.ok());
  EXPECT_LT(error64(weight, pruned.weight, statistics.gram),
            error64(weight, model::wrap(format::expand(*nearest)), statistics.gram));
}

TEST(Coding, NeedsTheGramMatrixWhateverTheMethod) {
  const auto pruned = (*compose({.method = "magnitude", .codes = true}))
                          .prune(random_matrix(8, 16, 1), {}, {.quantization = codes("int4")});
  ASSERT_FALSE(pruned.ok());
  EXPECT_EQ(pruned.error().code, Code::kUsage);
  EXPECT_THAT(pruned.error().message, HasSubstr("needs calibration inputs"));
  EXPECT_TRUE(compose({.method = "magnitude", .codes = true})->needs_gram());
  EXPECT_FALSE(compose({.method = "magnitude"})->needs_gram());
}

}  // namespace
}  // namespace lacuna::prune
