#include "lacuna/format/stack.h"

#include <gtest/gtest.h>

#include "format/random_matrix.h"
#include "lacuna/core/large_block.h"
#include "lacuna/format/quantize.h"

namespace lacuna::format {
namespace {

using ::lacuna::testing::MatrixBits;

constexpr int64_t kColumns = 133;

/// Rows [first, last) of a matrix.
Tensor part_of(const Tensor& whole, int64_t first, int64_t last) {
  const size_t row = static_cast<size_t>(kColumns) * size_bytes(whole.dtype);
  return {
      whole.dtype,
      {last - first, kColumns},
      whole.bytes.slice(static_cast<size_t>(first) * row, static_cast<size_t>(last - first) * row)};
}

CompactMatrix stored(const Tensor& dense, const Pattern& pattern, const char* code) {
  const Quantization quantization = *Quantization::parse(code);
  if (pattern.kind == PatternKind::kDense) return *quantize(dense, quantization);
  CompactMatrix matrix = *compress(dense, pattern);
  return quantization.none() ? matrix : *quantize(matrix, quantization);
}

bool same(const Bytes& a, const Bytes& b) {
  return a.size() == b.size() && std::equal(a.span().begin(), a.span().end(), b.span().begin());
}

TEST(StackRows, IsWhatTheWholeMatrixIsStoredAs) {
  for (const Pattern& pattern : {Pattern{}, Pattern::unstructured(), Pattern::keep_of(2, 4),
                                 Pattern::keep_of(3, 5), Pattern::block(32, 9)})
    for (const char* code : {"none", "int8", "int4", "int4g32z", "fp8"}) {
      if (pattern.kind == PatternKind::kDense && code == std::string("none")) continue;
      const std::string label = pattern.text() + " " + code;
      const MatrixBits bits = ::lacuna::testing::random_matrix(
          DType::kBF16, 64 + 128 + 39, kColumns, pattern, 0.6, 5, [&](int64_t row, int64_t column) {
            return ::lacuna::testing::bits_of(static_cast<float>(row - 2 * column) + 0.5f,
                                              DType::kBF16);
          });
      const Tensor dense = bits.tensor();
      std::vector<CompactMatrix> parts;
      for (const auto& [first, last] :
           {std::pair<int64_t, int64_t>{0, 64}, {64, 192}, {192, 64 + 128 + 39}})
        parts.push_back(stored(part_of(dense, first, last), pattern, code));
      ThreadPool pool(2);
      const auto stack = stack_rows(parts, pool.executor());
      ASSERT_TRUE(stack.has_value()) << label;
      EXPECT_TRUE(validate(*stack).empty()) << label;
      const CompactMatrix whole = stored(dense, pattern, code);
      EXPECT_EQ(stack->rows, whole.rows);
      EXPECT_EQ(stack->columns, whole.columns);
      EXPECT_TRUE(stack->pattern == whole.pattern && stack->quantization == whole.quantization);
      for (Bytes CompactMatrix::*member :
           {&CompactMatrix::bitmap, &CompactMatrix::values, &CompactMatrix::offsets,
            &CompactMatrix::block_columns, &CompactMatrix::block_offsets, &CompactMatrix::scales,
            &CompactMatrix::zero_points})
        EXPECT_TRUE(same((*stack).*member, whole.*member)) << label;
    }
}

TEST(StackRows, RefusesPartsThatCannotBeOne) {
  const auto ones = [](int64_t rows, const Pattern& pattern, const char* code = "none") {
    MatrixBits bits(DType::kBF16, rows, kColumns);
    return stored(bits.tensor(), pattern, code);
  };
  const Pattern unstructured = Pattern::unstructured();
  EXPECT_TRUE(stack_rows({ones(64, unstructured), ones(7, unstructured)}));
  EXPECT_FALSE(stack_rows({ones(7, unstructured), ones(64, unstructured)})) << "a torn group";
  EXPECT_FALSE(stack_rows({ones(48, Pattern::block(32, 8)), ones(32, Pattern::block(32, 8))}));
  EXPECT_TRUE(stack_rows({ones(7, Pattern::keep_of(2, 4)), ones(9, Pattern::keep_of(2, 4))}));
  EXPECT_FALSE(stack_rows({ones(64, unstructured), ones(64, Pattern::keep_of(2, 4))}));
  EXPECT_FALSE(stack_rows({ones(64, unstructured), ones(64, unstructured, "int8")}));
  CompactMatrix narrow = ones(64, unstructured);
  narrow.columns -= 1;
  EXPECT_FALSE(stack_rows({ones(64, unstructured), narrow}));
}

TEST(InLargePages, HoldsThePiecesInOrder) {
  ThreadPool pool(2);
  for (const size_t size : {size_t{1}, size_t{3} << 20, size_t{5} << 20}) {
    std::vector<uint8_t> first(size), second(7);
    for (size_t i = 0; i < size; ++i) first[i] = static_cast<uint8_t>(i * 31 + i / 4096);
    for (size_t i = 0; i < second.size(); ++i) second[i] = static_cast<uint8_t>(200 + i);
    std::vector<uint8_t> expected = first;
    expected.insert(expected.end(), second.begin(), second.end());
    const Bytes all = in_large_pages(
        {Bytes::take(std::move(first)), Bytes(), Bytes::take(std::move(second))}, pool.executor());
    EXPECT_TRUE(same(all, Bytes::take(std::move(expected)))) << size;
  }
  EXPECT_TRUE(in_large_pages({}).empty());
}

}  // namespace
}  // namespace lacuna::format
