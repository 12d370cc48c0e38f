#include "lacuna/format/compact.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace lacuna::format {
namespace {

/// Calls f with a value of the unsigned integer type that carries the dtype's bits.
template <class F>
auto with_bits(DType dtype, F&& f) {
  return size_bytes(dtype) == 4 ? f(uint32_t{}) : f(uint16_t{});
}

template <class U>
bool is_zero(U bits) {
  return static_cast<U>(bits << 1) == 0;  // both zeros
}

bool supported(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

template <class U>
struct Dense {
  const std::byte* data;
  int64_t rows, columns;
  U at(int64_t row, int64_t column) const {
    return read_unaligned<U>(data + (row * columns + column) * static_cast<int64_t>(sizeof(U)));
  }
};

template <class U>
Result<CompactMatrix> compress_bitmap(const Dense<U>& dense, CompactMatrix out) {
  const int64_t stride = out.bitmap_stride_bytes();
  std::vector<uint8_t> bitmap(static_cast<size_t>(dense.rows * stride));
  std::vector<U> values;
  std::vector<int64_t> offsets;
  for (int64_t row = 0; row < dense.rows; ++row) {
    if (row % kRowGroup == 0) offsets.push_back(static_cast<int64_t>(values.size()));
    for (int64_t column = 0; column < dense.columns; ++column) {
      const U bits = dense.at(row, column);
      if (is_zero(bits)) continue;
      bitmap[row * stride + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
      values.push_back(bits);
    }
  }
  offsets.push_back(static_cast<int64_t>(values.size()));
  out.bitmap = Bytes::take(std::move(bitmap));
  out.values = Bytes::take(std::move(values));
  out.offsets = Bytes::take(std::move(offsets));
  return out;
}

template <class U>
Result<CompactMatrix> compress_keep_of(const Dense<U>& dense, CompactMatrix out) {
  const int64_t stride = out.bitmap_stride_bytes(), of = out.pattern.of, keep = out.pattern.keep;
  std::vector<uint8_t> bitmap(static_cast<size_t>(dense.rows * stride));
  std::vector<U> values(static_cast<size_t>(dense.rows * out.values_per_row()));
  for (int64_t row = 0; row < dense.rows; ++row) {
    U* next = values.data() + row * out.values_per_row();
    for (int64_t first = 0; first < dense.columns; first += of, next += keep) {
      const int64_t width = std::min(of, dense.columns - first);
      uint64_t kept = 0;
      for (int64_t i = 0; i < width; ++i)
        if (!is_zero(dense.at(row, first + i))) kept |= uint64_t{1} << i;
      const int64_t wanted = std::min(keep, width);
      if (std::popcount(kept) > wanted)
        return bad_input(
            "compress: row {}, columns {}..{} hold {} non-zeros (need at most {} for {}). Prune "
            "with this pattern first.",
            row, first, first + width - 1, std::popcount(kept), wanted, out.pattern.text());
      for (int64_t i = 0; std::popcount(kept) < wanted; ++i) kept |= uint64_t{1} << i;
      int64_t slot = 0;
      for (int64_t i = 0; i < width; ++i) {
        if (!(kept >> i & 1)) continue;
        const int64_t column = first + i;
        bitmap[row * stride + column / 8] |= static_cast<uint8_t>(1u << (column % 8));
        const U bits = dense.at(row, column);
        next[slot++] = is_zero(bits) ? U{0} : bits;
      }
    }
  }
  out.bitmap = Bytes::take(std::move(bitmap));
  out.values = Bytes::take(std::move(values));
  return out;
}

template <class U>
Result<CompactMatrix> compress_block(const Dense<U>& dense, CompactMatrix out) {
  const int64_t height = out.pattern.block_rows, width = out.pattern.block_columns;
  std::vector<int32_t> columns;
  std::vector<int64_t> offsets;
  std::vector<U> values;
  for (int64_t top = 0; top < dense.rows; top += height) {
    offsets.push_back(static_cast<int64_t>(columns.size()));
    const int64_t bottom = std::min(dense.rows, top + height);
    for (int64_t left = 0; left < dense.columns; left += width) {
      const int64_t right = std::min(dense.columns, left + width);
      bool any = false;
      for (int64_t row = top; row < bottom && !any; ++row)
        for (int64_t column = left; column < right && !any; ++column)
          any = !is_zero(dense.at(row, column));
      if (!any) continue;
      columns.push_back(static_cast<int32_t>(left / width));
      const size_t start = values.size();
      values.resize(start + static_cast<size_t>(height * width));
      for (int64_t row = top; row < bottom; ++row)
        for (int64_t column = left; column < right; ++column) {
          const U bits = dense.at(row, column);
          values[start + (row - top) * width + (column - left)] = is_zero(bits) ? U{0} : bits;
        }
    }
  }
  offsets.push_back(static_cast<int64_t>(columns.size()));
  out.values = Bytes::take(std::move(values));
  out.block_columns = Bytes::take(std::move(columns));
  out.block_offsets = Bytes::take(std::move(offsets));
  return out;
}

template <class U>
void expand_rows_of(const CompactMatrix& m, int64_t first, int64_t last, U* out) {
  const size_t row_bytes = static_cast<size_t>(m.columns) * sizeof(U);
  std::memset(out, 0, row_bytes * static_cast<size_t>(last - first));
  if (m.pattern.kind == PatternKind::kBlock) {
    const int64_t height = m.pattern.block_rows, width = m.pattern.block_columns;
    for (int64_t row = first; row < last; ++row) {
      const int64_t band = row / height;
      const int64_t begin = read_unaligned<int64_t>(m.block_offsets.as<int64_t>() + band);
      const int64_t end = read_unaligned<int64_t>(m.block_offsets.as<int64_t>() + band + 1);
      for (int64_t block = begin; block < end; ++block) {
        const int64_t left =
            int64_t{read_unaligned<int32_t>(m.block_columns.as<int32_t>() + block)} * width;
        const std::byte* from =
            m.values.data() + ((block * height + row % height) * width) * sizeof(U);
        std::memcpy(out + (row - first) * m.columns + left, from,
                    static_cast<size_t>(std::min(width, m.columns - left)) * sizeof(U));
      }
    }
    return;
  }
  const int64_t stride = m.bitmap_stride_bytes();
  const auto* bitmap = m.bitmap.as<uint8_t>();
  const bool keep_of = m.pattern.kind == PatternKind::kKeepOf;
  int64_t next = 0;
  if (!keep_of) {
    next = read_unaligned<int64_t>(m.offsets.as<int64_t>() + first / kRowGroup);
    for (int64_t i = first / kRowGroup * kRowGroup * stride; i < first * stride; ++i)
      next += std::popcount(bitmap[i]);
  }
  for (int64_t row = first; row < last; ++row) {
    if (keep_of) next = row * m.values_per_row();
    U* to = out + (row - first) * m.columns;
    for (int64_t byte = 0; byte < stride; ++byte)
      for (unsigned bits = bitmap[row * stride + byte]; bits; bits &= bits - 1)
        to[byte * 8 + std::countr_zero(bits)] =
            read_unaligned<U>(m.values.data() + static_cast<size_t>(next++) * sizeof(U));
  }
}

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
  int64_t kept = 0;
  for (int64_t group = 0; group <= groups && !faults.full(); ++group) {
    const int64_t declared = read_unaligned<int64_t>(m.offsets.as<int64_t>() + group);
    if (declared != kept)
      faults.add(std::min(group * kRowGroup, m.rows), 0,
                 fmt::format("offset {} says {} kept values before this row, the bitmap has {}",
                             group, declared, kept));
    const int64_t last = std::min((group + 1) * kRowGroup, m.rows);
    for (int64_t i = group * kRowGroup * stride; i < last * stride; ++i)
      kept += std::popcount(bitmap[i]);
  }
  faults.size("values", m.values.size(), kept * width);
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
  check_padding_bits(m, faults);
  for (int64_t row = 0; row < m.rows && !faults.full(); ++row) {
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

Result<CompactMatrix> compress(const Tensor& dense, const Pattern& pattern) {
  if (dense.shape.size() != 2 || !supported(dense.dtype))
    return bad_input("compress: needs a matrix of float32, bfloat16 or float16 (got {} {}).",
                     long_name(dense.dtype), shape_text(dense.shape));
  CompactMatrix out;
  out.pattern = pattern;
  out.rows = dense.shape[0];
  out.columns = dense.shape[1];
  out.values_dtype = dense.dtype;
  return with_bits(dense.dtype, [&](auto bits) -> Result<CompactMatrix> {
    const Dense<decltype(bits)> view{dense.bytes.data(), out.rows, out.columns};
    switch (pattern.kind) {
      case PatternKind::kUnstructured:
        return compress_bitmap(view, std::move(out));
      case PatternKind::kKeepOf:
        return compress_keep_of(view, std::move(out));
      case PatternKind::kBlock:
        return compress_block(view, std::move(out));
      case PatternKind::kDense:
        break;
    }
    return bad_input("compress: a dense matrix has no compact form (need a sparse pattern).");
  });
}

void expand_rows(const CompactMatrix& matrix, int64_t first, int64_t last, void* out) {
  with_bits(matrix.values_dtype, [&](auto bits) {
    expand_rows_of(matrix, first, last, static_cast<decltype(bits)*>(out));
  });
}

Tensor expand(const CompactMatrix& matrix) {
  const size_t bytes =
      static_cast<size_t>(matrix.rows * matrix.columns) * size_bytes(matrix.values_dtype);
  std::vector<std::byte> dense(bytes);
  expand_rows(matrix, 0, matrix.rows, dense.data());
  return {matrix.values_dtype, {matrix.rows, matrix.columns}, Bytes::take(std::move(dense))};
}

std::vector<Violation> validate(const CompactMatrix& matrix, size_t limit) {
  Faults faults(limit);
  if (matrix.rows < 0 || matrix.columns < 0 || !supported(matrix.values_dtype) ||
      !element_count({matrix.rows, matrix.columns, 64})) {
    faults.add(-1, -1, "impossible shape or value type");
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
  if (dense.shape.size() != 2 || !supported(dense.dtype) || pattern.kind != PatternKind::kKeepOf)
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

int64_t count_zeros(const Tensor& dense) {
  if (!supported(dense.dtype)) return 0;
  return with_bits(dense.dtype, [&](auto bits) {
    using U = decltype(bits);
    int64_t zeros = 0;
    for (int64_t i = 0; i < dense.elements(); ++i)
      zeros += is_zero(read_unaligned<U>(dense.bytes.data() + i * static_cast<int64_t>(sizeof(U))));
    return zeros;
  });
}

int64_t count_zeros(const CompactMatrix& matrix) {
  return with_bits(matrix.values_dtype, [&](auto bits) {
    using U = decltype(bits);
    int64_t kept = 0;
    for (size_t i = 0; i < matrix.values.size() / sizeof(U); ++i)
      kept += !is_zero(read_unaligned<U>(matrix.values.data() + i * sizeof(U)));
    return matrix.rows * matrix.columns - kept;
  });
}

Pattern detect_pattern(const Tensor& dense) {
  if (dense.shape.size() != 2 || !supported(dense.dtype)) return {};
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
