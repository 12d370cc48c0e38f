// What pruning does otherwise on a GPU, against the forms that run on a CPU.
#include <gtest/gtest.h>

#include <chrono>

#include "lacuna/model/torch.h"
#include "lacuna/prune/column_loop.h"
#include "lacuna/prune/inverse_factor.h"
#include "lacuna/prune/phase_clock.h"
#include "lacuna/prune/selection.h"
#include "lacuna/prune/statistics.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using testing::correlated_inputs;
using testing::random_matrix;
using testing::statistics_of;
using testing::tied_matrix;

const at::Device kGpu(at::kCUDA, 0);

class PruneOnAGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto device = model::open_device("cuda");
    if (!device.ok()) GTEST_SKIP() << device.error().message;
    model::set_threads(0);
  }
};

double distance(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor exact = b.to(at::kCPU, at::kDouble);
  return ((a.to(at::kCPU, at::kDouble) - exact).norm() / exact.norm()).item<double>();
}

InputStatistics on_gpu(const InputStatistics& from) {
  InputStatistics to = from;
  to.gram = from.gram.to(kGpu);
  to.square_sums = from.square_sums.to(kGpu);
  return to;
}

TEST_F(PruneOnAGpu, GramMatricesAreSumsOfExactProducts) {
  for (const auto type : {at::kFloat, at::kBFloat16, at::kHalf})
    for (const int64_t width : {7, 300, 2100, 4200}) {  // one strip, and several with a short one
      const at::Tensor x = random_matrix(600, width, 1).view({2, 300, width}).to(kGpu, type);
      const auto sum_up = [&] {
        std::vector<GramSum> sums;
        sums.emplace_back(width, kGpu);
        sums[0].queue(x.narrow(0, 0, 1));
        add_queued(sums, Executor::serial());
        sums[0].queue(x.narrow(0, 1, 1));
        add_queued(sums, Executor::serial());
        return sums[0].take();
      };
      const InputStatistics sum = sum_up();
      const at::Tensor exact = x.view({600, width}).to(at::kDouble);
      ASSERT_EQ(sum.gram.scalar_type(), at::kFloat);
      // A float32 sum of 600 terms, whichever the type: bfloat16 outputs would be off by 2e-3.
      EXPECT_LT(distance(sum.gram, at::mm(exact.t(), exact)), 2e-6) << type << " " << width;
      EXPECT_TRUE(at::equal(sum.gram, sum.gram.t()));
      EXPECT_LT(distance(sum.square_sums, exact.square().sum({0})), 2e-7);
      EXPECT_EQ(sum.tokens, 600);
      EXPECT_TRUE(at::equal(sum_up().gram, sum.gram)) << "not the same bits twice";
    }
}

TEST_F(PruneOnAGpu, FactorsAsOnACpu) {
  for (const int64_t n : {1, 100, 513, 1500}) {  // below, at and above what substitution takes
    InputStatistics statistics = statistics_of(correlated_inputs(2 * n + 100, n, 2));
    if (n > 100) {
      statistics.gram.select(0, 5).zero_();
      statistics.gram.select(1, 5).zero_();
    }
    const auto cpu = inverse_factor(statistics, 0.01, model::torch_executor());
    const auto gpu = inverse_factor(on_gpu(statistics), 0.01, Executor::serial());
    ASSERT_TRUE(cpu.ok() && gpu.ok());
    EXPECT_LT(distance(gpu->upper, cpu->upper), 1e-4) << n;
    EXPECT_TRUE(at::equal(gpu->upper, gpu->upper.triu()));
    EXPECT_TRUE(at::equal(gpu->dead.cpu(), cpu->dead));
    const at::Tensor upper = gpu->upper.to(at::kDouble);
    at::Tensor hessian = statistics.gram.to(kGpu, at::kDouble) * 2;
    hessian.diagonal().masked_fill_(gpu->dead, 1);
    hessian.diagonal().add_(hessian.diagonal().mean() * 0.01);
    const at::Tensor product = at::mm(at::mm(upper.t(), upper), hessian);
    EXPECT_TRUE(at::allclose(product, at::eye(n, product.options()), 0, 1e-3)) << n;
    const auto again = inverse_factor(on_gpu(statistics), 0.01, Executor::serial());
    EXPECT_TRUE(at::equal(again->upper, gpu->upper)) << "not the same bits twice";
  }
}

TEST_F(PruneOnAGpu, RaisesTheDampingWhenCholeskyFails) {
  const at::Tensor x = at::mm(random_matrix(400, 3, 8), random_matrix(3, 64, 9));
  const auto factor = inverse_factor(on_gpu(statistics_of(x)), 1e-12, Executor::serial());
  ASSERT_TRUE(factor.ok());
  EXPECT_GT(factor->damping, 1e-12);
  EXPECT_FALSE(factor->warnings.empty());
}

