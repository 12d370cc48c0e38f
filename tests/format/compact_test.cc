#include "lacuna/format/compact.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <bit>
#include <limits>

#include "format/random_matrix.h"
#include "lacuna/core/executor.h"
#include "lacuna/format/element.h"
#include "lacuna/format/expand.h"

namespace lacuna::format {
namespace {

using ::lacuna::testing::bits_of;
using ::lacuna::testing::MatrixBits;
using ::lacuna::testing::random_matrix;
using ::testing::HasSubstr;

constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};
const Pattern kPatterns[] = {
    Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(1, 4),
    Pattern::keep_of(4, 8),  Pattern::keep_of(3, 5), Pattern::keep_of(63, 64),
    Pattern::keep_of(5, 7),  Pattern::block(4, 8),   Pattern::block(3, 5)};

bool same_bytes(const Bytes& a, const Bytes& b) {
  return a.size() == b.size() && std::equal(a.span().begin(), a.span().end(), b.span().begin());
}

bool same(const CompactMatrix& a, const CompactMatrix& b) {
  return a.pattern == b.pattern && a.rows == b.rows && a.columns == b.columns &&
         a.values_dtype == b.values_dtype && same_bytes(a.bitmap, b.bitmap) &&
         same_bytes(a.values, b.values) && same_bytes(a.offsets, b.offsets) &&
         same_bytes(a.block_columns, b.block_columns) &&
         same_bytes(a.block_offsets, b.block_offsets);
}

std::string first_fault(const CompactMatrix& matrix) {
  const auto faults = validate(matrix);
  return faults.empty() ? "" : faults.front().what;
}

/// A copy of the bytes with one changed.
Bytes with_byte(const Bytes& bytes, size_t at, std::byte value) {
  std::vector<std::byte> copy(bytes.span().begin(), bytes.span().end());
  copy[at] = value;
  return Bytes::take(std::move(copy));
}
Bytes flip(const Bytes& bytes, size_t at, int bit) {
  return with_byte(bytes, at, bytes.data()[at] ^ static_cast<std::byte>(1 << bit));
}

CompactMatrix compact(const MatrixBits& matrix, const Pattern& pattern) {
  auto compacted = compress(matrix.tensor(), pattern);
  EXPECT_TRUE(compacted.ok()) << compacted.error().message;
  return *compacted;
}

TEST(Compact, every_shape_pattern_and_type_comes_back_bit_by_bit) {
  std::vector<int64_t> columns;
  for (int64_t k = 0; k <= 17; ++k) columns.push_back(k);
  for (const int64_t k : {31, 32, 33, 63, 64, 65, 127, 130}) columns.push_back(k);
  for (const DType dtype : kTypes)
    for (const Pattern& pattern : kPatterns)
      for (const int64_t k : columns)
        for (const int64_t rows : {0, 1, 7, 64, 65}) {
          const MatrixBits dense = random_matrix(dtype, rows, k, pattern, 0.5, 17 * k + rows);
          const auto label = ::testing::Message() << pattern.text() << " " << long_name(dtype)
                                                  << " " << rows << "x" << k;
          auto matrix = compress(dense.tensor(1), pattern);
          ASSERT_TRUE(matrix.ok()) << label << matrix.error().message;
          EXPECT_EQ(first_fault(*matrix), "") << label;
          const Tensor back = expand(*matrix);
          ASSERT_TRUE(same_bytes(back.bytes, dense.tensor().bytes)) << label;
          EXPECT_EQ(count_zeros(*matrix), count_zeros(back)) << label;
          auto again = compress(back, pattern);
          ASSERT_TRUE(again.ok());
          EXPECT_TRUE(same(*matrix, *again)) << label;
        }
}

TEST(Compact, any_run_of_rows_expands_like_the_whole) {
  for (const Pattern& pattern : kPatterns) {
    const MatrixBits dense = random_matrix(DType::kBF16, 130, 37, pattern, 0.5, 5);
    const CompactMatrix matrix = compact(dense, pattern);
    const Tensor whole = expand(matrix);
    ThreadPool pool(3);
    EXPECT_TRUE(same_bytes(expand(matrix, pool.executor()).bytes, whole.bytes)) << pattern.text();
    const size_t row_bytes = 37 * 2;
    for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, 1},
                                      {5, 5},
                                      {63, 66},
                                      {64, 65},
                                      {128, 130},
                                      {129, 130},
                                      {130, 130}}) {
      const size_t size = static_cast<size_t>(last - first) * row_bytes;
      std::vector<std::byte> out(size + 16, std::byte{0x5a});
      expand_rows(matrix, first, last, out.data());
      EXPECT_TRUE(
          std::equal(out.begin(), out.begin() + size, whole.bytes.data() + first * row_bytes))
          << pattern.text() << " " << first << ".." << last;
      EXPECT_TRUE(std::all_of(out.begin() + size, out.end(), [](std::byte b) {
        return b == std::byte{0x5a};
      })) << "wrote past the rows";
    }
  }
}

