// Random matrices that follow a pattern, with the values that break careless code.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/format/compact.h"

namespace lacuna::testing {

/// Bits of `value` in a dtype, in the low bytes.
inline uint32_t bits_of(float value, DType dtype) {
  if (dtype == DType::kF32) return std::bit_cast<uint32_t>(value);
  return dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
}

inline float value_of(uint32_t bits, DType dtype) {
  if (dtype == DType::kF32) return std::bit_cast<float>(bits);
  const auto half = static_cast<uint16_t>(bits);
  return dtype == DType::kBF16 ? bf16_to_float(half) : f16_to_float(half);
}

/// A dense matrix whose bits are set one by one.
class MatrixBits {
 public:
  MatrixBits(DType dtype, int64_t rows, int64_t columns)
      : dtype_(dtype),
        rows_(rows),
        columns_(columns),
        bits_(static_cast<size_t>(rows * columns), 0) {}
  uint32_t& at(int64_t row, int64_t column) { return bits_[row * columns_ + column]; }
  uint32_t at(int64_t row, int64_t column) const { return bits_[row * columns_ + column]; }
  int64_t rows() const { return rows_; }
  int64_t columns() const { return columns_; }
  DType dtype() const { return dtype_; }
  double value(int64_t row, int64_t column) const { return value_of(at(row, column), dtype_); }
  /// The tensor, `misalignment` bytes behind an aligned address.
  Tensor tensor(size_t misalignment = 0) const {
    const size_t width = size_bytes(dtype_);
    std::vector<std::byte> bytes(misalignment + bits_.size() * width);
    for (size_t i = 0; i < bits_.size(); ++i)
      std::memcpy(bytes.data() + misalignment + i * width, &bits_[i], width);
    const size_t size = bits_.size() * width;
    return {dtype_, {rows_, columns_}, Bytes::take(std::move(bytes)).slice(misalignment, size)};
  }

 private:
  DType dtype_;
  int64_t rows_, columns_;
  std::vector<uint32_t> bits_;
};

/// Keeps about `1 - sparsity` of the weights (keep:of: `keep` of each group) and draws each kept
/// value from `draw(row, column)`.
template <class Draw>
MatrixBits random_matrix(DType dtype, int64_t rows, int64_t columns, const format::Pattern& pattern,
                         double sparsity, uint64_t seed, Draw draw) {
  MatrixBits matrix(dtype, rows, columns);
  using format::PatternKind;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; ++column) {
      bool kept = true;
      if (pattern.kind == PatternKind::kUnstructured) {
        kept = random_uniform(seed, row, column) >= sparsity;
      } else if (pattern.kind == PatternKind::kBlock) {
        kept = random_uniform(seed, row / pattern.block_rows, column / pattern.block_columns) >=
               sparsity;
      } else if (pattern.kind == PatternKind::kKeepOf) {
        // Kept when fewer than `keep` others of the group drew a larger number.
        const int64_t first = column / pattern.of * pattern.of;
        const int64_t last = std::min<int64_t>(first + pattern.of, columns);
        int larger = 0;
        for (int64_t other = first; other < last; ++other)
          larger += random_uniform(seed, row, other) > random_uniform(seed, row, column);
        kept = larger < pattern.keep;
      }
      if (kept) matrix.at(row, column) = bits_of(draw(row, column), dtype);
    }
  return matrix;
}

inline MatrixBits random_matrix(DType dtype, int64_t rows, int64_t columns,
                                const format::Pattern& pattern, double sparsity, uint64_t seed) {
  return random_matrix(dtype, rows, columns, pattern, sparsity, seed,
                       [&](int64_t row, int64_t column) {
                         return static_cast<float>(random_normal(seed + 1, row, column));
                       });
}

}  // namespace lacuna::testing
