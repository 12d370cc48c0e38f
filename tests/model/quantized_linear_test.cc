// Linears whose weights are codes: they multiply with what the codes stand for.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>

#include "lacuna/format/quantize.h"
#include "model/models.h"

namespace lacuna::model {
namespace {
using format::Pattern;
using format::Quantization;
using testing::must;

format::CompactMatrix coded(const at::Tensor& weight, const Pattern& pattern, const char* code) {
  const auto quantization = must(Quantization::parse(code));
  if (pattern.kind == format::PatternKind::kDense)
    return must(format::quantize(unwrap(weight), quantization));
  return must(format::quantize(must(format::compress(unwrap(weight), pattern)), quantization));
}

at::Tensor half_empty(int64_t rows, int64_t columns, const Pattern& pattern) {
  at::Tensor weight = at::randn({rows, columns});
  const at::Tensor row = at::arange(rows).unsqueeze(1), column = at::arange(columns).unsqueeze(0);
  switch (pattern.kind) {
    case format::PatternKind::kUnstructured:
      return weight * (at::rand({rows, columns}) < 0.5);
    case format::PatternKind::kKeepOf:
      return weight * ((column + row).remainder(pattern.of) < pattern.keep);
    case format::PatternKind::kBlock:
      return weight *
             (row.floor_divide(pattern.block_rows) + column.floor_divide(pattern.block_columns))
                 .remainder(2)
                 .eq(0);
    case format::PatternKind::kDense:
      break;
  }
  return weight;
}

TEST(QuantizedLinear, MultipliesWithWhatItsCodesStandFor) {
  at::manual_seed(3);
  for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::keep_of(2, 4),
                                 Pattern::keep_of(3, 5), Pattern::block(16, 9)})
    for (const char* code : {"int8", "int4", "int4g32z", "int4row", "fp8"})
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        const auto label = fmt::format("{} {} {}", pattern.text(), code, c10::toString(dtype));
        const at::Tensor bias = at::randn({71}).to(dtype);
        auto matrix = coded(half_empty(71, 99, pattern).to(at::kBFloat16), pattern, code);
        const size_t bytes = matrix.size_bytes();
        // s q in float32, rounded once to the type of the computation.
        matrix.values_dtype = dtype_of(dtype);
        const at::Tensor dense = wrap(format::expand(matrix));
        matrix.values_dtype = DType::kBF16;
        const Linear linear =
            must(Linear::compact(matrix, bias, {at::kCPU, dtype, /*int8_activations=*/false}));
        EXPECT_TRUE(linear.is_compact()) << label;
        // Kernels walk fp8 as it lies, with an index of rows and a copy of the last ones.
        const bool walked =
            std::string_view(code) == "fp8" && pattern.kind != format::PatternKind::kBlock;
        EXPECT_GE(linear.weight_bytes(), bytes) << label;
        EXPECT_LE(linear.weight_bytes(), bytes + (walked ? 72 * 8 + 4 * 99 : 0))
            << label << ": codes stay codes";
        EXPECT_TRUE(at::equal(linear.weight(), dense)) << label;
        for (const int64_t tokens : {1, 16, 17}) {
          const at::Tensor x = at::randn({2, tokens, 99}).to(dtype);
          if (!walked) {
            EXPECT_TRUE(at::equal(linear.forward(x), at::linear(x, dense, bias)))
                << label << " " << tokens;
            continue;
          }
          const auto wide = [](const at::Tensor& t) { return t.to(at::kDouble); };
          const at::Tensor off =
              (wide(linear.forward(x)) - at::linear(wide(x), wide(dense), wide(bias))).abs();
          const at::Tensor magnitude =
              at::linear(wide(x).abs(), wide(dense).abs(), wide(bias).abs());
          // The weights of `dense` are rounded, and so is y.
          const double share = dtype == at::kFloat ? 0x1p-17 : 0x1p-7;
          EXPECT_TRUE((off <= magnitude * share).all().item<bool>()) << label << " " << tokens;
        }
        const at::Tensor ids = at::tensor({70, 0, 64, 70, 3, 5}, at::kLong).view({2, 3});
        EXPECT_TRUE(at::equal(linear.rows(ids), at::embedding(dense, ids))) << label;
        EXPECT_THROW(linear.rows(at::tensor({71}, at::kLong)), c10::Error) << label;
        EXPECT_THROW(linear.rows(at::tensor({-1}, at::kLong)), c10::Error) << label;
      }
}

