// Elements as bit patterns: what format/ needs to know about a number is whether it is zero.
#pragma once

#include <cstdint>

#include "lacuna/core/bytes.h"
#include "lacuna/core/half.h"

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

/// An element of an f32, bf16 or f16 array that need not be aligned, as float32; and the reverse,
/// rounded to nearest.
inline float read_float(const void* data, DType dtype, int64_t index) {
  const auto* bytes = static_cast<const std::byte*>(data);
  if (dtype == DType::kF32) return read_unaligned<float>(bytes + index * 4);
  const auto bits = read_unaligned<uint16_t>(bytes + index * 2);
  return dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
}
inline void write_float(void* data, DType dtype, int64_t index, float value) {
  auto* bytes = static_cast<std::byte*>(data);
  if (dtype == DType::kF32) {
    std::memcpy(bytes + index * 4, &value, 4);
  } else {
    const uint16_t bits = dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
    std::memcpy(bytes + index * 2, &bits, 2);
  }
}

/// `count` elements in a row, by a loop without branches for each type.
inline void write_floats(void* data, DType dtype, int64_t first, const float* values,
                         int64_t count) {
  if (count == 0) return;  // pointers of empty vectors may be null
  auto* bytes = static_cast<std::byte*>(data) + first * static_cast<int64_t>(size_bytes(dtype));
  if (dtype == DType::kF32) {
    std::memcpy(bytes, values, static_cast<size_t>(count) * sizeof(float));
  } else if (dtype == DType::kBF16) {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = float_to_bf16(values[i]);
      std::memcpy(bytes + i * 2, &bits, 2);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const uint16_t bits = float_to_f16(values[i]);
      std::memcpy(bytes + i * 2, &bits, 2);
    }
  }
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
