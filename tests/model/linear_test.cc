#include "lacuna/model/linear.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cctype>
#include <cstring>

#include "model/models.h"

namespace lacuna::model {
namespace {
using format::Pattern;
using testing::must;

/// A weight that follows the pattern: every second one of a group, block or row is zero.
at::Tensor sparse_weight(int64_t rows, int64_t columns, const Pattern& pattern,
                         at::ScalarType dtype, double share_kept = 0.5) {
  const at::Tensor weight = at::randn({rows, columns});
  const at::Tensor row = at::arange(rows).unsqueeze(1), column = at::arange(columns).unsqueeze(0);
  at::Tensor kept = at::rand({rows, columns}) < share_kept;
  if (pattern.kind == format::PatternKind::kKeepOf)
    kept = (column + row).remainder(pattern.of) < pattern.keep;
  if (pattern.kind == format::PatternKind::kBlock)
    kept = (row.floor_divide(pattern.block_rows) + column.floor_divide(pattern.block_columns))
               .remainder(2)
               .eq(0);
  return (weight * kept).to(dtype);
}

struct Case {
  Pattern pattern;
  int64_t rows, columns;
  at::ScalarType stored, compute;
  double kept = 0.5;  ///< of unstructured weights
};

std::string name_of(const Case& c) {
  std::string name = fmt::format("{}_{}x{}_{}_in_{}", c.pattern.text(), c.rows, c.columns,
                                 c10::toString(c.stored), c10::toString(c.compute));
  if (c.kept != 0.5) name += fmt::format("_kept_{}", c.kept);
  for (char& character : name)
    if (std::isalnum(static_cast<unsigned char>(character)) == 0) character = '_';
  return name;
}

std::vector<Case> cases() {
  std::vector<Case> all;
  const Pattern patterns[] = {Pattern::unstructured(), Pattern::keep_of(2, 4),
                              Pattern::keep_of(1, 4),  Pattern::keep_of(4, 8),
                              Pattern::keep_of(3, 5),  Pattern::block(32, 32),
                              Pattern::block(16, 5)};
  const std::pair<at::ScalarType, at::ScalarType> types[] = {{at::kFloat, at::kFloat},
                                                             {at::kBFloat16, at::kBFloat16},
                                                             {at::kHalf, at::kHalf},
                                                             {at::kBFloat16, at::kFloat},
                                                             {at::kFloat, at::kBFloat16}};
  for (const Pattern& pattern : patterns)
    for (const auto& [stored, compute] : types) {
      all.push_back({pattern, 192, 256, stored, compute});
      all.push_back({pattern, 71, 99, stored, compute});  // no tile comes out even
    }
  for (const auto& [stored, compute] : types)
    for (const double kept : {0.05, 0.0}) {  // by their non-zeros
      all.push_back({Pattern::unstructured(), 192, 700, stored, compute, kept});
      all.push_back({Pattern::unstructured(), 71, 99, stored, compute, kept});
    }
  return all;
}

class CompactLinear : public ::testing::TestWithParam<Case> {
 protected:
  void SetUp() override {
    at::manual_seed(1);
    const Case& c = GetParam();
    weight_ = sparse_weight(c.rows, c.columns, c.pattern, c.stored, c.kept);
    bias_ = at::randn({c.rows}).to(c.compute);
    compact_ = must(Linear::compact(must(format::compress(unwrap(weight_), c.pattern)), bias_,
                                    {at::kCPU, c.compute}));
  }
  at::Tensor weight_, bias_;
  Linear compact_;
};

TEST_P(CompactLinear, IsItsDenseWeight) {
  const Case& c = GetParam();
  EXPECT_TRUE(compact_.is_compact());
  EXPECT_EQ(compact_.out_features(), c.rows);
  EXPECT_EQ(compact_.in_features(), c.columns);
  const at::Tensor weight = compact_.weight();
  EXPECT_EQ(weight.scalar_type(), c.compute);
  EXPECT_TRUE(at::equal(weight, weight_.to(c.compute)));
}

TEST_P(CompactLinear, MultipliesAsTheDenseOne) {
  const Case& c = GetParam();
  const at::Tensor w = weight_.to(c.compute).to(at::kDouble);
  for (const int64_t tokens : {1, 2, 5, 16, 17, 40}) {
    const at::Tensor x = at::randn({1, tokens, c.columns}).to(c.compute);
    const at::Tensor y = compact_.forward(x);
    ASSERT_EQ(y.sizes(), at::IntArrayRef({1, tokens, c.rows}));
    ASSERT_EQ(y.scalar_type(), c.compute);
    const at::Tensor exact = at::linear(x.to(at::kDouble), w, bias_.to(at::kDouble));
    // |y - exact| <= eps |exact| for rounding y, + n 2^-24 |x||W| for summing n products in
    // float32 (products of the compute type are exact in it or round once).
    const double rounding = c.compute == at::kFloat  ? 0x1p-24
                            : c.compute == at::kHalf ? 0x1p-11
                                                     : 0x1p-8;
    const at::Tensor sum =
        at::linear(x.to(at::kDouble).abs(), w.abs(), bias_.to(at::kDouble).abs());
    const at::Tensor bound =
        exact.abs() * rounding + sum * (static_cast<double>(c.columns + 2) * 0x1p-24);
    const at::Tensor excess = (y.to(at::kDouble) - exact).abs() - bound;
    EXPECT_LE(excess.max().item<double>(), 0) << tokens << " tokens";
  }
}

INSTANTIATE_TEST_SUITE_P(Patterns, CompactLinear, ::testing::ValuesIn(cases()),
                         [](const auto& test) { return name_of(test.param); });

TEST(Linear, HoldsOneScratchForMatricesOfDifferentSizes) {
  at::manual_seed(2);
  std::vector<std::pair<at::Tensor, Linear>> linears;
  for (const int64_t rows : {64, 256, 128}) {
    const at::Tensor weight = sparse_weight(rows, 96, Pattern::unstructured(), at::kFloat);
    linears.emplace_back(
        weight, must(Linear::compact(
                    must(format::compress(unwrap(weight), Pattern::unstructured())), {}, {})));
  }
  const at::Tensor x = at::randn({33, 96});
  for (int round = 0; round < 2; ++round)
    for (const auto& [weight, linear] : linears)
      EXPECT_TRUE(at::allclose(linear.forward(x), at::linear(x, weight), 1e-5, 1e-5));
}

TEST(Linear, StaysSmallInMemory) {
  const at::Tensor weight = sparse_weight(256, 512, Pattern::keep_of(2, 4), at::kBFloat16);
  const Linear linear = must(Linear::compact(
      must(format::compress(unwrap(weight), Pattern::keep_of(2, 4))), {}, {at::kCPU, at::kFloat}));
  // One bit each, two bytes for half of them, and the copy of the last row with room behind it.
  EXPECT_EQ(linear.weight_bytes(), 256 * 512 / 8 + 256 * 512 + 512 + 64);
  EXPECT_EQ(Linear::dense(weight, {}).weight_bytes(), 256 * 512 * 2);
}

TEST(Linear, PaysForNonZerosWhereThereAreFew) {
  const at::Tensor weight =
      sparse_weight(256, 2048, Pattern::unstructured(), at::kBFloat16, /*share_kept=*/0.02);
  const format::CompactMatrix matrix =
      must(format::compress(unwrap(weight), Pattern::unstructured()));
  const Linear linear = must(Linear::compact(matrix, {}, {at::kCPU, at::kBFloat16}));
  EXPECT_EQ(linear.decode_problem()->operation, "linear_csr");
  EXPECT_LT(linear.weight_bytes(), matrix.size_bytes() / 2) << "2048 slots a row are 256 bytes";
  const Linear half = must(Linear::compact(
      must(format::compress(unwrap(sparse_weight(64, 64, Pattern::unstructured(), at::kFloat)),
                            Pattern::unstructured())),
      {}, {at::kCPU, at::kFloat}));
  EXPECT_EQ(half.decode_problem()->operation, "linear_bitmap");
}

TEST(Linear, MultipliesBlocksByAKernel) {
  const at::Tensor weight = sparse_weight(64, 64, Pattern::block(8, 8), at::kFloat);
  const Linear linear = must(Linear::compact(
      must(format::compress(unwrap(weight), Pattern::block(8, 8))), {}, {at::kCPU, at::kFloat}));
  EXPECT_EQ(linear.decode_problem()->operation, "linear_bsr");
}

TEST(Linear, TakesADenseWeightInPlaceOfACompactOne) {
  const at::Tensor weight = sparse_weight(64, 64, Pattern::unstructured(), at::kFloat);
  Linear linear = must(
      Linear::compact(must(format::compress(unwrap(weight), Pattern::unstructured())), {}, {}));
  const at::Tensor other = at::randn({64, 64});
  linear.set_weight(other);
  EXPECT_FALSE(linear.is_compact());
  EXPECT_TRUE(at::equal(linear.weight(), other));
}

TEST(Torch, WrapsWithoutCopyingAndUnwrapsACopy) {
  const std::vector<float> values = {1, 2, 3, 4, 5, 6};
  const Tensor ours{DType::kF32, {2, 3}, Bytes::take(values)};
  const at::Tensor theirs = wrap(ours);
  EXPECT_EQ(theirs.const_data_ptr(), static_cast<const void*>(ours.bytes.data()));
  EXPECT_EQ(theirs[1][0].item<float>(), 4);
  const Tensor back = unwrap(theirs.t());
  EXPECT_EQ(back.shape, (Shape{3, 2}));
  EXPECT_EQ(back.bytes.as<float>()[1], 4);
}

TEST(Torch, WrapsBytesThatAreNotAligned) {
  std::vector<uint8_t> raw(9, 0);
  const float values[] = {1.5f, -2.0f};
  std::memcpy(raw.data() + 1, values, 8);
  const Tensor ours{DType::kF32, {2}, Bytes::take(raw).slice(1, 8)};
  EXPECT_EQ(wrap(ours)[1].item<float>(), -2.0f);
}

TEST(Torch, RunsEveryChunkOnceOnItsOwnPool) {
  std::vector<std::atomic<int>> runs(1000);
  torch_executor().parallel_for(1000, [&](int64_t i) { ++runs[static_cast<size_t>(i)]; });
  for (const auto& count : runs) EXPECT_EQ(count.load(), 1);
  EXPECT_EQ(torch_executor().threads, at::get_num_threads());
}

TEST(Device, IsNamedCpuCudaOrAuto) {
  EXPECT_TRUE(must(open_device("cpu")).is_cpu());
  const auto wrong = open_device("tpu");
  ASSERT_FALSE(wrong.ok());
  EXPECT_EQ(wrong.error().code, Code::kUsage);
  const auto cuda = open_device("cuda");
  if (cuda.ok()) {
    EXPECT_TRUE(must(open_device("auto")).is_cuda());
  } else {
    EXPECT_EQ(cuda.error().code, Code::kNotPossible);
    EXPECT_TRUE(must(open_device("auto")).is_cpu());
  }
}

}  // namespace
}  // namespace lacuna::model
