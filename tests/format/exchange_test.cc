#include "lacuna/format/exchange.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "format/random_matrix.h"

namespace lacuna::format {
namespace {

using ::lacuna::testing::bits_of;
using ::lacuna::testing::MatrixBits;
using ::lacuna::testing::random_matrix;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
constexpr ExchangeKind kIndexed[] = {ExchangeKind::kCsr, ExchangeKind::kCoo};

bool same(const Bytes& a, const Bytes& b) { return std::ranges::equal(a.span(), b.span()); }
bool same(const IndexedMatrix& a, const IndexedMatrix& b) {
  return a.kind == b.kind && a.rows == b.rows && a.columns == b.columns &&
         a.values_dtype == b.values_dtype && same(a.row_offsets, b.row_offsets) &&
         same(a.row_indices, b.row_indices) && same(a.column_indices, b.column_indices) &&
         same(a.values, b.values);
}
bool same(const CompactMatrix& a, const CompactMatrix& b) {
  return a.pattern == b.pattern && a.rows == b.rows && a.columns == b.columns &&
         a.values_dtype == b.values_dtype && same(a.bitmap, b.bitmap) && same(a.values, b.values) &&
         same(a.offsets, b.offsets) && same(a.block_columns, b.block_columns) &&
         same(a.block_offsets, b.block_offsets);
}

template <class T>
std::vector<T> list(const Bytes& bytes) {
  std::vector<T> values(bytes.size() / sizeof(T));
  if (!values.empty()) std::memcpy(values.data(), bytes.data(), bytes.size());
  return values;
}
template <class T>
Bytes bytes(std::vector<T> values) {
  return Bytes::take(std::move(values));
}

std::string first_fault(const IndexedMatrix& matrix) {
  const auto faults = validate(matrix);
  if (faults.empty()) return "";
  return fmt::format("{},{}: {}", faults[0].row, faults[0].column, faults[0].what);
}

CompactMatrix unstructured(const MatrixBits& dense) {
  return compress(dense.tensor(1), Pattern::unstructured()).value();
}

/// Three rows, the second empty: 0 1 0 2 / 0 0 0 0 / 3 0 0 4.
CompactMatrix small() {
  MatrixBits dense(DType::kF32, 3, 4);
  const int places[][2] = {{0, 1}, {0, 3}, {2, 0}, {2, 3}};
  float value = 0;
  for (const auto& [row, column] : places) dense.at(row, column) = bits_of(++value, DType::kF32);
  return unstructured(dense);
}

TEST(ExchangeForm, TextsComeBackAndOthersAreRefused) {
  for (const char* text : {"csr", "coo", "bsr:1x1", "bsr:32x16"})
    EXPECT_EQ(ExchangeForm::parse(text).value().text(), text);
  EXPECT_EQ(ExchangeForm().text(), "none");
  EXPECT_EQ(ExchangeForm::parse("bsr:32x16")->pattern(), Pattern::block(32, 16));
  EXPECT_EQ(ExchangeForm::parse("coo")->pattern(), Pattern::unstructured());
  for (const char* text :
       {"", "none", "bsr", "bsr:", "bsr:4", "bsr:0x4", "bsr:4x5000", "CSR", "csc"}) {
    const auto form = ExchangeForm::parse(text);
    ASSERT_FALSE(form.ok()) << text;
    EXPECT_EQ(form.error().code, lacuna::Code::kUsage);
    EXPECT_THAT(form.error().message, HasSubstr(fmt::format("(got \"{}\"; need csr", text)));
  }
}

TEST(Exchange, CsrAndCooSpellOutTheMask) {
  const IndexedMatrix csr = to_indexed(small(), ExchangeKind::kCsr);
  EXPECT_THAT(list<int64_t>(csr.row_offsets), ElementsAre(0, 2, 2, 4));
  EXPECT_THAT(list<int32_t>(csr.column_indices), ElementsAre(1, 3, 0, 3));
  EXPECT_THAT(list<float>(csr.values), ElementsAre(1, 2, 3, 4));
  EXPECT_TRUE(csr.row_indices.empty());
  const IndexedMatrix coo = to_indexed(small(), ExchangeKind::kCoo);
  EXPECT_THAT(list<int32_t>(coo.row_indices), ElementsAre(0, 0, 2, 2));
  EXPECT_THAT(list<int32_t>(coo.column_indices), ElementsAre(1, 3, 0, 3));
  EXPECT_TRUE(coo.row_offsets.empty());
}

TEST(Exchange, EveryShapeAndDensityComesBackBitByBit) {
  for (const DType dtype : kTypes)
    for (const int64_t rows : {0, 1, 7, 64, 65, 130})
      for (const int64_t columns : {0, 1, 8, 9, 63, 65, 130})
        for (const double sparsity : {0.0, 0.5, 0.97, 1.1}) {
          const CompactMatrix matrix = unstructured(random_matrix(
              dtype, rows, columns, Pattern::unstructured(), sparsity, 31 * rows + columns));
          const auto label = ::testing::Message() << long_name(dtype) << " " << rows << "x"
                                                  << columns << " " << sparsity;
          for (const ExchangeKind kind : kIndexed) {
            const IndexedMatrix indexed = to_indexed(matrix, kind);
            ASSERT_EQ(first_fault(indexed), "") << label;
            EXPECT_EQ(indexed.kept(), count_kept(matrix)) << label;
            const CompactMatrix back = from_indexed(indexed);
            ASSERT_TRUE(same(back, matrix)) << label;
            ASSERT_THAT(validate(back), IsEmpty()) << label;
            for (const ExchangeKind other : kIndexed)
              EXPECT_TRUE(same(to_indexed(back, other), to_indexed(matrix, other))) << label;
          }
        }
}

TEST(Exchange, EveryPatternComesBackThroughEveryForm) {
  const Pattern patterns[] = {Pattern::unstructured(), Pattern::keep_of(2, 4),
                              Pattern::keep_of(3, 5),  Pattern::keep_of(63, 64),
                              Pattern::block(4, 8),    Pattern::block(3, 5)};
  const Pattern forms[] = {Pattern::unstructured(), Pattern::block(1, 1), Pattern::block(4, 8),
                           Pattern::block(16, 3), Pattern::block(200, 200)};
  for (const Pattern& pattern : patterns)
    for (const Pattern& form : forms)
      for (const auto& [rows, columns] :
           {std::pair<int64_t, int64_t>{1, 1}, {1, 70}, {67, 37}, {0, 9}}) {
        const MatrixBits dense = random_matrix(DType::kF16, rows, columns, pattern, 0.6, 5);
        const CompactMatrix matrix = compress(dense.tensor(), pattern).value();
        const CompactMatrix stored = with_pattern(matrix, form).value();
        EXPECT_THAT(validate(stored), IsEmpty());
        EXPECT_TRUE(same(with_pattern(stored, pattern).value(), matrix))
            << pattern.text() << " through " << form.text() << " " << rows << "x" << columns;
      }
}

TEST(Exchange, AnAwkwardMaskComesBack) {
  // First and last column, a full row between empty ones, the last row of a group of 64.
  MatrixBits dense(DType::kBF16, 129, 65);
  for (int64_t column = 0; column < 65; ++column) dense.at(63, column) = 0x3f80;
  for (const int64_t row : {0, 64, 128}) dense.at(row, 0) = dense.at(row, 64) = 0x7fc1;  // NaN
  const CompactMatrix matrix = unstructured(dense);
  for (const ExchangeKind kind : kIndexed)
    EXPECT_TRUE(same(from_indexed(to_indexed(matrix, kind)), matrix));
}

TEST(Exchange, AZeroAmongTheValuesIsKept) {
  IndexedMatrix csr = to_indexed(small(), ExchangeKind::kCsr);
  csr.values = bytes<float>({1, 0, -0.0f, 4});
  EXPECT_EQ(first_fault(csr), "");
  const CompactMatrix matrix = from_indexed(csr);
  EXPECT_EQ(count_kept(matrix), 4);
  EXPECT_EQ(count_zeros(matrix), 10);
  EXPECT_TRUE(same(to_indexed(matrix, ExchangeKind::kCsr), csr));
  // Another pattern has its own rules for zeros.
  const CompactMatrix blocks = with_pattern(matrix, Pattern::block(1, 2)).value();
  EXPECT_THAT(list<float>(blocks.values), ElementsAre(0, 1, 0, 4));
}

TEST(Exchange, AWeightThatBreaksItsPatternIsNamed) {
  MatrixBits dense(DType::kF32, 3, 8);
  for (const int64_t column : {4, 5, 7}) dense.at(2, column) = bits_of(1, DType::kF32);
  const auto read = with_pattern(unstructured(dense), Pattern::keep_of(2, 4));
  ASSERT_FALSE(read.ok());
  EXPECT_THAT(read.error().message, HasSubstr("row 2, columns 4..7"));
}

TEST(ValidateIndexed, NamesWhatIsWrong) {
  const IndexedMatrix csr = to_indexed(small(), ExchangeKind::kCsr),
                      coo = to_indexed(small(), ExchangeKind::kCoo);
  const auto fault = [](IndexedMatrix matrix, Bytes IndexedMatrix::*part, Bytes changed) {
    matrix.*part = std::move(changed);
    return first_fault(matrix);
  };
  const auto offsets = &IndexedMatrix::row_offsets, rows = &IndexedMatrix::row_indices,
             columns = &IndexedMatrix::column_indices, values = &IndexedMatrix::values;
  EXPECT_EQ(fault(csr, offsets, bytes<int64_t>({0, 2, 1, 4})),
            "2,0: row offset 2 is 1 (need 2..4, ending at 4)");
  EXPECT_EQ(fault(csr, offsets, bytes<int64_t>({1, 2, 2, 4})),
            "0,0: row offset 0 is 1 (need 0..4, ending at 4)");
  EXPECT_EQ(fault(csr, offsets, bytes<int64_t>({0, 2, 2, 3})),
            "3,0: row offset 3 is 3 (need 2..4, ending at 4)");
  EXPECT_EQ(fault(csr, offsets, bytes<int64_t>({0, 2, 5, 4})),
            "2,0: row offset 2 is 5 (need 2..4, ending at 4)");
  EXPECT_EQ(fault(csr, offsets, bytes<int64_t>({0, 2, 4})),
            "-1,-1: row_offsets holds 24 bytes (need 32)");
  EXPECT_EQ(fault(csr, rows, bytes<int32_t>({0})), "-1,-1: rows holds 4 bytes (need 0)");
  EXPECT_EQ(fault(coo, rows, bytes<int32_t>({0, 0, 2})), "-1,-1: rows holds 12 bytes (need 16)");
  for (const IndexedMatrix& matrix : {csr, coo}) {
    EXPECT_THAT(fault(matrix, columns, bytes<int32_t>({1, 1, 0, 3})),
                HasSubstr("0,1: entry 1 follows row 0, column 1"));
    EXPECT_THAT(fault(matrix, columns, bytes<int32_t>({3, 1, 0, 3})), HasSubstr("0,1: entry 1"));
    EXPECT_THAT(fault(matrix, columns, bytes<int32_t>({1, 3, 0, 4})),
                HasSubstr("2,4: entry 3 lies in row 2, column 4 (need rows 0..2, columns 0..3)"));
    EXPECT_THAT(fault(matrix, columns, bytes<int32_t>({-1, 3, 0, 3})),
                HasSubstr("entry 0 lies in row 0, column -1"));
    EXPECT_THAT(fault(matrix, values, bytes<float>({1, 2, 3})), HasSubstr("values holds 12 bytes"));
    EXPECT_THAT(fault(matrix, columns, Bytes::take(std::vector<char>(15))),
                HasSubstr("columns holds 15 bytes (need 12)"));
  }
  EXPECT_THAT(fault(coo, rows, bytes<int32_t>({0, 2, 0, 2})),
              HasSubstr("0,0: entry 2 follows row 2"));
  EXPECT_THAT(fault(coo, rows, bytes<int32_t>({0, 0, 2, 3})),
              HasSubstr("3,3: entry 3 lies in row 3"));
  EXPECT_THAT(fault(coo, rows, bytes<int32_t>({-1, 0, 2, 2})),
              HasSubstr("entry 0 lies in row -1, column 1"));
  IndexedMatrix broken = csr;
  broken.rows = int64_t{1} << 31;
  EXPECT_THAT(first_fault(broken), HasSubstr("shape"));
  broken = csr;
  broken.values_dtype = DType::kI8;
  EXPECT_THAT(first_fault(broken), HasSubstr("values of"));
  broken = csr;
  broken.kind = ExchangeKind::kBsr;
  EXPECT_THAT(first_fault(broken), HasSubstr("neither csr nor coo"));
  broken = coo;
  broken.column_indices = bytes<int32_t>({9, 9, 9, 9});
  EXPECT_EQ(validate(broken, 3).size(), 3u);
}

TEST(ValidateIndexed, FindsEveryFlippedBitThatLeavesTheOrder) {
  // Columns 2 and 3 of four in every row: whatever bit flips, order or range is broken, or the
  // column becomes another that is free; the mask then says so.
  MatrixBits dense(DType::kBF16, 5, 4);
  for (int64_t row = 0; row < 5; ++row)
    for (const int64_t column : {2, 3}) dense.at(row, column) = 0x3f80;
  for (const ExchangeKind kind : kIndexed) {
    const IndexedMatrix sound = to_indexed(unstructured(dense), kind);
    for (Bytes IndexedMatrix::*part :
         {&IndexedMatrix::row_offsets, &IndexedMatrix::row_indices, &IndexedMatrix::column_indices})
      for (size_t bit = 0; bit < (sound.*part).size() * 8; ++bit) {
        IndexedMatrix broken = sound;
        auto copy = list<uint8_t>(sound.*part);
        copy[bit / 8] ^= static_cast<uint8_t>(1 << bit % 8);
        broken.*part = bytes(std::move(copy));
        if (validate(broken).empty()) {
          EXPECT_FALSE(same(from_indexed(broken).bitmap, from_indexed(sound).bitmap)) << bit;
        }
      }
  }
}

}  // namespace
}  // namespace lacuna::format
