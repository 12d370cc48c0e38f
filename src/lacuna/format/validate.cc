#include <algorithm>
#include <bit>

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

void validate_bitmap(const CompactMatrix& m, Faults& faults) {
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
  int64_t kept = 0;  // in that unit
  for (int64_t group = 0; group < groups && !faults.full(); ++group) {
    const int64_t first = group * kRowGroup, last = std::min(first + kRowGroup, m.rows);
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
      faults.add(first, 0,
                 fmt::format("rows {}..{} keep {} {} by the bitmap, {} by offsets {} and {}", first,
                             last - 1, need, unit, declared, group, group + 1));
  }
  if (!faults.full())
    faults.size("values", m.values.size(),
                coded ? kept : kept * static_cast<int64_t>(size_bytes(m.values_dtype)));
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

void validate_keep_of(const CompactMatrix& m, Faults& faults) {
  const auto width = static_cast<int64_t>(size_bytes(m.values_dtype));
  if (!faults.size("bitmap", m.bitmap.size(), m.rows * m.bitmap_stride_bytes()) ||
      !faults.size("values", m.values.size(), m.rows * m.values_row_bytes()))
    return;
  if (m.columns == 0) return;
  check_padding_bits(m, faults);
  // A short last group of fewer columns than `keep` leaves value slots unused.
  const int64_t unused = std::max<int64_t>(
      0, m.columns % m.pattern.of ? m.pattern.keep - m.columns % m.pattern.of : 0);
  for (int64_t row = 0; row < m.rows && !faults.full(); ++row) {
    const std::byte* row_end = m.values.data() + (row + 1) * m.values_row_bytes();
    if (m.quantization.none() && !all_zero(row_end - unused * width, row_end))
      faults.add(row, m.columns, "an unused value slot is not +0");
    const uint8_t* bits = m.bitmap.as<uint8_t>() + row * m.bitmap_stride_bytes();
    for (int64_t first = 0; first < m.columns && !faults.full(); first += m.pattern.of) {
      const int64_t columns = std::min<int64_t>(m.pattern.of, m.columns - first);
      const int kept = std::popcount(group_bits(bits, first, columns));
      const auto wanted = static_cast<int>(std::min<int64_t>(m.pattern.keep, columns));
      if (kept != wanted)
        faults.add(row, first,
                   fmt::format("group of {} keeps {} (need {} for {})", columns, kept, wanted,
                               m.pattern.text()));
    }
  }
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

/// Is everything 0 in a run that is no code?
bool padding_is_zero(Code code, const CodeRun& run, const std::byte* values) {
  const std::byte* begin = values + run.first_byte;
  const int64_t used = code_bytes(code, run.codes);
  const bool half = code == Code::kInt4 && run.codes % 2 != 0;
  return (!half || (begin[used - 1] & std::byte{0xf0}) == std::byte{}) &&
         all_zero(begin + used, begin + run.bytes);
}

/// The column of a run's i-th code.
int64_t column_of(const RowWalk& walk, const CodeRun& run, int64_t i) {
  int64_t column = run.first_column;
  for (;; ++column)
    if (walk.bitmap()[column / 8] >> (column % 8) & 1 && i-- == 0) return column;
}

/// Scales, zero points, codes and what pads them; mask and sizes of values are sound.
void validate_codes(const CompactMatrix& m, Faults& faults) {
  const Quantization& quantization = m.quantization;
  const int64_t groups = quantization.groups(m.columns);
  if (!faults.size("scales", m.scales.size(), m.rows * groups * 2) ||
      !faults.size("zero_points", m.zero_points.size(),
                   quantization.zero_points ? m.rows * groups : 0))
    return;
  const int64_t width = quantization.group > 0 ? quantization.group : m.columns;
  for (int64_t i = 0; i < m.rows * groups && !faults.full(); ++i) {
    const auto scale = read_unaligned<uint16_t>(m.scales.as<uint16_t>() + i);
    if (scale > 0x7f7f)  // the largest finite bf16; negative ones have a higher bit
      faults.add(i / groups, i % groups * width,
                 fmt::format("scale {} (need a finite one, not negative)", bf16_to_float(scale)));
    if (!quantization.zero_points) continue;
    const int zero = m.zero_points.as<int8_t>()[i];
    if (zero < 0 || zero > 15)
      faults.add(i / groups, i % groups * width, fmt::format("zero point {} (need 0..15)", zero));
  }
  std::vector<uint8_t> codes;
  for (RowWalk walk(m, 0); walk.row() < m.rows && !faults.full(); walk.next()) {
    codes.resize(static_cast<size_t>(walk.codes()));
    read_codes(m, walk, codes.data());
    size_t next = 0;
    for (const CodeRun& run : walk.runs()) {
      for (int64_t i = 0; i < run.codes; ++i)
        if (const char* what = fault_of(quantization.code, codes[next++]))
          faults.add(walk.row(), column_of(walk, run, i), what);
      if (!padding_is_zero(quantization.code, run, m.values.data()))
        faults.add(walk.row(), m.columns, "bits behind the codes are not 0");
    }
  }
}

}  // namespace

std::vector<Violation> validate(const CompactMatrix& matrix, size_t limit) {
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
      validate_bitmap(matrix, faults);
      break;
    case PatternKind::kKeepOf:
      validate_keep_of(matrix, faults);
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
    validate_codes(matrix, faults);
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
