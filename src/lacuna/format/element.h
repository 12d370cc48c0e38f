// Elements as bit patterns: what format/ needs to know about a number is whether it is zero.
#pragma once

#include <cstdint>

#include "lacuna/core/bytes.h"

namespace lacuna::format {

/// Calls f with a value of the unsigned integer type that carries the dtype's bits.
template <class F>
auto with_bits(DType dtype, F&& f) {
  return size_bytes(dtype) == 4 ? f(uint32_t{}) : f(uint16_t{});
}

template <class U>
bool is_zero(U bits) {
  return static_cast<U>(bits << 1) == 0;  // both zeros
}

/// The value types of format version 1.
inline bool storable(DType dtype) {
  return dtype == DType::kF32 || dtype == DType::kBF16 || dtype == DType::kF16;
}

/// Most rows or columns of a matrix: block columns are 32-bit, products of sizes stay in 64 bits.
inline constexpr int64_t kLargestExtent = (int64_t{1} << 31) - 1;

/// A dense matrix that need not be aligned.
template <class U>
struct Dense {
  const std::byte* data;
  int64_t rows, columns;
  U at(int64_t row, int64_t column) const {
    return read_unaligned<U>(data + (row * columns + column) * static_cast<int64_t>(sizeof(U)));
  }
};

/// Ones in `size` bytes.
int64_t count_bits(const uint8_t* bytes, int64_t size);

inline constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace lacuna::format