TEST_F(PruneOnAGpu, ItsColumnLoopAgreesWithRows) {
  if (const auto refusal = model::gpu_library_refusal()) GTEST_SKIP() << *refusal;
  const InputStatistics statistics = statistics_of(correlated_inputs(900, 460, 14));
  const auto factor = inverse_factor(statistics, 0.01, Executor::serial());
  const at::Tensor upper = factor->upper.to(kGpu);
  for (auto [keep, of] : {std::pair{0, 0}, {2, 4}, {1, 6}, {3, 7}, {5, 64}})
    for (const int64_t height : {1, 33, 130}) {
      const at::Tensor rows = random_matrix(height, 460, 15), gpu = rows.to(kGpu);
      const at::Tensor rows_mask = random_matrix(height, 460, 16) > 0;
      const at::Tensor gpu_mask = rows_mask.to(kGpu);
      const int64_t wide = of == 0 ? 300 : 128 / of * of;  // a given mask takes any width
      for (int64_t first = 0; first < 460; first += wide) {
        const int64_t width = std::min<int64_t>(wide, 460 - first);
        column_loop_rows({rows, rows_mask, factor->upper, first, width, keep, of},
                         Executor::serial());
        column_loop_gpu({gpu, gpu_mask, upper, first, width, keep, of});
      }
      EXPECT_TRUE(at::equal(rows_mask, gpu_mask.cpu())) << keep << ":" << of << " " << height;
      EXPECT_LT(distance(gpu, rows), 1e-5) << keep << ":" << of << " " << height;
    }
}

TEST_F(PruneOnAGpu, BreaksTiesAsOnACpu) {
  for (const int64_t n : {5, 1000, 70000}) {
    const at::Tensor scores = tied_matrix(1, n, 3);
    for (const int64_t keep : {int64_t{0}, int64_t{1}, n / 3, n - 1, n})
      EXPECT_TRUE(at::equal(keep_largest(scores.to(kGpu), keep).cpu(), keep_largest(scores, keep)))
          << keep << " of " << n;
  }
  const at::Tensor rows = tied_matrix(50, 400, 4);
  EXPECT_TRUE(at::equal(keep_largest(rows.to(kGpu), 100).cpu(), keep_largest(rows, 100)));
}

TEST_F(PruneOnAGpu, LosesAsLittleAsOnACpuAndRepeatsItsBits) {
  const at::Tensor weight = random_matrix(300, 700, 17);
  const InputStatistics statistics = statistics_of(correlated_inputs(1500, 700, 18));
  const Method& method = **find_method("sparsegpt");
  for (const Pattern& pattern :
       {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::block(4, 8)}) {
    const auto cpu = method.prune(weight, statistics, {.pattern = pattern});
    const auto gpu = method.prune(weight.to(kGpu), on_gpu(statistics), {.pattern = pattern});
    ASSERT_TRUE(cpu.ok() && gpu.ok());
    EXPECT_EQ(testing::dropped(gpu->mask), testing::dropped(cpu->mask));
    const double lost = relative_error(weight, cpu->weight, statistics.gram);
    EXPECT_NEAR(relative_error(weight.to(kGpu), gpu->weight, statistics.gram.to(kGpu)), lost,
                1e-3 * lost)
        << pattern.text();
    // A score near the threshold may fall on the other side, and changes the row to its right.
    EXPECT_LT((gpu->mask.cpu() != cpu->mask).sum().item<double>(), 1e-3 * 300 * 700);
    const auto again = method.prune(weight.to(kGpu), on_gpu(statistics), {.pattern = pattern});
    EXPECT_TRUE(at::equal(again->weight, gpu->weight)) << pattern.text();
  }
}

TEST_F(PruneOnAGpu, AlpsLosesAsLittleWithRoundedProductsAndRepeatsItsBits) {
  const at::Tensor weight = random_matrix(300, 700, 19);
  const InputStatistics statistics = statistics_of(correlated_inputs(1500, 700, 20));
  const Method& method = **find_method("alps");
  for (const Pattern& pattern : {Pattern::unstructured(), Pattern::keep_of(2, 4)}) {
    const auto cpu = method.prune(weight, statistics, {.pattern = pattern});
    for (const bool rounded : {false, true}) {
      const Request request{.pattern = pattern, .rounded_products = rounded};
      const auto gpu = method.prune(weight.to(kGpu), on_gpu(statistics), request);
      ASSERT_TRUE(cpu.ok() && gpu.ok());
      EXPECT_EQ(testing::dropped(gpu->mask), testing::dropped(cpu->mask));
      EXPECT_FALSE(gpu->fell_back);
      const double lost = relative_error(weight, cpu->weight, statistics.gram);
      EXPECT_NEAR(relative_error(weight.to(kGpu), gpu->weight, statistics.gram.to(kGpu)), lost,
                  (rounded ? 5e-3 : 1e-3) * lost)
          << pattern.text() << (rounded ? " rounded" : "");
      const auto again = method.prune(weight.to(kGpu), on_gpu(statistics), request);
      EXPECT_TRUE(at::equal(again->weight, gpu->weight)) << pattern.text();
      EXPECT_EQ(at::globalContext().float32MatmulPrecision(), at::Float32MatmulPrecision::HIGHEST);
    }
  }
}

void expect_phases_add_up(at::Device device) {
  const auto start = std::chrono::steady_clock::now();
  PhaseClock clock(device);
  const at::Tensor x = at::rand({500, 500}, at::TensorOptions().device(device));
  for (int i = 0; i < 2500; ++i) {  // more marks than it holds
    clock.enter("one");
    (void)at::mm(x, x);
    clock.enter("two");
  }
  clock.settle();
  clock.settle();
  const double all =
      std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  ASSERT_EQ(clock.seconds().size(), 2u);
  const auto [one, two] = std::pair{clock.seconds()[0], clock.seconds()[1]};
  EXPECT_EQ(one.first, "one");
  EXPECT_EQ(two.first, "two");
  EXPECT_GT(one.second, two.second);
  EXPECT_LE(one.second + two.second, all * 1.01);
}

TEST(PhaseClock, AddsUpThePhases) { expect_phases_add_up(at::kCPU); }
TEST_F(PruneOnAGpu, ItsPhasesAddUp) { expect_phases_add_up(kGpu); }

}  // namespace
}  // namespace lacuna::prune
