#include "lacuna/format/compact.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "lacuna/core/half.h"
#include "lacuna/format/codes.h"
#include "lacuna/format/expand.h"

namespace lacuna::format {
namespace {

void expand_block_rows(const CompactMatrix& m, int64_t first, int64_t last, std::byte* out) {
  const auto width_bytes = static_cast<int64_t>(size_bytes(m.values_dtype));
  const int64_t row_bytes = m.columns * width_bytes;
  const int64_t height = m.pattern.block_rows, width = m.pattern.block_columns;
  std::memset(out, 0, static_cast<size_t>(row_bytes * (last - first)));
  for (int64_t row = first; row < last; ++row, out += row_bytes) {
    const int64_t* offsets = m.block_offsets.as<int64_t>() + row / height;
    const int64_t end = read_unaligned<int64_t>(offsets + 1);
    for (int64_t block = read_unaligned<int64_t>(offsets); block < end; ++block) {
      const int64_t left =
          int64_t{read_unaligned<int32_t>(m.block_columns.as<int32_t>() + block)} * width;
      const std::byte* from =
          m.values.data() + (block * height + row % height) * width * width_bytes;
      std::memcpy(out + left * width_bytes, from,
                  static_cast<size_t>(std::min(width, m.columns - left) * width_bytes));
    }
  }
}

/// The kept values of a row in the type of the weight, packed.
template <class U>
void dequantise(const CompactMatrix& m, const RowWalk& walk, const uint8_t* codes, U* out) {
  for_each_scale_group(
      m.quantization, walk, m.columns, [&](int64_t group, int64_t begin, int64_t end) {
        const CodeScale scale = scale_of(m, walk.row(), group);
        for (int64_t i = begin; i < end; ++i) {
          const float value = scale.value(codes[i]);
          if constexpr (sizeof(U) == 4) {
            out[i] = std::bit_cast<U>(value);
          } else {
            out[i] = m.values_dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
          }
        }
      });
}

void expand_coded_rows(const CompactMatrix& m, int64_t first, int64_t last, std::byte* out) {
  with_bits(m.values_dtype, [&](auto bits) {
    using U = decltype(bits);
    const ExpandRow expand_row =
        sizeof(U) == 2 ? row_expander().two_bytes : row_expander().four_bytes;
    std::vector<uint8_t> codes(static_cast<size_t>(m.columns));
    std::vector<U> values(static_cast<size_t>(m.columns));
    const auto* packed = reinterpret_cast<const std::byte*>(values.data());
    for (RowWalk walk(m, first); walk.row() < last; walk.next()) {
      read_codes(m, walk, codes.data());
      dequantise(m, walk, codes.data(), values.data());
      expand_row(walk.bitmap(), m.columns, packed, packed + values.size() * sizeof(U), out);
      out += m.columns * static_cast<int64_t>(sizeof(U));
    }
  });
}

void expand_bitmap_rows(const CompactMatrix& m, int64_t first, int64_t last, std::byte* out) {
  const auto width_bytes = static_cast<int64_t>(size_bytes(m.values_dtype));
  const int64_t stride = m.bitmap_stride_bytes();
  const auto* bitmap = m.bitmap.as<uint8_t>();
  const bool keep_of = m.pattern.kind == PatternKind::kKeepOf;
  const ExpandRow expand_row =
      width_bytes == 2 ? row_expander().two_bytes : row_expander().four_bytes;
  const std::byte* values_end = m.values.data() + m.values.size();
  int64_t next = keep_of ? 0 : kept_before_row(m, first);
  for (int64_t row = first; row < last; ++row, out += m.columns * width_bytes) {
    if (keep_of) next = row * m.values_per_row();
    next += expand_row(bitmap + row * stride, m.columns, m.values.data() + next * width_bytes,
                       values_end, out);
  }
}

}  // namespace

void expand_rows(const CompactMatrix& matrix, int64_t first, int64_t last, void* out) {
  if (first == last || matrix.columns == 0) return;
  const auto expand_some = !matrix.quantization.none()                  ? expand_coded_rows
                           : matrix.pattern.kind == PatternKind::kBlock ? expand_block_rows
                                                                        : expand_bitmap_rows;
  expand_some(matrix, first, last, static_cast<std::byte*>(out));
}

int64_t kept_before_row(const CompactMatrix& matrix, int64_t row) {
  const int64_t group = row / kRowGroup, stride = matrix.bitmap_stride_bytes();
  const auto* bitmap = matrix.bitmap.as<uint8_t>();
  if (matrix.quantization.code == Code::kInt4) return count_bits(bitmap, row * stride);
  return read_unaligned<int64_t>(matrix.offsets.as<int64_t>() + group) +
         count_bits(bitmap + group * kRowGroup * stride, (row - group * kRowGroup) * stride);
}

int64_t count_bits(const uint8_t* bytes, int64_t size) {
  // Counts in bytes, side by side, for as many words as a byte can count: without an instruction
  // for it this loop becomes vector code, calls don't.
  constexpr int64_t kWords = 31;
  constexpr uint64_t kPairs = 0x5555555555555555, kFours = 0x3333333333333333,
                     kBytes = 0x0f0f0f0f0f0f0f0f, kShorts = 0x00ff00ff00ff00ff;
  int64_t bits = 0, i = 0;
  while (i + 8 <= size) {
    const int64_t words = std::min(kWords, (size - i) / 8);
    uint64_t counts = 0;
    for (int64_t word = 0; word < words; ++word) {
      auto x = read_unaligned<uint64_t>(bytes + i + 8 * word);
      x -= x >> 1 & kPairs;
      x = (x & kFours) + (x >> 2 & kFours);
      counts += (x + (x >> 4)) & kBytes;
    }
    const uint64_t shorts = (counts & kShorts) + (counts >> 8 & kShorts);
    bits += static_cast<int64_t>(shorts * 0x0001000100010001 >> 48);
    i += 8 * words;
  }
  for (; i < size; ++i) bits += std::popcount(bytes[i]);
  return bits;
}

Tensor expand(const CompactMatrix& matrix, const Executor& executor) {
  const size_t row_bytes = static_cast<size_t>(matrix.columns) * size_bytes(matrix.values_dtype);
  std::vector<std::byte> dense(static_cast<size_t>(matrix.rows) * row_bytes);
  // A part each: to find the first value of a part may cost all rows before it.
  const int64_t parts = std::clamp<int64_t>(executor.threads, 1, std::max<int64_t>(matrix.rows, 1));
  executor.parallel_for(parts, [&](int64_t part) {
    const int64_t first = matrix.rows * part / parts, last = matrix.rows * (part + 1) / parts;
    expand_rows(matrix, first, last, dense.data() + static_cast<size_t>(first) * row_bytes);
  });
  return {matrix.values_dtype, {matrix.rows, matrix.columns}, Bytes::take(std::move(dense))};
}

int64_t count_zeros(const Tensor& dense) {
  if (!storable(dense.dtype)) return 0;
  return with_bits(dense.dtype, [&](auto bits) {
    using U = decltype(bits);
    int64_t zeros = 0;
    for (int64_t i = 0; i < dense.elements(); ++i)
      zeros += is_zero(read_unaligned<U>(dense.bytes.data() + i * static_cast<int64_t>(sizeof(U))));
    return zeros;
  });
}

namespace {

/// Without expanding: a few bytes of blocks may stand for any dense size.
int64_t count_coded_zeros(const CompactMatrix& matrix) {
  return with_bits(matrix.values_dtype, [&](auto bits) {
    using U = decltype(bits);
    int64_t zeros = matrix.rows * matrix.columns;
    std::vector<uint8_t> codes;
    std::vector<U> values;
    for (RowWalk walk(matrix, 0); walk.row() < matrix.rows; walk.next()) {
      codes.resize(static_cast<size_t>(walk.codes()));
      values.resize(codes.size());
      read_codes(matrix, walk, codes.data());
      dequantise(matrix, walk, codes.data(), values.data());
      zeros -= std::ranges::count_if(values, [](U value) { return !is_zero(value); });
    }
    return zeros;
  });
}

}  // namespace

int64_t count_zeros(const CompactMatrix& matrix) {
  if (!matrix.quantization.none()) return count_coded_zeros(matrix);
  return with_bits(matrix.values_dtype, [&](auto bits) {
    using U = decltype(bits);
    int64_t kept = 0;
    for (size_t i = 0; i < matrix.values.size() / sizeof(U); ++i)
      kept += !is_zero(read_unaligned<U>(matrix.values.data() + i * sizeof(U)));
    return matrix.rows * matrix.columns - kept;
  });
}

int64_t count_kept(const CompactMatrix& matrix) {
  if (matrix.pattern.kind == PatternKind::kDense) return matrix.rows * matrix.columns;
  if (matrix.pattern.kind != PatternKind::kBlock)
    return count_bits(matrix.bitmap.as<uint8_t>(), static_cast<int64_t>(matrix.bitmap.size()));
  const int64_t height = matrix.pattern.block_rows, width = matrix.pattern.block_columns;
  int64_t kept = 0;
  for (int64_t top = 0; top < matrix.rows; top += height) {  // edge blocks stick out
    const int64_t* offsets = matrix.block_offsets.as<int64_t>() + top / height;
    const int64_t end = read_unaligned<int64_t>(offsets + 1);
    for (int64_t block = read_unaligned<int64_t>(offsets); block < end; ++block) {
      const int64_t left =
          int64_t{read_unaligned<int32_t>(matrix.block_columns.as<int32_t>() + block)} * width;
      kept += std::min(height, matrix.rows - top) * std::min(width, matrix.columns - left);
    }
  }
  return kept;
}

}  // namespace lacuna::format
