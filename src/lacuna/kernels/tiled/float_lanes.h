// A tiled product in float32, for the instruction set that a file is compiled for: what float32 and
// float16 weights take, and all weights of machines without AMX. The file says how its registers
// are best filled (Shape) and expands rows with its own instructions.
//
//   packed x   |column 0 of tokens 0..w-1|column 1 of them| ...   then tokens w..2w-1, ...
//              w: the tokens of a step, kVectors registers; the last group may have one
//   weights    a panel of rows x 256 columns, float32, in the second-level cache; a step reads
//              kRows of them, each number into every lane of a register
//   sums       kRows x w in registers; between two blocks of K in the second-level cache
//
// A lane is a token, so nothing is added across lanes, and each sum runs over K from front to back.
#pragma once

#include <bit>
#include <cstring>

#include "lacuna/core/half.h"
#include "lacuna/format/expand.h"
#include "lacuna/kernels/tiled/float_layout.h"
#include "lacuna/kernels/tiled/shared_work.h"

namespace lacuna::kernels::tiled {
namespace {

using format::RowProduct;
using format::RowsView;

// --- Elements ------------------------------------------------------------------------------------

/// Exact for every number, without branches, so that a loop over it becomes vector code.
inline float from_f16(uint16_t bits) {
  const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity or NaN
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special |
                              (uint32_t{bits & 0x8000u} << 16));
}

/// `count` elements that need not be aligned, as floats.
inline void to_floats(DType dtype, const std::byte* from, int64_t count, float* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, from, static_cast<size_t>(count) * 4);
  } else if (dtype == DType::kBF16) {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, from + i * 2, 2);
      out[i] = std::bit_cast<float>(uint32_t{bits} << 16);
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      uint16_t bits;
      std::memcpy(&bits, from + i * 2, 2);
      out[i] = from_f16(bits);
    }
  }
}

inline void from_floats(DType dtype, const float* from, int64_t count, std::byte* out) {
  if (dtype == DType::kF32) {
    std::memcpy(out, from, static_cast<size_t>(count) * 4);
    return;
  }
  for (int64_t i = 0; i < count; ++i) {
    const uint16_t bits = dtype == DType::kBF16 ? float_to_bf16(from[i]) : float_to_f16(from[i]);
    std::memcpy(out + i * 2, &bits, 2);
  }
}

// --- A step --------------------------------------------------------------------------------------

/// sums [kRows, kVectors * kLanes] += weights · x over `columns`.
/// @param weights  rows kFloatStride apart
/// @param x  [columns, kVectors * kLanes]
template <int kLanes, int kRows, int kVectors>
void multiply(const float* weights, const float* x, int64_t columns, bool first, float* sums) {
  typedef float Vector __attribute__((vector_size(kLanes * sizeof(float))));
  constexpr int kTokens = kVectors * kLanes;
  Vector sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sum[r][v] = Vector{};
      if (!first) std::memcpy(&sum[r][v], sums + r * kTokens + v * kLanes, sizeof(Vector));
    }
  for (int64_t k = 0; k < columns; ++k, x += kTokens) {
    Vector input[kVectors];  // one by one: all at once they would go through memory
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) std::memcpy(&input[v], x + v * kLanes, sizeof(Vector));
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      // Minus 0 is nothing to compilers; plus 0 would be an addition, which turns -0 to 0.
      const Vector w = weights[r * kFloatStride + k] - Vector{};
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[r][v] += w * input[v];
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v)
      std::memcpy(sums + r * kTokens + v * kLanes, &sum[r][v], sizeof(Vector));
}

// --- The whole -----------------------------------------------------------------------------------

/// Panels by a shared counter, so that a thread the system holds up doesn't hold up the others.
/// @tparam Shape  kLanes floats a register; kRows, kVectors of a step; two_bytes(), four_bytes():
/// the format::ExpandRow of such elements
template <class Shape>
class FloatProduct {
 public:
  FloatProduct(const RowsView& rows, const RowProduct& product, std::byte* workspace, int slots)
      : rows_(rows),
        product_(product),
        layout_(product.tokens, rows.columns, kStepTokens),
        packing_(layout_.groups),
        panel_rows_(rows_of_panels(slots)),
        panels_(ceil_div(rows.rows, panel_rows_)),
        x_(reinterpret_cast<float*>(workspace)) {}

  /// What one thread does with its buffers.
  void work(int64_t slot) {
    packing_.run([&](int64_t group) { pack(group); });
    float* const weights = x_ + layout_.x_floats + slot * FloatLayout::kSlotFloats;
    float* const sums = weights + kFloatRows * kFloatStride;
    for (int64_t panel; (panel = next_panel_.fetch_add(1, std::memory_order_relaxed)) < panels_;)
      for (int64_t group = 0; group < layout_.groups; group += kGroups)
        multiply_panel(panel * panel_rows_, group, weights, sums);
  }

 private:
  static constexpr int64_t kStepTokens = Shape::kLanes * Shape::kVectors;
  static constexpr int64_t kGroups = kFloatTokens / kStepTokens;  // of a block of tokens
  static_assert(kFloatTokens % kStepTokens == 0 && kStepTokens <= kMostStepTokens);
  static_assert(kFloatRows % Shape::kRows == 0);

  /// As many as a panel may have, or fewer where the threads would lack panels.
  int64_t rows_of_panels(int slots) const {
    const int64_t share = ceil_div(rows_.rows, int64_t{4} * slots * Shape::kRows) * Shape::kRows;
    return std::clamp<int64_t>(share, Shape::kRows, kFloatRows);
  }
  /// Tokens that a group has lanes for.
  int64_t width_of(int64_t group) const {
    return product_.tokens - group * kStepTokens <= Shape::kLanes ? Shape::kLanes : kStepTokens;
  }
  const float* group_of(int64_t group) const { return x_ + group * kStepTokens * rows_.columns; }

