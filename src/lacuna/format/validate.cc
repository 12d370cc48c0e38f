#include <algorithm>
#include <bit>

#include "lacuna/format/compact.h"
#include "lacuna/format/element.h"

namespace lacuna::format {
namespace {

/// Collects violations up to a limit.
class Faults {
 public:
  explicit Faults(size_t limit) : limit_(limit) {}
  bool full() const { return found_.size() >= limit_; }
  void add(int64_t row, int64_t column, std::string what) {
    if (!full()) found_.push_back({row, column, std::move(what)});
  }
  bool size(const char* part, size_t got, int64_t need) {
    if (need >= 0 && got == static_cast<size_t>(need)) return true;
    add(-1, -1, fmt::format("{} holds {} bytes (need {})", part, got, need));
    return false;
  }
  std::vector<Violation> take() { return std::move(found_); }

 private:
  size_t limit_;
  std::vector<Violation> found_;
};

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
  const auto width = static_cast<int64_t>(size_bytes(m.values_dtype));
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
  int64_t kept = 0;
  for (int64_t group = 0; group < groups && !faults.full(); ++group) {
    const int64_t first = group * kRowGroup, last = std::min(first + kRowGroup, m.rows);
    const int64_t bits = count_bits(bitmap + first * stride, (last - first) * stride);
    kept += bits;
    // Unsigned: offsets from a file may be anything.
    const auto declared = static_cast<int64_t>(static_cast<uint64_t>(offset(group + 1)) -
                                               static_cast<uint64_t>(offset(group)));
    if (declared != bits)
      faults.add(first, 0,
                 fmt::format("rows {}..{} keep {} values by the bitmap, {} by offsets {} and {}",
                             first, last - 1, bits, declared, group, group + 1));
  }
  if (!faults.full()) faults.size("values", m.values.size(), kept * width);
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
      !faults.size("values", m.values.size(), m.rows * m.values_per_row() * width))
    return;
  if (m.columns == 0) return;
  check_padding_bits(m, faults);
  // A short last group of fewer columns than `keep` leaves value slots unused.
  const int64_t unused = std::max<int64_t>(
      0, m.columns % m.pattern.of ? m.pattern.keep - m.columns % m.pattern.of : 0);
  for (int64_t row = 0; row < m.rows && !faults.full(); ++row) {
    const std::byte* row_end = m.values.data() + (row + 1) * m.values_per_row() * width;
    if (std::any_of(row_end - unused * width, row_end,
                    [](std::byte b) { return b != std::byte{}; }))
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

void validate_block(const CompactMatrix& m, Faults& faults) {
  const int64_t bands = (m.rows + m.pattern.block_rows - 1) / m.pattern.block_rows;
  const int64_t across = (m.columns + m.pattern.block_columns - 1) / m.pattern.block_columns;
  if (!faults.size("block_offsets", m.block_offsets.size(), (bands + 1) * 8)) return;
  const auto blocks = static_cast<int64_t>(m.block_columns.size() / 4);
  int64_t before = 0;
  for (int64_t band = 0; band <= bands; ++band) {
    const int64_t offset = read_unaligned<int64_t>(m.block_offsets.as<int64_t>() + band);
    if (offset < before || offset > blocks || (band == 0 && offset != 0) ||
        (band == bands && offset != blocks)) {
      faults.add(std::min(band * m.pattern.block_rows, m.rows), 0,
                 fmt::format("block offset {} is {} (need {}..{}, ending at {})", band, offset,
                             before, blocks, blocks));
      return;
    }
    before = offset;
  }
  faults.size("block_columns", m.block_columns.size(), blocks * 4);
  faults.size("values", m.values.size(),
              blocks * m.pattern.block_rows * m.pattern.block_columns *
                  static_cast<int64_t>(size_bytes(m.values_dtype)));
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
}

}  // namespace

std::vector<Violation> validate(const CompactMatrix& matrix, size_t limit) {
  Faults faults(limit);
  if (matrix.rows < 0 || matrix.columns < 0 || matrix.rows > kLargestExtent ||
      matrix.columns > kLargestExtent) {
    faults.add(-1, -1,
               fmt::format("shape {} (need extents of 0..2^31-1)",
                           shape_text({matrix.rows, matrix.columns})));
    return faults.take();
  }
  if (!storable(matrix.values_dtype)) {
    faults.add(-1, -1,
               fmt::format("values of {} (need float32, bfloat16 or float16)",
                           long_name(matrix.values_dtype)));
    return faults.take();
  }
  if (!Pattern::parse(matrix.pattern.text()).ok()) {
    faults.add(-1, -1, fmt::format("impossible pattern {}", matrix.pattern.text()));
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
      faults.add(-1, -1, "no sparse pattern");
      break;
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
