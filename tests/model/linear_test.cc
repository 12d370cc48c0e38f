#include "lacuna/model/linear.h"

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cctype>
#include <cmath>
#include <cstring>

#include "lacuna/format/quantize.h"
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

/// Slices of one Linear: the same as each alone, in every way in; and after one is replaced.
TEST(Linear, JoinsWhatReadsTheSameX) {
  at::manual_seed(7);
  const std::vector<int64_t> rows = {192, 64, 40};
  const Compute cpu{at::kCPU, at::kBFloat16};
  struct Form {
    std::string name;
    std::optional<Pattern> pattern;
    const char* code = "none";
    double kept = 0.5;
  };
  for (const Form& form :
       {Form{"dense", {}}, Form{"2:4", Pattern::keep_of(2, 4)},
        Form{"unstructured", Pattern::unstructured()},
        Form{"very sparse", Pattern::unstructured(), "none", 0.05},
        Form{"blocks", Pattern::block(32, 8)}, Form{"int8", Pattern::unstructured(), "int8"},
        Form{"dense int4", Pattern{}, "int4"}, Form{"fp8", Pattern{}, "fp8"}})
    for (const bool with_bias : {false, true}) {
      std::vector<Linear::Stored> stored;
      std::vector<Linear> alone;
      for (const int64_t n : rows) {
        const at::Tensor weight =
            sparse_weight(n, 256, form.pattern.value_or(Pattern{}), at::kBFloat16,
                          form.pattern == Pattern::unstructured() ? form.kept : 1.0);
        Linear::Stored part{.weight = weight, .bias = {}};
        if (with_bias) part.bias = at::randn({n}).to(at::kBFloat16);
        const auto code = must(format::Quantization::parse(form.code));
        if (form.pattern && form.pattern->kind == format::PatternKind::kDense)
          part.weight = must(format::quantize(unwrap(weight), code));
        else if (form.pattern && code.none())
          part.weight = must(format::compress(unwrap(weight), *form.pattern));
        else if (form.pattern)
          part.weight =
              must(format::quantize(must(format::compress(unwrap(weight), *form.pattern)), code));
        alone.push_back(form.pattern
                            ? must(Linear::compact(std::get<format::CompactMatrix>(part.weight),
                                                   part.bias, cpu))
                            : Linear::dense(weight, part.bias));
        stored.push_back(std::move(part));
      }
      std::vector<Linear> parts = must(Linear::together(std::move(stored), cpu));
      const std::vector<const Linear*> all = {&parts[0], &parts[1], &parts[2]};
      const Linear* whole = Linear::whole_of(all);
      ASSERT_NE(whole, nullptr) << form.name;
      EXPECT_EQ(Linear::whole_of({&parts[0], &parts[1]}), nullptr);
      EXPECT_EQ(Linear::whole_of({&parts[1], &parts[0], &parts[2]}), nullptr);
      size_t bytes = 0;
      for (const Linear& part : parts) bytes += part.weight_bytes();
      EXPECT_EQ(bytes, whole->weight_bytes());
      const auto check = [&](size_t i) {
        EXPECT_EQ(parts[i].is_compact(), alone[i].is_compact()) << form.name << i;
        EXPECT_TRUE(at::equal(parts[i].weight(), alone[i].weight())) << form.name << i;
        EXPECT_EQ(parts[i].out_features(), rows[i]);
        EXPECT_EQ(parts[i].in_features(), 256);
        const at::Tensor ids = at::tensor({rows[i] - 1, int64_t{0}, int64_t{3}}, at::kLong);
        EXPECT_TRUE(at::equal(parts[i].rows(ids), alone[i].rows(ids))) << form.name << i;
        for (const int64_t tokens : {1, 3, 16, 70}) {
          const at::Tensor x = at::randn({tokens, 256}).to(at::kBFloat16);
          const at::Tensor expected = alone[i].forward(x);
          EXPECT_TRUE(at::allclose(parts[i].forward(x), expected, 0x1p-6, 0x1p-6))
              << form.name << i << " tokens " << tokens;
          at::Tensor raw = at::full_like(expected, NAN);
          parts[i].forward_into(x.const_data_ptr(), tokens, raw.mutable_data_ptr(),
                                Executor::serial());
          EXPECT_TRUE(at::allclose(raw, expected, 0x1p-6, 0x1p-6)) << form.name << i << tokens;
        }
      };
      for (size_t i = 0; i < parts.size(); ++i) check(i);
      const at::Tensor x = at::randn({2, 256}).to(at::kBFloat16);
      const at::Tensor y = whole->forward(x);
      int64_t first = 0;
      for (size_t i = 0; i < parts.size(); first += rows[i++])
        EXPECT_TRUE(at::equal(y.narrow(1, first, rows[i]), alone[i].forward(x))) << form.name << i;
      const at::Tensor other = at::randn({64, 256}).to(at::kBFloat16);
      parts[1].set_weight(other);
      alone[1].set_weight(other);
      EXPECT_EQ(Linear::whole_of(all), nullptr);
      for (size_t i = 0; i < parts.size(); ++i) check(i);
    }
}

TEST(Linear, KeepsApartWhatIsStoredInOtherForms) {
  at::manual_seed(8);
  const Compute cpu{at::kCPU, at::kBFloat16};
  const at::Tensor a = at::randn({64, 96}).to(at::kBFloat16);
  const at::Tensor b = at::randn({32, 96}).to(at::kBFloat16), bias = b.select(1, 0).clone();
  const auto compact = must(format::compress(unwrap(b), Pattern::unstructured()));
  const auto joined = [&](std::vector<Linear::Stored> parts) {
    const std::vector<Linear> linears = must(Linear::together(std::move(parts), cpu));
    EXPECT_TRUE(at::equal(linears[0].weight(), a));
    EXPECT_TRUE(at::equal(linears[1].weight(), b));
    return Linear::whole_of({&linears[0], &linears[1]}) != nullptr;
  };
  EXPECT_TRUE(joined({{a, {}}, {b, {}}}));
  EXPECT_FALSE(joined({{a, {}}, {compact, {}}}));
  EXPECT_FALSE(joined({{a, {}}, {b, bias}})) << "one of them has a bias";
}

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
  // One bit each, two bytes for half of them, and room for a vector load behind: that of a copy of
  // the last row, or of a stream with 8 bytes a tile of 16 rows and 8 at the end.
  const bool stream = linear.decode_problem()->operation == "linear_stream";
  EXPECT_EQ(linear.weight_bytes(),
            256u * 512 / 8 + 256 * 512 + 64 + (stream ? (256 / 16 + 1) * 8 : 512));
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
