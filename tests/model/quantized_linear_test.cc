// Linears whose weights are codes: they multiply with what the codes stand for.
#include <fmt/format.h>
#include <gtest/gtest.h>

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
    for (const char* code : {"int8", "int4", "int4g32z", "fp8"})
      for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16}) {
        const auto label = fmt::format("{} {} {}", pattern.text(), code, c10::toString(dtype));
        const at::Tensor bias = at::randn({71}).to(dtype);
        auto matrix = coded(half_empty(71, 99, pattern).to(at::kBFloat16), pattern, code);
        const size_t bytes = matrix.size_bytes();
        // s q in float32, rounded once to the type of the computation.
        matrix.values_dtype = dtype_of(dtype);
        const at::Tensor dense = wrap(format::expand(matrix));
        matrix.values_dtype = DType::kBF16;
        const Linear linear = must(Linear::compact(matrix, bias, {at::kCPU, dtype}));
        EXPECT_TRUE(linear.is_compact()) << label;
        EXPECT_EQ(linear.weight_bytes(), bytes) << label << ": codes stay codes";
        EXPECT_TRUE(at::equal(linear.weight(), dense)) << label;
        for (const int64_t tokens : {1, 16, 17}) {
          const at::Tensor x = at::randn({2, tokens, 99}).to(dtype);
          EXPECT_TRUE(at::equal(linear.forward(x), at::linear(x, dense, bias)))
              << label << " " << tokens;
        }
        const at::Tensor ids = at::tensor({70, 0, 64, 70, 3, 5}, at::kLong).view({2, 3});
        EXPECT_TRUE(at::equal(linear.rows(ids), at::embedding(dense, ids))) << label;
        EXPECT_THROW(linear.rows(at::tensor({71}, at::kLong)), c10::Error) << label;
        EXPECT_THROW(linear.rows(at::tensor({-1}, at::kLong)), c10::Error) << label;
      }
}

}  // namespace
}  // namespace lacuna::model
