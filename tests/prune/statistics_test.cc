#include "lacuna/prune/statistics.h"

#include <gtest/gtest.h>

#include "lacuna/model/torch.h"
#include "lacuna/prune/chunks.h"
#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using testing::random_matrix;

/// Gram sums of `batches` [1, tokens, width], queued `at_once` at a time.
InputStatistics sum_up(const std::vector<at::Tensor>& batches, size_t at_once, int threads) {
  model::set_threads(threads);
  std::vector<GramSum> sums;
  sums.emplace_back(batches[0].size(2), at::kCPU);
  for (size_t i = 0; i < batches.size(); ++i) {
    sums[0].queue(batches[i]);
    if ((i + 1) % at_once == 0 || i + 1 == batches.size())
      add_queued(sums, model::torch_executor());
  }
  model::set_threads(0);
  return sums[0].take();
}

std::vector<at::Tensor> batches_of(int64_t count, int64_t tokens, int64_t width) {
  std::vector<at::Tensor> batches;
  for (int64_t i = 0; i < count; ++i)
    batches.push_back(random_matrix(tokens, width, static_cast<uint64_t>(i)).unsqueeze(0));
  return batches;
}

TEST(GramSum, IsTheSumOfOuterProducts) {
  for (int64_t width : {1, 7, 256, 300, 520}) {
    const auto batches = batches_of(3, 50, width);
    const InputStatistics statistics = sum_up(batches, 2, 2);
    const at::Tensor x = at::cat(batches, 1).squeeze(0).to(at::kDouble);
    EXPECT_TRUE(at::allclose(statistics.gram.to(at::kDouble), at::mm(x.t(), x), 1e-5, 1e-4));
    EXPECT_TRUE(at::equal(statistics.gram, statistics.gram.t()));
    // Norms decide masks: they are right to the last bits of float32.
    EXPECT_TRUE(at::allclose(statistics.square_sums.to(at::kDouble), x.square().sum({0}), 2e-7, 0));
    EXPECT_EQ(statistics.sequences, 3);
    EXPECT_EQ(statistics.tokens, 150);
  }
}

TEST(GramSum, HasTheSameBitsOnAnyThreadCountAndForAnyCutOfTheQueue) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
    auto batches = batches_of(5, 333, 600);
    for (at::Tensor& batch : batches) batch = batch.to(type);
    const InputStatistics once = sum_up(batches, 5, 1);
    for (int threads : {1, 2, 3})
      for (size_t at_once : {1, 2, 5}) {
        const InputStatistics again = sum_up(batches, at_once, threads);
        EXPECT_TRUE(at::equal(again.gram, once.gram) &&
                    at::equal(again.square_sums, once.square_sums))
            << type << ", " << threads << " threads, " << at_once << " at once";
      }
  }
}

/// In bfloat16 a CPU's matrix units may multiply them; float32 inputs they would round.
TEST(GramSum, TakesProductsOfHalfPrecisionInputsInFloat32) {
  for (const at::ScalarType type : {at::kBFloat16, at::kHalf, at::kFloat}) {
    std::vector<at::Tensor> batches = {random_matrix(400, 300, 1).unsqueeze(0).to(type)};
    const InputStatistics statistics = sum_up(batches, 1, 1);
    ASSERT_EQ(statistics.gram.scalar_type(), at::kFloat);
    const at::Tensor x = batches[0].squeeze(0).to(at::kDouble);
    EXPECT_TRUE(at::allclose(statistics.gram.to(at::kDouble), at::mm(x.t(), x), 1e-6, 1e-4))
        << type;
  }
  // Of two types in one queue the finer one counts.
  std::vector<GramSum> sums;
  sums.emplace_back(300, at::kCPU);
  const at::Tensor x = random_matrix(400, 300, 2), rounded = x.to(at::kBFloat16);
  sums[0].queue(rounded.unsqueeze(0));
  sums[0].queue(x.unsqueeze(0));
  add_queued(sums, model::torch_executor());
  const at::Tensor both = at::cat({rounded.to(at::kDouble), x.to(at::kDouble)});
  EXPECT_TRUE(
      at::allclose(sums[0].take().gram.to(at::kDouble), at::mm(both.t(), both), 1e-6, 1e-4));
}

TEST(ParallelChunks, PassOnWhatAChunkThrows) {
  model::set_threads(2);
  EXPECT_THROW(parallel_chunks(model::torch_executor(), 4,
                               [](int64_t i) {
                                 if (i == 2) throw std::runtime_error("two");
                               }),
               std::runtime_error);
  model::set_threads(0);
}

}  // namespace
}  // namespace lacuna::prune