  void pack(int64_t group) {
    constexpr int64_t kPiece = 64;
    float piece[kStepTokens][kPiece] = {};
    const int64_t width = width_of(group), first = group * kStepTokens;
    const int64_t tokens = std::min(width, product_.tokens - first);
    const auto bytes = static_cast<int64_t>(size_bytes(product_.dtype));
    const auto* x = static_cast<const std::byte*>(product_.x) + first * product_.x_stride * bytes;
    float* out = x_ + group * kStepTokens * rows_.columns;
    for (int64_t column = 0; column < rows_.columns; column += kPiece) {
      const int64_t count = std::min(kPiece, rows_.columns - column);
      for (int64_t t = 0; t < tokens; ++t)
        to_floats(product_.dtype, x + (t * product_.x_stride + column) * bytes, count, piece[t]);
      for (int64_t k = 0; k < count; ++k, out += width)
        for (int64_t t = 0; t < width; ++t) out[t] = piece[t][k];
    }
  }

  /// The next `columns` of a row, which begin with a whole byte of its bitmap.
  void expand(int64_t row, int64_t column, int64_t columns, const std::byte*& next, float* out) {
    const int64_t width = rows_.width();
    if (rows_.bitmap == nullptr) {
      to_floats(rows_.dtype, next, columns, out);
      next += columns * width;
      return;
    }
    const uint8_t* bits = rows_.row_bits(row) + column / 8;
    const std::byte* far = next + (kFloatColumns + 1) * width + 64;  // RowsView has room behind it
    if (width == 4) {
      next += Shape::four_bytes()(bits, columns, next, far, reinterpret_cast<std::byte*>(out)) * 4;
      return;
    }
    alignas(64) std::byte halves[kFloatColumns * 2];
    next += Shape::two_bytes()(bits, columns, next, far, halves) * 2;
    to_floats(rows_.dtype, halves, columns, out);
  }

  /// A panel times the tokens of a block of groups.
  void multiply_panel(int64_t first_row, int64_t first_group, float* weights, float* sums) {
    const int64_t rows = std::min(panel_rows_, rows_.rows - first_row);
    const int64_t steps = ceil_div(rows, Shape::kRows);
    const int64_t last_group = std::min(layout_.groups, first_group + kGroups);
    const std::byte* next[kFloatRows];
    for (int64_t r = 0; r < rows; ++r) next[r] = rows_.row(first_row + r);
    // Rows past the last are multiplied too; whatever comes of it, it shall not be slow.
    for (int64_t r = rows; r < steps * Shape::kRows; ++r)
      std::memset(weights + r * kFloatStride, 0, kFloatStride * sizeof(float));
    for (int64_t column = 0; column < rows_.columns; column += kFloatColumns) {
      const int64_t columns = std::min(kFloatColumns, rows_.columns - column);
      for (int64_t r = 0; r < rows; ++r)
        expand(first_row + r, column, columns, next[r], weights + r * kFloatStride);
      for (int64_t group = first_group; group < last_group; ++group) {
        const int64_t width = width_of(group);
        const float* x = group_of(group) + column * width;
        float* to = sums + (group - first_group) * kFloatRows * kStepTokens;
        for (int64_t step = 0; step < steps; ++step, to += Shape::kRows * width) {
          const float* w = weights + step * Shape::kRows * kFloatStride;
          if (width == kStepTokens)
            multiply<Shape::kLanes, Shape::kRows, Shape::kVectors>(w, x, columns, column == 0, to);
          else
            multiply<Shape::kLanes, Shape::kRows, 1>(w, x, columns, column == 0, to);
        }
      }
    }
    if (rows_.columns == 0) std::fill_n(sums, kFloatRows * kFloatTokens, 0.0f);
    for (int64_t group = first_group; group < last_group; ++group)
      write(first_row, rows, group, sums + (group - first_group) * kFloatRows * kStepTokens);
  }

  /// Sums [rows, tokens of a group] to y, bias added.
  void write(int64_t first_row, int64_t rows, int64_t group, const float* sums) {
    const int64_t width = width_of(group), first = group * kStepTokens;
    const int64_t tokens = std::min(width, product_.tokens - first);
    const auto bytes = static_cast<int64_t>(size_bytes(product_.dtype));
    float bias[kFloatRows] = {}, row_of_y[kFloatRows];
    if (product_.bias)
      to_floats(product_.dtype, static_cast<const std::byte*>(product_.bias) + first_row * bytes,
                rows, bias);
    auto* y = static_cast<std::byte*>(product_.y) + (first * product_.y_stride + first_row) * bytes;
    for (int64_t t = 0; t < tokens; ++t, y += product_.y_stride * bytes) {
      for (int64_t r = 0; r < rows; ++r) row_of_y[r] = sums[r * width + t] + bias[r];
      from_floats(product_.dtype, row_of_y, rows, y);
    }
  }

  const RowsView& rows_;
  const RowProduct& product_;
  const FloatLayout layout_;
  Packing packing_;
  const int64_t panel_rows_, panels_;
  float* x_;
  std::atomic<int64_t> next_panel_{0};
};

template <class Shape>
void run_float(const RowsView& rows, const RowProduct& product, void* workspace,
               const Executor& executor) {
  run_on_slots(workspace, executor, [&](std::byte* aligned, int slots) {
    FloatProduct<Shape> whole(rows, product, aligned, slots);
    executor.parallel_for(slots, [&](int64_t slot) { whole.work(slot); });
  });
}

}  // namespace
}  // namespace lacuna::kernels::tiled
