// fp8 weights, multiplied as they are stored, against the float64 definition of what they stand
// for.
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "format/random_matrix.h"
#include "lacuna/format/quantize.h"
#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/linear.h"

namespace lacuna::kernels {
namespace {

using format::CompactMatrix;
using format::CompactRows;
using format::Pattern;
using lacuna::testing::bits_of;
using lacuna::testing::random_matrix;
using lacuna::testing::value_of;

CompactMatrix coded(int64_t rows, int64_t columns, const Pattern& pattern, const char* code,
                    double sparsity = 0.5) {
  const auto bits = random_matrix(DType::kF32, rows, columns, pattern, sparsity,
                                  static_cast<uint64_t>(rows * 1000 + columns));
  const auto quantization = format::Quantization::parse(code).value();
  if (pattern.kind == format::PatternKind::kDense)
    return format::quantize(bits.tensor(), quantization).value();
  return format::quantize(format::compress(bits.tensor(), pattern).value(), quantization).value();
}

/// Tokens side by side in the type, with a NaN behind the last.
struct Tokens {
  Tokens(DType dtype, int64_t tokens, int64_t columns, uint64_t seed)
      : bytes(static_cast<size_t>(tokens * columns + 1) * size_bytes(dtype), 0xff) {
    for (int64_t i = 0; i < tokens * columns; ++i) {
      const uint32_t bits =
          bits_of(static_cast<float>(random_normal(seed, 0, static_cast<uint64_t>(i))), dtype);
      std::memcpy(bytes.data() + static_cast<size_t>(i) * size_bytes(dtype), &bits,
                  size_bytes(dtype));
    }
  }
  std::vector<uint8_t> bytes;
};

/// Every candidate that takes fp8 here. @return how many there were
int expect_right(const CompactMatrix& matrix, DType activations, int64_t tokens) {
  const LinearOperation& operation = *linear_operation(matrix.pattern.kind);
  const auto rows = CompactRows::make(matrix).value();
  const Tensor dense = format::expand(matrix);  // float32: the products of scale and code are exact
  const auto view =
      format::dense_rows(dense.bytes.data(), DType::kF32, matrix.rows, matrix.columns);
  const Problem problem{.operation = std::string(operation.name),
                        .values = Values::kFP8,
                        .activations = activations,
                        .outputs = matrix.rows,
                        .inputs = matrix.columns,
                        .tokens = tokens,
                        .pattern = matrix.pattern,
                        .sparsity = 0.5};
  const Tokens x(activations, tokens, matrix.columns, 5), bias(activations, 1, matrix.rows, 6);
  std::vector<uint8_t> y(static_cast<size_t>(tokens * matrix.rows) * size_bytes(activations));
  const format::RowProduct product{.dtype = activations,
                                   .tokens = tokens,
                                   .x = x.bytes.data(),
                                   .x_stride = matrix.columns,
                                   .y = y.data(),
                                   .y_stride = matrix.rows,
                                   .bias = bias.bytes.data()};
  std::vector<double> exact(static_cast<size_t>(tokens * matrix.rows)), sums = exact;
  format::reference_row_product(view, product, exact.data(), sums.data());
  int ran = 0;
  for (const LinearCandidate& candidate : operation.candidates()) {
    if (!candidate.supports(problem, Device::this_cpu())) continue;
    ++ran;
    std::fill(y.begin(), y.end(), uint8_t{0xff});
    std::vector<uint8_t> workspace(candidate.workspace_bytes(problem), 0xff);
    candidate.run(rows.view(), product, workspace.data(), Executor::serial());
    const ErrorBound bound{float_roundings(candidate.name, matrix.columns), matrix.columns,
                           activations, flushes_denormals(candidate.name)};
    for (size_t i = 0; i < exact.size(); ++i) {
      uint32_t bits = 0;
      std::memcpy(&bits, y.data() + i * size_bytes(activations), size_bytes(activations));
      EXPECT_LE(std::fabs(value_of(bits, activations) - exact[i]), bound(exact[i], sums[i]))
          << candidate.name << " " << problem.text() << " " << matrix.quantization.text() << " "
          << i;
    }
    if (::testing::Test::HasFailure()) return ran;
  }
  return ran;
}

TEST(Fp8, EveryCandidateEqualsTheDefinitionForEveryShapeAndPattern) {
  for (const char* code : {"fp8", "fp8g32", "fp8g64", "fp8g128"})
    for (const Pattern& pattern :
         {Pattern{}, Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(1, 4),
          Pattern::keep_of(8, 16), Pattern::keep_of(3, 5)})
      for (const int64_t columns : {1, 7, 8, 31, 32, 33, 63, 64, 65, 100, 200, 257})
        for (const auto& [rows, tokens] : {std::pair<int64_t, int64_t>{1, 1}, {5, 3}, {70, 8}}) {
          ASSERT_GE(expect_right(coded(rows, columns, pattern, code), DType::kF32, tokens), 2);
          if (HasFailure()) return;
        }
}

TEST(Fp8, TakesEveryNumberOfTokensAndTypeOfActivations) {
  for (const DType activations : {DType::kF32, DType::kBF16, DType::kF16})
    for (int64_t tokens = 1; tokens <= 16; ++tokens) {
      expect_right(coded(37, 300, Pattern::unstructured(), "fp8"), activations, tokens);
      if (HasFailure()) return;
    }
}

TEST(Fp8, TakesEmptyAndFullWeights) {
  for (const double sparsity : {0.0, 0.9, 1.0})
    expect_right(coded(66, 320, Pattern::unstructured(), "fp8", sparsity), DType::kF32, 2);
}

TEST(Fp8, EveryCodeIsExact) {
  // A row for each code, and one column: y is the weight itself.
  std::vector<float> weights;
  for (int bits = 0; bits < 256; ++bits)
    if ((bits & 0x7f) != 0x7f) weights.push_back(f8e4m3_to_float(static_cast<uint8_t>(bits)));
  const auto count = static_cast<int64_t>(weights.size());
  // Side by side in one row, so that they share the scale 1 of the largest code, 448.
  const Tensor row{DType::kF32, {1, count}, Bytes::take(std::vector<float>(weights))};
  const auto matrix = format::quantize(row, format::Quantization::parse("fp8").value()).value();
  const auto rows = CompactRows::make(matrix).value();
  for (const LinearCandidate& candidate :
       linear_operation(format::PatternKind::kDense)->candidates())
    for (int64_t k = 0; k < count; ++k) {
      std::vector<float> x(static_cast<size_t>(count), 0.0f);
      x[static_cast<size_t>(k)] = 1;
      float y = -1;
      const Problem problem{.operation = "linear_dense",
                            .values = Values::kFP8,
                            .activations = DType::kF32,
                            .outputs = 1,
                            .inputs = count,
                            .tokens = 1};
      if (!candidate.supports(problem, Device::this_cpu())) continue;
      std::vector<uint8_t> workspace(candidate.workspace_bytes(problem));
      candidate.run(rows.view(),
                    {.dtype = DType::kF32,
                     .tokens = 1,
                     .x = x.data(),
                     .x_stride = count,
                     .y = &y,
                     .y_stride = 1},
                    workspace.data(), Executor::serial());
      ASSERT_EQ(y, weights[static_cast<size_t>(k)]) << candidate.name << " code " << k;
    }
}

TEST(Fp8, RowsOfOtherCodesAndOfBlocksAreRefused) {
  EXPECT_FALSE(CompactRows::make(coded(8, 64, Pattern::unstructured(), "int8")).ok());
  EXPECT_FALSE(CompactRows::make(coded(8, 64, Pattern{}, "int8")).ok());
  EXPECT_FALSE(CompactRows::make(coded(8, 64, Pattern::block(8, 8), "fp8")).ok());
}

}  // namespace
}  // namespace lacuna::kernels