/// x as a quantised weight sees it: 127 steps either way of each token's largest magnitude.
at::Tensor rounded(const at::Tensor& x) {
  const at::Tensor wide = x.to(at::kDouble);
  const at::Tensor step = (wide.abs().amax(-1, /*keepdim=*/true) / 127).clamp_min(1e-30);
  return (wide / step).round() * step;
}

TEST(QuantizedLinear, TakesRoundedActivationsForEveryNumberOfTokens) {
  at::manual_seed(4);
  for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::block(16, 9)})
    for (const char* code : {"int8", "int4"})
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        const auto label = fmt::format("{} {} {}", pattern.text(), code, c10::toString(dtype));
        const at::Tensor bias = at::randn({71}).to(dtype);
        auto matrix = coded(half_empty(71, 99, pattern).to(at::kBFloat16), pattern, code);
        matrix.values_dtype = DType::kF32;
        const at::Tensor dense = wrap(format::expand(matrix)).to(at::kDouble);
        matrix.values_dtype = DType::kBF16;
        const Linear linear = must(Linear::compact(matrix, bias, {at::kCPU, dtype}));
        const at::Tensor ids = at::tensor({70, 0, 64, 3}, at::kLong);
        EXPECT_TRUE(at::equal(linear.rows(ids), at::embedding(dense.to(dtype), ids))) << label;
        for (const int64_t tokens : {1, 5, 16, 17, 40}) {
          const at::Tensor x = at::randn({1, tokens, 99}).to(dtype);
          const at::Tensor expected = at::linear(rounded(x), dense, bias.to(at::kDouble));
          const at::Tensor off = (linear.forward(x).to(at::kDouble) - expected).abs();
          // Float32 arithmetic may round an x that lies halfway to the other side: one step of one
          // column. With bf16, the outputs, and from 17 tokens on the weights too, are rounded.
          const at::Tensor magnitude =
              at::linear(rounded(x).abs(), dense.abs(), bias.abs().to(at::kDouble));
          const double share = dtype == at::kFloat ? 0x1p-18 : 0x1p-7;
          const at::Tensor step = x.to(at::kDouble).abs().amax(-1, true) / 127 * dense.abs().max();
          EXPECT_TRUE((off <= magnitude * share + step).all().item<bool>())
              << label << " " << tokens << ": off by " << off.max().item<double>();
          EXPECT_LE((off > magnitude * share).to(at::kDouble).mean().item<double>(), 0.02) << label;
        }
      }
}

TEST(QuantizedLinear, GivesTheSameOnRawMemory) {
  for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::keep_of(2, 4),
                                 Pattern::keep_of(3, 5), Pattern::block(16, 9)})
    for (const char* code : {"", "int8", "int4", "int4g32z", "fp8"})
      for (const bool rounds : {true, false})
        for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
          const auto label = fmt::format("{} {} {}", pattern.text(), code, c10::toString(dtype));
          const at::Tensor dense = half_empty(71, 99, pattern).to(dtype);
          const std::optional<at::Tensor> bias = at::randn({71}).to(dtype);
          Linear linear;
          if (*code != 0)
            linear =
                must(Linear::compact(coded(dense, pattern, code), bias, {at::kCPU, dtype, rounds}));
          else if (pattern.kind != format::PatternKind::kDense)
            linear = must(Linear::compact(must(format::compress(unwrap(dense), pattern)), bias,
                                          {at::kCPU, dtype}));
          else
            linear = Linear::dense(dense, bias);
          for (const int64_t tokens : {1, 5, 16}) {
            const at::Tensor x = at::randn({tokens, 99}).to(dtype);
            at::Tensor y = at::full({tokens, 71}, NAN, dtype);
            linear.forward_into(x.const_data_ptr(), tokens, y.mutable_data_ptr(), torch_executor());
            EXPECT_TRUE(at::equal(y, linear.forward(x))) << label << " " << tokens;
          }
          const std::vector<int32_t> ids = {70, 0, 64};
          at::Tensor rows = at::full({3, 99}, NAN, dtype);
          linear.rows_into(ids.data(), 3, rows.mutable_data_ptr(), torch_executor());
          EXPECT_TRUE(at::equal(rows, linear.rows(at::tensor({70, 0, 64}, at::kLong)))) << label;
        }
}

}  // namespace
}  // namespace lacuna::model
