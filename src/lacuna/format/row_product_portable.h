// Row products in plain C++: a chunk of 32 weights becomes 32 floats, then meets every token. The
// compiler turns the inner loops into whatever vectors the target has (row_product.h has the idea).
#pragma once

#include <bit>

#include "lacuna/core/half.h"
#include "lacuna/format/row_product.h"

namespace lacuna::format::portable {

template <DType dtype>
float weight(const std::byte* at) {
  if constexpr (dtype == DType::kF32) {
    return read_unaligned<float>(at);
  } else if constexpr (dtype == DType::kF8E4M3) {
    // In the upper bits of an f16's magnitude it is 2^8 times too small.
    const auto bits = static_cast<unsigned>(read_unaligned<uint8_t>(at));
    return 0x1p8f * f16_to_float(static_cast<uint16_t>((bits & 0x80) << 8 | (bits & 0x7f) << 7));
  } else {
    const auto bits = read_unaligned<uint16_t>(at);
    return dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float(bits);
  }
}

template <DType dtype>
inline constexpr int64_t kWidthOf = dtype == DType::kF32      ? 4
                                    : dtype == DType::kF8E4M3 ? 1
                                                              : 2;

/// Multiplies a chunk of a row by its scale, if it has one.
template <DType dtype>
struct Scales {
  const std::byte* of_row = nullptr;
  int shift = 0;
  Scales(const RowsView& rows, int64_t row) {
    if constexpr (dtype == DType::kF8E4M3) {
      of_row = rows.row_scales(row);
      shift = rows.scale_shift;
    }
  }
  void times(int64_t chunk, float* weights) const {
    if constexpr (dtype == DType::kF8E4M3) {
      const float scale = scale_at(of_row, chunk * kChunk, shift);
      for (int64_t i = 0; i < kChunk; ++i) weights[i] *= scale;
    }
  }
};

/// Takes the next `columns` <= 32 weights of a row into `out`; the others stay 0.
template <DType dtype>
struct DenseCursor {
  static constexpr int64_t kWidth = kWidthOf<dtype>;
  const std::byte* next;
  Scales<dtype> scales;
  DenseCursor(const RowsView& rows, int64_t row) : next(rows.row(row)), scales(rows, row) {}
  void take(int64_t chunk, int64_t columns, float* out) {
    for (int64_t i = 0; i < columns; ++i, next += kWidth) out[i] = weight<dtype>(next);
    scales.times(chunk, out);
  }
};

template <DType dtype>
struct BitmapCursor {
  static constexpr int64_t kWidth = kWidthOf<dtype>;
  const uint8_t* bits;
  const std::byte* next;
  Scales<dtype> scales;
  BitmapCursor(const RowsView& rows, int64_t row)
      : bits(rows.row_bits(row)), next(rows.row(row)), scales(rows, row) {}
  void take(int64_t chunk, int64_t columns, float* out) {
    for (int64_t byte = 0; byte * 8 < columns; ++byte)
      for (unsigned left = bits[chunk * (kChunk / 8) + byte]; left;
           left &= left - 1, next += kWidth)
        out[byte * 8 + std::countr_zero(left)] = weight<dtype>(next);
    scales.times(chunk, out);
  }
};

/// Sums run in 8 lanes, lane = column mod 8.
inline constexpr int64_t kLanes = 8;

template <class Cursor>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  for (int64_t row = first; row < last; ++row) {
    Cursor cursor(rows, row);
    float lanes[kMaxTokens][kLanes] = {};
    for (int64_t column = 0; column < rows.columns; column += kChunk) {
      float w[kChunk] = {};
      const int64_t left = rows.columns - column;
      cursor.take(column / kChunk, left < kChunk ? left : kChunk, w);
      for (int64_t t = 0; t < tokens; ++t) {
        const float* input = reinterpret_cast<const float*>(x + t * x_stride_bytes) + column;
        for (int64_t i = 0; i < kChunk; i += kLanes)
          for (int64_t lane = 0; lane < kLanes; ++lane)
            lanes[t][lane] += w[i + lane] * input[i + lane];
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const float* l = lanes[t];
      sums[t * kRowsAtOnce + row - first] =
          ((l[0] + l[4]) + (l[2] + l[6])) + ((l[1] + l[5]) + (l[3] + l[7]));
    }
  }
}

template <template <DType> class Cursor>
constexpr RowImplementations implementations() {
  return {{InputForm::kFloat, row_kernel<Cursor<DType::kF32>>},
          {InputForm::kFloat, row_kernel<Cursor<DType::kBF16>>},
          {InputForm::kFloat, row_kernel<Cursor<DType::kF16>>},
          {InputForm::kFloat, row_kernel<Cursor<DType::kF8E4M3>>}};
}

}  // namespace lacuna::format::portable
