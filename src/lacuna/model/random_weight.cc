#include "lacuna/model/random_weight.h"

#include <algorithm>
#include <cmath>
#include <numbers>
#include <vector>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {
namespace {

using format::Pattern;
using format::PatternKind;

constexpr double kDeviation = 0.02;
constexpr int64_t kRowsAtOnce = 64;
constexpr uint64_t kMaskStreams = uint64_t{1} << 32;  // above every tensor's number

/// x with P(standard normal < x) = p, by bisection: the table below is made once.
double normal_quantile(double p) {
  double low = -9, high = 9;
  for (int i = 0; i < 60; ++i) {
    const double middle = (low + high) / 2;
    (0.5 * std::erfc(-middle / std::numbers::sqrt2) < p ? low : high) = middle;
  }
  return (low + high) / 2;
}

template <class T>
T encode(double value, DType dtype) {
  const auto narrow = static_cast<float>(value);
  if constexpr (sizeof(T) == 4)
    return narrow;
  else
    return dtype == DType::kBF16 ? float_to_bf16(narrow) : float_to_f16(narrow);
}

/// The centres of 2^16 equally likely slices of the normal distribution: 16 random bits give a
/// weight for the price of a look-up, four weights a hash.
template <class T>
class NormalTable {
 public:
  explicit NormalTable(DType dtype) : values_(size_t{1} << 16) {
    const size_t half = values_.size() / 2;
    for (size_t i = 0; i < half; ++i) {
      const double value = kDeviation * normal_quantile((static_cast<double>(i) + 0.5) / 65536);
      values_[i] = encode<T>(value, dtype);
      values_[values_.size() - 1 - i] = encode<T>(-value, dtype);
    }
  }
  T at(uint64_t bits) const { return values_[bits & 0xffff]; }

 private:
  std::vector<T> values_;
};

/// A stream of 32-bit random numbers for one row of one mask.
class RowRandom {
 public:
  RowRandom(uint64_t seed, uint64_t stream, int64_t row)
      : seed_(seed), stream_(stream), index_(static_cast<uint64_t>(row) << 32) {}
  /// Uniform in 0 .. n-1.
  int64_t below(int64_t n) {
    if (!half_used_) bits_ = random_bits(seed_, stream_, index_++);
    half_used_ = !half_used_;
    const uint64_t lane = half_used_ ? bits_ & 0xffffffffu : bits_ >> 32;
    return static_cast<int64_t>((lane * static_cast<uint64_t>(n)) >> 32);
  }

 private:
  uint64_t seed_, stream_, index_, bits_ = 0;
  bool half_used_ = false;
};

/// Calls drop(i) for exactly total - keep of 0 .. total-1, every choice equally likely (Knuth's
/// algorithm S).
template <class Drop>
void drop_randomly(int64_t keep, int64_t total, RowRandom& random, Drop&& drop) {
  for (int64_t i = 0; i < total; ++i) {
    if (random.below(total - i) < keep)
      --keep;
    else
      drop(i);
  }
}

int64_t kept_of(int64_t total, double sparsity) {
  return total - std::llround(sparsity * static_cast<double>(total));
}

/// Zeros rows [first, last) of a matrix by the pattern; `first` is a multiple of a block's rows.
template <class T>
void mask_rows(T* rows, int64_t first, int64_t last, int64_t columns, const Pattern& pattern,
               double sparsity, uint64_t seed, uint64_t stream) {
  if (pattern.kind == PatternKind::kBlock) {
    const int64_t across = (columns + pattern.block_columns - 1) / pattern.block_columns;
    for (int64_t top = first; top < last; top += pattern.block_rows) {
      RowRandom random(seed, stream, top / pattern.block_rows);
      const int64_t bottom = std::min<int64_t>(top + pattern.block_rows, last);
      drop_randomly(kept_of(across, sparsity), across, random, [&](int64_t block) {
        const int64_t left = block * pattern.block_columns;
        const int64_t right = std::min<int64_t>(left + pattern.block_columns, columns);
        for (int64_t r = top; r < bottom; ++r)
          std::fill(rows + (r - first) * columns + left, rows + (r - first) * columns + right, T{});
      });
    }
    return;
  }
  for (int64_t r = first; r < last; ++r) {
    T* row = rows + (r - first) * columns;
    RowRandom random(seed, stream, r);
    if (pattern.kind == PatternKind::kUnstructured) {
      drop_randomly(kept_of(columns, sparsity), columns, random, [&](int64_t i) { row[i] = T{}; });
      continue;
    }
    for (int64_t group = 0; group < columns; group += pattern.of) {
      const int64_t size = std::min<int64_t>(pattern.of, columns - group);
      drop_randomly(std::min<int64_t>(pattern.keep, size), size, random,
                    [&](int64_t i) { row[group + i] = T{}; });
    }
  }
}

template <class T>
Tensor from_table(const NormalTable<T>& table, int64_t rows, int64_t columns, DType dtype,
                  const Pattern& pattern, double sparsity, uint64_t seed, uint64_t stream) {
  std::vector<T> values(static_cast<size_t>(rows * columns));
  const int64_t hashes = (columns + 3) / 4;  // a row
  const int64_t step =
      pattern.kind == PatternKind::kBlock
          ? (kRowsAtOnce + pattern.block_rows - 1) / pattern.block_rows * pattern.block_rows
          : kRowsAtOnce;
  torch_executor().parallel_for((rows + step - 1) / step, [&](int64_t tile) {
    const int64_t first = tile * step, last = std::min(first + step, rows);
    T* tile_rows = values.data() + first * columns;
    for (int64_t r = first; r < last; ++r) {
      T* row = tile_rows + (r - first) * columns;
      for (int64_t h = 0; h < hashes; ++h) {
        uint64_t bits = random_bits(seed, stream, static_cast<uint64_t>(r * hashes + h));
        const int64_t end = std::min(4 * h + 4, columns);
        for (int64_t c = 4 * h; c < end; ++c, bits >>= 16) row[c] = table.at(bits);
      }
    }
    if (pattern.kind != PatternKind::kDense)
      mask_rows(tile_rows, first, last, columns, pattern, sparsity, seed, stream + kMaskStreams);
  });
  return {dtype, {rows, columns}, Bytes::take(std::move(values))};
}

}  // namespace

Tensor random_weight(int64_t rows, int64_t columns, DType dtype, const Pattern& pattern,
                     double sparsity, uint64_t seed, uint64_t stream) {
  const auto make = [&](const auto& table) {
    return from_table(table, rows, columns, dtype, pattern, sparsity, seed, stream);
  };
  if (dtype == DType::kF32) {
    static const NormalTable<float> f32(DType::kF32);
    return make(f32);
  }
  if (dtype == DType::kBF16) {
    static const NormalTable<uint16_t> bf16(DType::kBF16);
    return make(bf16);
  }
  static const NormalTable<uint16_t> f16(DType::kF16);
  return make(f16);
}

}  // namespace lacuna::model
