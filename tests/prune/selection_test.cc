#include "lacuna/prune/selection.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>

#include "prune/random_matrices.h"

namespace lacuna::prune {
namespace {

using format::Pattern;
using testing::dropped;
using testing::random_matrix;
using testing::tied_matrix;

std::vector<bool> bits(const at::Tensor& mask) {
  const at::Tensor flat = mask.contiguous();
  const bool* data = flat.const_data_ptr<bool>();
  return std::vector<bool>(data, data + flat.numel());
}

TEST(DroppedOf, IsTheFloorOfTheShareAndForgivesTheLastBitsOfAProduct) {
  EXPECT_EQ(dropped_of(10, 0.7), 7);
  EXPECT_EQ(dropped_of(10, 0.1 + 0.2), 3);
  EXPECT_EQ(dropped_of(7, 0.5), 3);
  EXPECT_EQ(dropped_of(640, 0.6), 384);
  EXPECT_EQ(dropped_of(5, 0), 0);
  EXPECT_EQ(dropped_of(5, 1), 5);
}

TEST(KeepLargest, KeepsTheLowerIndexOfEqualScores) {
  const at::Tensor scores = at::tensor({1.f, 2.f, 1.f, 1.f, 2.f, 0.f}).view({1, 6});
  EXPECT_EQ(bits(keep_largest(scores, 3)), (std::vector<bool>{1, 1, 0, 0, 1, 0}));
  EXPECT_EQ(bits(keep_largest(scores, 4)), (std::vector<bool>{1, 1, 1, 0, 1, 0}));
  EXPECT_EQ(dropped(keep_largest(scores, 0)), 6);
  EXPECT_EQ(dropped(keep_largest(scores, 6)), 0);
}

TEST(KeepLargest, ItsFormForOneGroupAgreesWithThatForMany) {
  for (int n : {1, 2, 4, 7, 33, 64}) {
    const at::Tensor scores = tied_matrix(200, n, 3);
    for (int keep = 0; keep <= n; keep += n > 8 ? 5 : 1) {
      const auto many = bits(keep_largest(scores, keep));
      for (int64_t g = 0; g < scores.size(0); ++g) {
        bool one[64];
        keep_largest(scores.const_data_ptr<float>() + g * n, n, keep, one);
        EXPECT_EQ(std::vector<bool>(one, one + n),
                  std::vector<bool>(many.begin() + g * n, many.begin() + (g + 1) * n));
      }
    }
  }
}

TEST(Select, DropsExactlyTheCountInEveryGroupEvenWhenAllScoresAreEqual) {
  for (const at::Tensor& scores :
       {at::zeros({70, 300}), tied_matrix(70, 300, 1).abs(), random_matrix(70, 300, 2).abs()}) {
    for (double sparsity : {0.0, 0.1, 0.5, 0.7, 1.0}) {
      const Pattern pattern = Pattern::unstructured();
      const at::Tensor rows = select(scores, pattern, sparsity, Group::kRow);
      for (int64_t r = 0; r < 70; ++r) EXPECT_EQ(dropped(rows[r]), dropped_of(300, sparsity));
      EXPECT_EQ(dropped(select(scores, pattern, sparsity, Group::kLayer)),
                dropped_of(70 * 300, sparsity));
      const at::Tensor stripes = select(scores, pattern, sparsity, Group::kBlock128);
      EXPECT_EQ(dropped(stripes), dropped_of(70 * 300, sparsity));
      EXPECT_NEAR(dropped(stripes.narrow(1, 128, 128)), 70 * 128 * sparsity, 1);
      EXPECT_NEAR(dropped(stripes.narrow(1, 256, 44)), 70 * 44 * sparsity, 1);
    }
  }
}

TEST(Select, KeepsKeepOfEveryOfForAnyKeepOf) {
  for (auto [keep, of] : {std::pair{2, 4}, {1, 4}, {4, 8}, {3, 5}, {1, 2}, {7, 64}, {63, 64}}) {
    const int64_t groups = 5, columns = groups * of;
    const at::Tensor mask =
        select(tied_matrix(33, columns, 4).abs(), Pattern::keep_of(keep, of), 0, Group::kRow);
    const at::Tensor counts = mask.view({33, groups, of}).sum(2);
    EXPECT_TRUE((counts == keep).all().item<bool>()) << keep << ":" << of;
  }
}

TEST(Select, AShortLastGroupKeepsAtMostItsOwnColumns) {
  for (int64_t rest = 1; rest < 4; ++rest) {
    const at::Tensor mask =
        select(random_matrix(9, 8 + rest, 5).abs(), Pattern::keep_of(2, 4), 0, Group::kRow);
    EXPECT_TRUE((mask.narrow(1, 8, rest).sum(1) == std::min<int64_t>(2, rest)).all().item<bool>());
  }
}

TEST(Select, EqualScoresOfKeepOfLeaveTheLowestIndices) {
  const at::Tensor mask = select(at::zeros({1, 8}), Pattern::keep_of(2, 4), 0, Group::kRow);
  EXPECT_EQ(bits(mask), (std::vector<bool>{1, 1, 0, 0, 1, 1, 0, 0}));
}

TEST(Select, BlocksStayOrGoWholeByTheMeanOfTheirScores) {
  at::Tensor scores = at::zeros({4, 6});
  scores.narrow(0, 0, 2).narrow(1, 0, 3).fill_(1);    // sum 6
  scores.narrow(0, 0, 2).narrow(1, 3, 3).fill_(0.5);  // sum 3
  scores[2][0] = 5;                                   // sum 5
  scores[3][5] = 4;                                   // sum 4
  const at::Tensor layer = select(scores, Pattern::block(2, 3), 0.5, Group::kLayer);
  EXPECT_EQ(bits(layer[0]), (std::vector<bool>{1, 1, 1, 0, 0, 0}));
  EXPECT_EQ(bits(layer[3]), (std::vector<bool>{1, 1, 1, 0, 0, 0}));
  const at::Tensor most = select(scores, Pattern::block(2, 3), 0.75, Group::kLayer);
  EXPECT_EQ(dropped(most), 18);
  EXPECT_TRUE(most[1][2].item<bool>());
}

TEST(Select, BlocksAtTheEdgeMayBeSmaller) {
  for (Group group : {Group::kRow, Group::kLayer, Group::kBlock128}) {
    const at::Tensor mask =
        select(random_matrix(70, 300, 6).abs(), Pattern::block(32, 32), 0.5, group);
    ASSERT_EQ(mask.sizes(), (at::IntArrayRef{70, 300}));
    for (int64_t r = 0; r < 70; r += 32) {
      for (int64_t c = 0; c < 300; c += 32) {
        const at::Tensor block = mask.narrow(0, r, std::min<int64_t>(32, 70 - r))
                                     .narrow(1, c, std::min<int64_t>(32, 300 - c));
        EXPECT_TRUE(block.all().item<bool>() || !block.any().item<bool>());
      }
    }
    EXPECT_NEAR(dropped(mask), 0.5 * 70 * 300, 0.5 * 32 * 32) << group_name(group);
  }
}

TEST(Select, BlocksReachTheSparsityToWithinHalfABlock) {
  for (auto [rows, columns, r, c] : {std::array<int64_t, 4>{200, 150, 48, 48},
                                     {64, 192, 48, 48},
                                     {97, 131, 16, 16},
                                     {33, 300, 1, 7},
                                     {130, 10, 64, 4}}) {
    for (Group group : {Group::kRow, Group::kLayer, Group::kBlock128}) {
      for (double sparsity : {0.0, 0.1, 0.35, 0.5, 0.7, 0.93, 1.0}) {
        const at::Tensor scores = random_matrix(rows, columns, 8).square();
        const at::Tensor mask = select(
            scores, Pattern::block(static_cast<int>(r), static_cast<int>(c)), sparsity, group);
        EXPECT_LE(std::abs(static_cast<double>(dropped(mask)) -
                           sparsity * static_cast<double>(rows * columns)),
                  0.5 * static_cast<double>(r * c) + 1e-6)
            << rows << "x" << columns << " by " << r << "x" << c << ", " << group_name(group)
            << ", " << sparsity;
      }
    }
  }
}

TEST(Select, ASmallBlockAtTheEdgeIsJudgedByItsMean) {
  at::Tensor scores = at::full({4, 6}, 2.f);  // two blocks of 4x4 and 4x2
  scores.narrow(1, 0, 4).fill_(1);            // sums: 16 and 16
  const at::Tensor mask = select(scores, Pattern::block(4, 4), 0.5, Group::kLayer);
  EXPECT_FALSE(mask[0][0].item<bool>());
  EXPECT_TRUE(mask[0][5].item<bool>());
}

TEST(Select, OfEqualBlocksTheFirstAreKept) {
  const at::Tensor mask = select(at::ones({4, 9}), Pattern::block(2, 2), 0.5, Group::kLayer);
  EXPECT_TRUE(mask.narrow(0, 0, 2).all().item<bool>());
  EXPECT_FALSE(mask.narrow(0, 2, 2).any().item<bool>());
}

TEST(StripeColumns, AreTheLargestMultipleOfThePatternWithin128) {
  EXPECT_EQ(stripe_columns(Pattern::unstructured()), 128);
  EXPECT_EQ(stripe_columns(Pattern::keep_of(2, 4)), 128);
  EXPECT_EQ(stripe_columns(Pattern::keep_of(2, 5)), 125);
  EXPECT_EQ(stripe_columns(Pattern::block(32, 48)), 96);
  EXPECT_EQ(stripe_columns(Pattern::block(8, 200)), 200);
}

}  // namespace
}  // namespace lacuna::prune