TEST(Compact, minus_zero_is_dropped_and_all_other_bits_are_kept) {
  for (const DType dtype : kTypes) {
    const float values[] = {-0.0f,
                            std::numeric_limits<float>::quiet_NaN(),
                            std::numeric_limits<float>::infinity(),
                            -std::numeric_limits<float>::infinity(),
                            0x1p-24f,
                            0x1p-133f,
                            -1.5f,
                            0.0f};
    MatrixBits dense(dtype, 1, 8), expected(dtype, 1, 8);
    for (int i = 0; i < 8; ++i) {
      dense.at(0, i) = bits_of(values[i], dtype);
      expected.at(0, i) = values[i] == 0 ? 0 : dense.at(0, i);
    }
    dense.at(0, 1) |= 1;  // a NaN with a payload
    expected.at(0, 1) |= 1;
    for (const Pattern& pattern :
         {Pattern::unstructured(), Pattern::keep_of(7, 8), Pattern::block(1, 4)}) {
      const CompactMatrix matrix = compact(dense, pattern);
      EXPECT_TRUE(same_bytes(expand(matrix).bytes, expected.tensor().bytes))
          << long_name(dtype) << " " << pattern.text();
      EXPECT_EQ(count_zeros(matrix), dtype == DType::kF16 ? 3 : 2);  // 2^-133 is no float16
    }
  }
}

TEST(Compact, empty_and_full_rows) {
  MatrixBits dense(DType::kBF16, 70, 40);
  for (int64_t column = 0; column < 40; ++column)
    for (const int64_t row : {1, 63, 64}) dense.at(row, column) = bits_of(1.0f, DType::kBF16);
  const CompactMatrix matrix = compact(dense, Pattern::unstructured());
  EXPECT_EQ(matrix.values.size(), 3u * 40 * 2);
  EXPECT_EQ(kept_before_row(matrix, 1), 0);
  EXPECT_EQ(kept_before_row(matrix, 64), 80);
  EXPECT_EQ(kept_before_row(matrix, 70), 120);
  EXPECT_TRUE(same_bytes(expand(matrix).bytes, dense.tensor().bytes));
}

