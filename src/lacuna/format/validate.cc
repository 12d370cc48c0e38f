#include <algorithm>
#include <atomic>
#include <bit>
#include <cstring>

#include "lacuna/core/half.h"
#include "lacuna/format/codes.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/faults.h"

namespace lacuna::format {
namespace {

void check_padding_bits(const CompactMatrix& m, Faults& faults) {
  if (m.columns % 8 == 0) return;
  const auto allowed = static_cast<uint8_t>((1u << (m.columns % 8)) - 1);
  const int64_t stride = m.bitmap_stride_bytes();
  for (int64_t row = 0; row < m.rows && !faults.full(); ++row)
    if (m.bitmap.as<uint8_t>()[row * stride + stride - 1] & ~allowed)
      faults.add(row, m.columns, "a bit past the last column is set");
}

void validate_bitmap(const CompactMatrix& m, const Executor& executor, Faults& faults) {
  const int64_t groups = (m.rows + kRowGroup - 1) / kRowGroup;
  if (!faults.size("bitmap", m.bitmap.size(), m.rows * m.bitmap_stride_bytes()) ||
      !faults.size("offsets", m.offsets.size(), (groups + 1) * 8))
    return;
  check_padding_bits(m, faults);
  const auto* bitmap = m.bitmap.as<uint8_t>();
  const int64_t stride = m.bitmap_stride_bytes();
  const auto offset = [&](int64_t group) {
    return read_unaligned<int64_t>(m.offsets.as<int64_t>() + group);
  };
  if (offset(0) != 0) faults.add(0, 0, fmt::format("offset 0 is {} (need 0)", offset(0)));
  const bool coded = !m.quantization.none();
  const char* unit = coded ? "bytes of values" : "values";
  std::atomic<int64_t> kept = 0;  // in that unit
  faults.check_rows(m.rows, executor, [&](int64_t first, int64_t last, Faults& found) {
    const int64_t group = first / kRowGroup;
    int64_t need = 0;
    if (coded) {
      for (int64_t row = first; row < last; ++row)
        need += row_code_bytes(m.quantization.code, bitmap + row * stride, m.columns);
    } else {
      need = count_bits(bitmap + first * stride, (last - first) * stride);
    }
    kept += need;
    // Unsigned: offsets from a file may be anything.
    const auto declared = static_cast<int64_t>(static_cast<uint64_t>(offset(group + 1)) -
                                               static_cast<uint64_t>(offset(group)));
    if (declared != need)
      found.add(first, 0,
                fmt::format("rows {}..{} keep {} {} by the bitmap, {} by offsets {} and {}", first,
                            last - 1, need, unit, declared, group, group + 1));
  });
  if (!faults.full())
    faults.size("values", m.values.size(),
                coded ? kept.load() : kept * static_cast<int64_t>(size_bytes(m.values_dtype)));
}

bool all_zero(const std::byte* begin, const std::byte* end) {
  return std::all_of(begin, end, [](std::byte b) { return b == std::byte{}; });
}

/// Kept bits of columns [first, first+width) of one row.
uint64_t group_bits(const uint8_t* row, int64_t first, int64_t width) {
  uint64_t bits = 0;
  for (int64_t i = 0; i < width; ++i)
    bits |= uint64_t{static_cast<uint8_t>(row[(first + i) / 8] >> ((first + i) % 8) & 1)} << i;
  return bits;
}

/// Whether each `kOf` bits of some words hold as many ones as they should. Counts side by side, in
/// fields of 2, 4, ... bits.
template <int kOf>
bool groups_keep(const uint8_t* bits, int64_t words, int keep) {
  constexpr auto kEach = [](int width) {
    return ~uint64_t{0} / ((uint64_t{2} << (width - 1)) - 1);
  };
  uint64_t differs = 0;
  for (int64_t word = 0; word < words; ++word) {
    auto x = read_unaligned<uint64_t>(bits + 8 * word);
    for (int width = 1; width < kOf; width *= 2) {
      const uint64_t lower = kEach(2 * width) * ((uint64_t{1} << width) - 1);
      x = (x & lower) + (x >> width & lower);
    }
    differs |= x ^ kEach(kOf) * static_cast<uint64_t>(keep);
  }
  return differs == 0;
}

/// Columns from the first on whose groups are known to keep what they should, without a look at
/// each: whole words of the mask, where groups don't cross them.
int64_t columns_in_order(const Pattern& pattern, const uint8_t* bits, int64_t columns) {
  const int64_t words = columns / 64;
  const auto all = [&](auto holds) { return holds(bits, words, pattern.keep) ? words * 64 : 0; };
  switch (pattern.of) {
    case 2:
      return all(groups_keep<2>);
    case 4:
      return all(groups_keep<4>);
    case 8:
      return all(groups_keep<8>);
    case 16:
      return all(groups_keep<16>);
    case 32:
      return all(groups_keep<32>);
    case 64:
      return all(groups_keep<64>);
    default:
      return 0;
  }
}

void check_groups(const CompactMatrix& m, int64_t row, Faults& faults) {
  const uint8_t* bits = m.bitmap.as<uint8_t>() + row * m.bitmap_stride_bytes();
  int64_t first = columns_in_order(m.pattern, bits, m.columns);
  for (; first < m.columns && !faults.full(); first += m.pattern.of) {
    const int64_t columns = std::min<int64_t>(m.pattern.of, m.columns - first);
    const int kept = std::popcount(group_bits(bits, first, columns));
    const auto wanted = static_cast<int>(std::min<int64_t>(m.pattern.keep, columns));
    if (kept != wanted)
      faults.add(row, first,
                 fmt::format("group of {} keeps {} (need {} for {})", columns, kept, wanted,
                             m.pattern.text()));
  }
}

void validate_keep_of(const CompactMatrix& m, const Executor& executor, Faults& faults) {
  const auto width = static_cast<int64_t>(size_bytes(m.values_dtype));
  if (!faults.size("bitmap", m.bitmap.size(), m.rows * m.bitmap_stride_bytes()) ||
      !faults.size("values", m.values.size(), m.rows * m.values_row_bytes()))
    return;
  if (m.columns == 0) return;
  check_padding_bits(m, faults);
  // A short last group of fewer columns than `keep` leaves value slots unused.
  const int64_t unused = std::max<int64_t>(
      0, m.columns % m.pattern.of ? m.pattern.keep - m.columns % m.pattern.of : 0);
  faults.check_rows(m.rows, executor, [&](int64_t begin, int64_t end, Faults& found) {
    for (int64_t row = begin; row < end && !found.full(); ++row) {
      const std::byte* row_end = m.values.data() + (row + 1) * m.values_row_bytes();
      if (m.quantization.none() && !all_zero(row_end - unused * width, row_end))
        found.add(row, m.columns, "an unused value slot is not +0");
      check_groups(m, row, found);
    }
  });
}

/// Rows and columns of edge blocks that lie outside the matrix. (Columns of codes are padded like
/// any other run of them.)
void check_block_padding(const CompactMatrix& m, Faults& faults) {
  const int64_t height = m.pattern.block_rows, width = m.pattern.block_columns;
  const int64_t row_bytes = m.values_row_bytes();
  const auto offset = [&](int64_t band) {
    return read_unaligned<int64_t>(m.block_offsets.as<int64_t>() + band);
  };
  const auto block_row = [&](int64_t block, int64_t row) {
    return m.values.data() + (block * height + row) * row_bytes;
  };
  if (m.quantization.none() && m.columns % width != 0) {
    const int64_t used = m.columns % width * static_cast<int64_t>(size_bytes(m.values_dtype));
    for (int64_t top = 0; top < m.rows && !faults.full(); top += height) {
      const int64_t last = offset(top / height + 1) - 1;  // block columns ascend
      if (last < offset(top / height) ||
          read_unaligned<int32_t>(m.block_columns.as<int32_t>() + last) != m.columns / width)
        continue;
      for (int64_t row = 0; row < std::min(height, m.rows - top); ++row)
        if (!all_zero(block_row(last, row) + used, block_row(last, row + 1)))
          faults.add(top + row, m.columns, "a block's columns past the last one are not 0");
    }
  }
  if (m.rows % height == 0) return;
  for (int64_t block = offset(m.rows / height); block < offset(m.rows / height + 1); ++block)
    if (!all_zero(block_row(block, m.rows % height), block_row(block + 1, 0)))
      faults.add(m.rows, 0, "a block's rows past the last one are not 0");
}

void validate_block(const CompactMatrix& m, Faults& faults) {
  const int64_t bands = (m.rows + m.pattern.block_rows - 1) / m.pattern.block_rows;
  const int64_t across = (m.columns + m.pattern.block_columns - 1) / m.pattern.block_columns;
  if (!faults.size("block_offsets", m.block_offsets.size(), (bands + 1) * 8)) return;
  const auto blocks = static_cast<int64_t>(m.block_columns.size() / 4);
  if (!faults.offsets("block offset", m.block_offsets, m.rows, m.pattern.block_rows, blocks))
    return;
  faults.size("block_columns", m.block_columns.size(), blocks * 4);
  faults.size("values", m.values.size(), blocks * m.pattern.block_rows * m.values_row_bytes());
  for (int64_t band = 0; band < bands && !faults.full(); ++band) {
    const int64_t begin = read_unaligned<int64_t>(m.block_offsets.as<int64_t>() + band);
    const int64_t end = read_unaligned<int64_t>(m.block_offsets.as<int64_t>() + band + 1);
    int64_t previous = -1;
    for (int64_t block = begin; block < end && !faults.full(); ++block) {
      const int64_t column = read_unaligned<int32_t>(m.block_columns.as<int32_t>() + block);
      if (column <= previous || column >= across)
        faults.add(band * m.pattern.block_rows, column * m.pattern.block_columns,
                   fmt::format("block column {} (need ascending, below {})", column, across));
      previous = column;
    }
  }
  if (faults.none()) check_block_padding(m, faults);
}

/// What a code breaks, or null.
const char* fault_of(Code code, uint8_t bits) {
  if (code == Code::kInt8 && bits == 0x80) return "code -128 (need -127..127)";
  if (code == Code::kFP8 && (bits & 0x7f) == 0x7f) return "code NaN (need a finite one)";
  return nullptr;
}

/// Whether fault_of() finds nothing in a run, many codes at a time.
bool codes_are_sound(Code code, const uint8_t* codes, int64_t count) {
  if (code == Code::kInt8)
    return count == 0 || std::memchr(codes, 0x80, static_cast<size_t>(count)) == nullptr;
  uint8_t largest = 0;
  if (code == Code::kFP8)
    for (int64_t i = 0; i < count; ++i)
      largest = std::max(largest, static_cast<uint8_t>(codes[i] & 0x7f));
  return largest < 0x7f;
}

/// The column of a run's i-th code.
int64_t column_of(const RowWalk& walk, const CodeRun& run, int64_t i) {
  int64_t column = run.first_column;
  for (;; ++column)
    if (walk.bitmap()[column / 8] >> (column % 8) & 1 && i-- == 0) return column;
}

/// Scales and zero points of rows [first, last).
void check_scales(const CompactMatrix& m, int64_t first, int64_t last, Faults& faults) {
  constexpr uint16_t kLargest = 0x7f7f;  // finite bf16; negative ones have a higher bit
  const int64_t groups = m.quantization.groups(m.columns);
  const auto scale = [&](int64_t i) {
    return read_unaligned<uint16_t>(m.scales.as<uint16_t>() + i);
  };
  uint16_t signs = 0;  // of those above kLargest, in a form that becomes vector code
  for (int64_t i = first * groups; i < last * groups; ++i)
    signs |= static_cast<uint16_t>(scale(i) | (scale(i) + (0x7fff - kLargest)));
  if (signs < 0x8000 && !m.quantization.zero_points) return;
  const int64_t width = m.quantization.group > 0 ? m.quantization.group : m.columns;
  for (int64_t i = first * groups; i < last * groups && !faults.full(); ++i) {
    if (scale(i) > kLargest)
      faults.add(
          i / groups, i % groups * width,
          fmt::format("scale {} (need a finite one, not negative)", bf16_to_float(scale(i))));
    if (!m.quantization.zero_points) continue;
    const int zero = m.zero_points.as<int8_t>()[i];
    if (zero < 0 || zero > 15)
      faults.add(i / groups, i % groups * width, fmt::format("zero point {} (need 0..15)", zero));
  }
}

/// Codes of the walk's row, and what pads them.
void check_row_of_codes(const CompactMatrix& m, const RowWalk& walk, Faults& faults) {
  const Code code = m.quantization.code;
  if (code != Code::kInt4)  // there, all of them may be
    for (const CodeRun& run : walk.runs()) {
      const uint8_t* codes = m.values.as<uint8_t>() + run.first_byte;
      if (codes_are_sound(code, codes, run.codes)) continue;
      for (int64_t i = 0; i < run.codes; ++i)
        if (const char* what = fault_of(code, codes[i]))
          faults.add(walk.row(), column_of(walk, run, i), what);
    }
  if (!padding_is_zero(m, walk))
    faults.add(walk.row(), m.columns, "bits behind the codes are not 0");
}

/// Scales, zero points, codes and what pads them; mask and sizes of values are sound.
void validate_codes(const CompactMatrix& m, const Executor& executor, Faults& faults) {
  const int64_t groups = m.quantization.groups(m.columns);
  if (!faults.size("scales", m.scales.size(), m.rows * groups * 2) ||
      !faults.size("zero_points", m.zero_points.size(),
                   m.quantization.zero_points ? m.rows * groups : 0))
    return;
  faults.check_rows(m.rows, executor, [&](int64_t first, int64_t last, Faults& found) {
    check_scales(m, first, last, found);
  });
  faults.check_rows(m.rows, executor, [&](int64_t first, int64_t last, Faults& found) {
    for (RowWalk walk(m, first); walk.row() < last && !found.full(); walk.next())
      check_row_of_codes(m, walk, found);
  });
}

}  // namespace

std::vector<Violation> validate(const CompactMatrix& matrix, size_t limit,
                                const Executor& executor) {
  Faults faults(limit);
  if (!faults.header(matrix.rows, matrix.columns, matrix.values_dtype)) return faults.take();
  if (!Pattern::parse(matrix.pattern.text()).ok()) {
    faults.add(-1, -1, fmt::format("impossible pattern {}", matrix.pattern.text()));
    return faults.take();
  }
  const bool coded = !matrix.quantization.none();
  const auto quantization = Quantization::parse(matrix.quantization.text());
  if (!quantization.ok() || *quantization != matrix.quantization) {
    faults.add(-1, -1,
               fmt::format("impossible quantization {} with groups of {}",
                           matrix.quantization.text(), matrix.quantization.group));
    return faults.take();
  }
  switch (matrix.pattern.kind) {
    case PatternKind::kUnstructured:
      validate_bitmap(matrix, executor, faults);
      break;
    case PatternKind::kKeepOf:
      validate_keep_of(matrix, executor, faults);
      break;
    case PatternKind::kBlock:
      validate_block(matrix, faults);
      break;
    case PatternKind::kDense:
      if (coded) {
        faults.size("values", matrix.values.size(), matrix.rows * matrix.values_row_bytes());
      } else {
        faults.add(-1, -1, "no sparse pattern, no codes");
      }
      break;
  }
  if (coded && faults.none()) {
    validate_codes(matrix, executor, faults);
  } else if (!coded) {
    faults.size("scales", matrix.scales.size(), 0);
    faults.size("zero_points", matrix.zero_points.size(), 0);
  }
  return faults.take();
}

std::vector<Violation> check_pattern(const Tensor& dense, const Pattern& pattern, size_t limit) {
  Faults faults(limit);
  if (dense.shape.size() != 2 || !storable(dense.dtype) || pattern.kind != PatternKind::kKeepOf)
    return {};
  with_bits(dense.dtype, [&](auto bits) {
    const Dense<decltype(bits)> view{dense.bytes.data(), dense.shape[0], dense.shape[1]};
    for (int64_t row = 0; row < view.rows && !faults.full(); ++row)
      for (int64_t first = 0; first < view.columns && !faults.full(); first += pattern.of) {
        const int64_t last = std::min<int64_t>(first + pattern.of, view.columns);
        int64_t kept = 0;
        for (int64_t column = first; column < last; ++column)
          kept += !is_zero(view.at(row, column));
        if (kept > pattern.keep)
          faults.add(row, first,
                     fmt::format("group of {} holds {} non-zeros (need at most {} for {})",
                                 last - first, kept, pattern.keep, pattern.text()));
      }
  });
  return faults.take();
}

Pattern detect_pattern(const Tensor& dense) {
  if (dense.shape.size() != 2 || !storable(dense.dtype)) return {};
  const int64_t zeros = count_zeros(dense);
  if (zeros == 0 || dense.elements() == 0) return {};
  const double density = 1.0 - static_cast<double>(zeros) / static_cast<double>(dense.elements());
  // From strict to loose; a pattern can hold only where the matrix is at least as sparse as it
  // demands.
  for (const auto& [keep, of] : {std::pair{1, 8},
                                 {1, 4},
                                 {2, 8},
                                 {3, 8},
                                 {2, 4},
                                 {4, 8},
                                 {8, 16},
                                 {16, 32},
                                 {5, 8},
                                 {3, 4},
                                 {6, 8}}) {
    if (density > static_cast<double>(keep) / of + 1e-9) continue;
    const Pattern pattern = Pattern::keep_of(keep, of);
    if (check_pattern(dense, pattern, 1).empty()) return pattern;
  }
  return Pattern::unstructured();
}

}  // namespace lacuna::format