TEST(Compact, a_group_with_too_few_non_zeros_keeps_its_lowest_zeros) {
  MatrixBits dense(DType::kF32, 1, 8);
  dense.at(0, 3) = bits_of(7, DType::kF32);
  const CompactMatrix matrix = compact(dense, Pattern::keep_of(2, 4));
  EXPECT_EQ(matrix.bitmap.as<uint8_t>()[0], 0b0011'1001);
  EXPECT_EQ(read_unaligned<float>(matrix.values.data() + 4), 7.0f);
}

TEST(Compact, a_short_last_group_fills_its_value_slots_with_plus_zero) {
  MatrixBits dense(DType::kF32, 2, 5);
  for (int64_t row = 0; row < 2; ++row) dense.at(row, 4) = bits_of(3, DType::kF32);
  CompactMatrix matrix = compact(dense, Pattern::keep_of(2, 4));
  ASSERT_EQ(matrix.values_per_row(), 4);
  EXPECT_EQ(read_unaligned<float>(matrix.values.data() + 2 * 4), 3.0f);
  EXPECT_EQ(read_unaligned<float>(matrix.values.data() + 3 * 4), 0.0f);
  matrix.values = flip(matrix.values, 7 * 4, 0);
  const auto faults = validate(matrix);
  ASSERT_EQ(faults.size(), 1u);
  EXPECT_EQ(faults[0].row, 1);
  EXPECT_THAT(faults[0].what, HasSubstr("unused value slot"));
}

TEST(Compact, sizes_are_what_the_format_promises) {
  const MatrixBits dense = random_matrix(DType::kBF16, 256, 512, Pattern::keep_of(2, 4), 0.5, 1);
  const CompactMatrix matrix = compact(dense, Pattern::keep_of(2, 4));
  EXPECT_EQ(matrix.size_bytes() * 8, 256u * 512 * 9);  // 9 bits a weight
}

TEST(Compact, compress_names_row_and_columns_that_break_the_pattern) {
  MatrixBits dense(DType::kBF16, 3, 12);
  for (const int64_t column : {4, 5, 7}) dense.at(2, column) = bits_of(1, DType::kBF16);
  const auto matrix = compress(dense.tensor(), Pattern::keep_of(2, 4));
  ASSERT_FALSE(matrix.ok());
  EXPECT_EQ(matrix.error().code, lacuna::Code::kBadInput);
  EXPECT_THAT(matrix.error().message, HasSubstr("row 2, columns 4..7 hold 3 non-zeros"));
}

TEST(Compact, compress_is_the_same_for_any_executor) {
  ThreadPool pool(3);
  for (const DType dtype : kTypes)
    for (const Pattern& pattern : kPatterns)
      for (const int64_t columns : {5, 130}) {
        const MatrixBits dense = random_matrix(dtype, 200, columns, pattern, 0.5, 5);
        auto many = compress(dense.tensor(), pattern, pool.executor());
        ASSERT_TRUE(many.ok());
        EXPECT_TRUE(same(*many, compact(dense, pattern))) << pattern.text() << columns;
      }
  MatrixBits broken(DType::kBF16, 200, 4);  // in two groups of rows: the first is named
  for (const int64_t row : {70, 199})
    for (const int64_t column : {0, 1, 2}) broken.at(row, column) = bits_of(1, DType::kBF16);
  const auto refused = compress(broken.tensor(), Pattern::keep_of(2, 4), pool.executor());
  ASSERT_FALSE(refused.ok());
  EXPECT_THAT(refused.error().message, HasSubstr("row 70,"));
}

TEST(Compact, compress_refuses_what_is_no_matrix) {
  const Bytes bytes = Bytes::take(std::vector<float>(4));
  EXPECT_FALSE(compress({DType::kF32, {4}, bytes}, Pattern::unstructured()).ok());
  EXPECT_FALSE(compress({DType::kI32, {2, 2}, bytes}, Pattern::unstructured()).ok());
  EXPECT_FALSE(compress({DType::kF32, {2, 3}, bytes}, Pattern::unstructured()).ok());
  EXPECT_FALSE(compress({DType::kF32, {-2, 2}, bytes}, Pattern::unstructured()).ok());
  EXPECT_FALSE(compress({DType::kF32, {int64_t{1} << 40, 0}, {}}, Pattern::unstructured()).ok());
  EXPECT_FALSE(compress({DType::kF32, {2, 2}, bytes}, Pattern{}).ok());
}

TEST(Validate, finds_every_single_flipped_mask_bit) {
  for (const Pattern& pattern :
       {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(3, 5)}) {
    const CompactMatrix sound =
        compact(random_matrix(DType::kBF16, 66, 21, pattern, 0.5, 3), pattern);
    for (size_t byte = 0; byte < sound.bitmap.size(); ++byte)
      for (int bit = 0; bit < 8; ++bit) {
        CompactMatrix broken = sound;
        broken.bitmap = flip(sound.bitmap, byte, bit);
        const auto faults = validate(broken);
        ASSERT_FALSE(faults.empty()) << pattern.text() << " byte " << byte << " bit " << bit;
        const auto row = static_cast<int64_t>(byte) / sound.bitmap_stride_bytes();
        EXPECT_EQ(faults.front().row / kRowGroup, row / kRowGroup);
        if (pattern.kind == PatternKind::kKeepOf) {
          EXPECT_EQ(faults.front().row, row);
        }
      }
  }
}

TEST(Validate, finds_every_flipped_mask_bit_of_wide_rows) {
  for (const auto& [keep, of] :
       {std::pair{1, 2}, {2, 4}, {3, 8}, {8, 16}, {5, 32}, {63, 64}, {3, 5}})
    for (const int64_t columns : {64, 128, 150, 192}) {
      const Pattern pattern = Pattern::keep_of(keep, of);
      const CompactMatrix sound =
          compact(random_matrix(DType::kBF16, 3, columns, pattern, 0.5, 3), pattern);
      ASSERT_EQ(first_fault(sound), "") << pattern.text() << " " << columns;
      for (int64_t column = 0; column < columns; ++column) {
        CompactMatrix broken = sound;
        broken.bitmap =
            flip(sound.bitmap, static_cast<size_t>(sound.bitmap_stride_bytes() + column / 8),
                 static_cast<int>(column % 8));
        const auto faults = validate(broken);
        ASSERT_EQ(faults.size(), 1u) << pattern.text() << " " << columns << " column " << column;
        EXPECT_EQ(faults[0].row, 1);
        EXPECT_EQ(faults[0].column, column / of * of);
      }
    }
}

TEST(Validate, says_the_same_on_any_number_of_threads) {
  const Pattern pattern = Pattern::keep_of(2, 4);
  CompactMatrix matrix = compact(random_matrix(DType::kBF16, 1000, 64, pattern, 0.5, 3), pattern);
  for (const size_t row : {size_t{999}, size_t{3}, size_t{500}, size_t{501}, size_t{64}})
    for (size_t byte = 0; byte < 3; ++byte) matrix.bitmap = flip(matrix.bitmap, row * 8 + byte, 1);
  ThreadPool pool(4);
  for (size_t limit = 1; limit < 20; ++limit) {
    const auto one = validate(matrix, limit), many = validate(matrix, limit, pool.executor());
    ASSERT_EQ(one.size(), std::min<size_t>(limit, 15));
    ASSERT_EQ(many.size(), one.size());
    for (size_t i = 0; i < one.size(); ++i) {
      EXPECT_EQ(one[i].row, (std::array{3, 64, 500, 501, 999}[i / 3]));
      EXPECT_EQ(one[i].row, many[i].row);
      EXPECT_EQ(one[i].column, many[i].column);
      EXPECT_EQ(one[i].what, many[i].what);
    }
  }
}

TEST(CountBits, counts_any_number_of_bytes_anywhere) {
  std::vector<uint8_t> bytes(600);
  for (size_t i = 0; i < bytes.size(); ++i)
    bytes[i] = i < 300 ? 0xff : static_cast<uint8_t>(random_bits(1, 2, i));
  for (size_t first = 0; first < 9; ++first)
    for (size_t size = 0; first + size <= bytes.size(); ++size) {
      int64_t bits = 0;
      for (size_t i = first; i < first + size; ++i) bits += std::popcount(bytes[i]);
      ASSERT_EQ(count_bits(bytes.data() + first, static_cast<int64_t>(size)), bits) << size;
    }
}

TEST(Validate, names_the_64_rows_whose_mask_and_offsets_disagree) {
  const Pattern pattern = Pattern::unstructured();
  const CompactMatrix sound =
      compact(random_matrix(DType::kBF16, 200, 24, pattern, 0.5, 3), pattern);
  CompactMatrix broken = sound;
  broken.bitmap = flip(sound.bitmap, 130 * 3, 2);
  const auto faults = validate(broken);
  ASSERT_GE(faults.size(), 2u);  // the rows, and the size of the values
  EXPECT_EQ(faults[0].row, 128);
  EXPECT_THAT(faults[0].what, HasSubstr("rows 128..191"));
  EXPECT_THAT(faults[1].what, HasSubstr("values holds"));
}

TEST(Validate, names_row_and_column_of_three_bits_in_a_2_4_group) {
  const Pattern pattern = Pattern::keep_of(2, 4);
  MatrixBits dense(DType::kBF16, 5, 16);
  CompactMatrix matrix = compact(dense, pattern);     // every group keeps its two lowest zeros
  matrix.bitmap = flip(matrix.bitmap, 3 * 2 + 1, 6);  // row 3, column 14
  const auto faults = validate(matrix);
  ASSERT_EQ(faults.size(), 1u);
  EXPECT_EQ(faults[0].row, 3);
  EXPECT_EQ(faults[0].column, 12);
  EXPECT_THAT(faults[0].what, HasSubstr("keeps 3 (need 2 for 2:4)"));
}

TEST(Validate, finds_wrong_offsets_and_sizes) {
  const Pattern pattern = Pattern::unstructured();
  const CompactMatrix sound = compact(random_matrix(DType::kF16, 130, 9, pattern, 0.5, 3), pattern);
  for (size_t byte = 0; byte < sound.offsets.size(); ++byte) {
    CompactMatrix broken = sound;
    broken.offsets = flip(sound.offsets, byte, 0);
    EXPECT_NE(first_fault(broken), "") << "offset byte " << byte;
  }
  for (Bytes CompactMatrix::*part :
       {&CompactMatrix::bitmap, &CompactMatrix::values, &CompactMatrix::offsets}) {
    CompactMatrix broken = sound;
    broken.*part = (sound.*part).slice(0, (sound.*part).size() - 1);
    EXPECT_NE(first_fault(broken), "");
    broken.*part = Bytes();
    EXPECT_NE(first_fault(broken), "");
  }
}

TEST(Validate, finds_wrong_blocks) {
  const Pattern pattern = Pattern::block(4, 8);
  const CompactMatrix sound =
      compact(random_matrix(DType::kBF16, 10, 30, pattern, 0.3, 4), pattern);
  ASSERT_EQ(first_fault(sound), "");
  for (size_t byte = 0; byte < sound.block_offsets.size(); ++byte) {
    CompactMatrix broken = sound;
    broken.block_offsets = flip(sound.block_offsets, byte, 7);
    EXPECT_NE(first_fault(broken), "") << "offset byte " << byte;
  }
  CompactMatrix broken = sound;
  broken.block_columns = with_byte(sound.block_columns, 0, std::byte{100});
  EXPECT_THAT(first_fault(broken), HasSubstr("block column 100"));
  broken.block_columns = with_byte(sound.block_columns, 3, std::byte{0x80});  // negative
  EXPECT_NE(first_fault(broken), "");
  broken = sound;
  broken.values = sound.values.slice(0, sound.values.size() - 2);
  EXPECT_THAT(first_fault(broken), HasSubstr("values holds"));
}

TEST(Validate, finds_what_lies_in_blocks_outside_the_matrix) {
  const Pattern pattern = Pattern::block(4, 8);
  for (const DType dtype : kTypes) {
    const CompactMatrix sound = compact(random_matrix(dtype, 10, 30, pattern, 0, 4), pattern);
    ASSERT_EQ(first_fault(sound), "");
    const auto width = static_cast<int64_t>(size_bytes(dtype));
    int64_t outside = 0;
    for (int64_t block = 0; block < 3 * 4; ++block)
      for (int64_t i = 0; i < 4 * 8; ++i) {
        const int64_t row = block / 4 * 4 + i / 8, column = block % 4 * 8 + i % 8;
        CompactMatrix changed = sound;  // a minus zero is no padding either
        changed.values = flip(sound.values, (block * 4 * 8 + i + 1) * width - 1, 7);
        const auto faults = validate(changed);
        if (row < 10 && column < 30) {
          EXPECT_TRUE(faults.empty()) << row << ", " << column;
          continue;
        }
        ++outside;
        ASSERT_EQ(faults.size(), 1u) << row << ", " << column;
        EXPECT_EQ(faults[0].row, std::min<int64_t>(row, 10));
        EXPECT_EQ(faults[0].column, row < 10 ? 30 : 0);
        EXPECT_EQ(faults[0].what, row < 10 ? "a block's columns past the last one are not 0"
                                           : "a block's rows past the last one are not 0");
      }
    EXPECT_EQ(outside, 12 * 32 - 10 * 30);
  }
}

TEST(Validate, refuses_impossible_headers) {
  const CompactMatrix sound = compact(
      random_matrix(DType::kBF16, 4, 8, Pattern::keep_of(2, 4), 0.5, 4), Pattern::keep_of(2, 4));
  CompactMatrix broken = sound;
  broken.rows = -1;
  EXPECT_THAT(first_fault(broken), HasSubstr("shape"));
  broken = sound;
  broken.columns = int64_t{1} << 40;
  EXPECT_THAT(first_fault(broken), HasSubstr("shape"));
  broken = sound;
  broken.pattern.of = 0;
  EXPECT_THAT(first_fault(broken), HasSubstr("pattern"));
  broken = sound;
  broken.values_dtype = DType::kI8;
  EXPECT_THAT(first_fault(broken), HasSubstr("values of"));
  broken = sound;
  broken.pattern = Pattern{};
  EXPECT_NE(first_fault(broken), "");
}

TEST(CheckPattern, names_row_and_column_and_stops_at_the_limit) {
  MatrixBits dense(DType::kF32, 4, 10);
  for (int64_t row = 1; row < 4; ++row)
    for (const int64_t column : {4, 5, 6}) dense.at(row, column) = bits_of(1, DType::kF32);
  const auto faults = check_pattern(dense.tensor(), Pattern::keep_of(2, 4), 2);
  ASSERT_EQ(faults.size(), 2u);
  EXPECT_EQ(faults[0].row, 1);
  EXPECT_EQ(faults[0].column, 4);
  EXPECT_TRUE(check_pattern(dense.tensor(), Pattern::keep_of(3, 4)).empty());
  EXPECT_TRUE(check_pattern(dense.tensor(), Pattern::unstructured()).empty());
}

TEST(DetectPattern, takes_the_strictest_that_holds) {
  for (const Pattern& pattern : {Pattern::keep_of(2, 4), Pattern::keep_of(1, 4),
                                 Pattern::keep_of(4, 8), Pattern::keep_of(8, 16)})
    EXPECT_EQ(detect_pattern(random_matrix(DType::kBF16, 32, 64, pattern, 0, 9).tensor()), pattern)
        << pattern.text();
  const auto half = random_matrix(DType::kBF16, 32, 64, Pattern::unstructured(), 0.5, 9);
  EXPECT_EQ(detect_pattern(half.tensor()), Pattern::unstructured());
  const auto full = random_matrix(DType::kBF16, 32, 64, Pattern{}, 0, 9);
  EXPECT_EQ(detect_pattern(full.tensor()), Pattern{});
}

/// Every implementation of the inner loop against the portable one, at the very end of a buffer:
/// the sanitizers see a read past the values.
TEST(ExpandRow, implementations_agree_to_the_last_byte) {
  const RowExpander& portable = row_expanders().back();
  int ran = 0;
  for (const RowExpander& expander : row_expanders()) {
    if (!expander.runs_here) {
      std::printf("[ NOT RUN  ] expand_row %s: this CPU can't\n", expander.name);
      continue;
    }
    ++ran;
    for (const size_t width : {size_t{2}, size_t{4}})
      for (int64_t columns = 1; columns <= 140; ++columns)
        for (const double density : {0.0, 0.1, 0.5, 0.9, 1.0}) {
          std::vector<uint8_t> bitmap(static_cast<size_t>((columns + 7) / 8));
          int64_t kept = 0;
          for (int64_t column = 0; column < columns; ++column)
            if (random_uniform(columns, 7, column) < density) {
              bitmap[column / 8] |= static_cast<uint8_t>(1 << column % 8);
              ++kept;
            }
          std::vector<std::byte> values(static_cast<size_t>(kept) * width);
          for (size_t i = 0; i < values.size(); ++i)
            values[i] = static_cast<std::byte>(random_bits(columns, 8, i));
          const size_t size = static_cast<size_t>(columns) * width;
          std::vector<std::byte> out(size, std::byte{0x77}), expected(size, std::byte{0x88});
          const std::byte* end = values.data() + values.size();
          const auto run = [&](const RowExpander& e, std::byte* to) {
            return (width == 2 ? e.two_bytes : e.four_bytes)(bitmap.data(), columns, values.data(),
                                                             end, to);
          };
          EXPECT_EQ(run(expander, out.data()), kept);
          EXPECT_EQ(run(portable, expected.data()), kept);
          ASSERT_EQ(out, expected) << expander.name << " " << width << " bytes, " << columns
                                   << " columns, density " << density;
        }
  }
  EXPECT_GE(ran, 1);
}

}  // namespace
}  // namespace lacuna::format
