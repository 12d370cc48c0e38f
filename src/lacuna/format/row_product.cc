#include "lacuna/format/row_product.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "lacuna/core/half.h"
#include "lacuna/format/element.h"
#include "lacuna/format/expand.h"
#include "lacuna/format/task_split.h"

namespace lacuna::format {
namespace {

constexpr int64_t kAlignment = 64;

/// f16 without branches, so that loops over it become vector code; exact for every number.
inline float f16_to_float_branchless(uint16_t bits) {
  const uint32_t magnitude = uint32_t{bits & 0x7fffu} << 13;
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;  // infinity or NaN
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special |
                              (uint32_t{bits & 0x8000u} << 16));
}

template <DType dtype>
float element(const std::byte* data, int64_t index) {
  if constexpr (dtype == DType::kF32) {
    return read_unaligned<float>(data + index * 4);
  } else {
    const auto bits = read_unaligned<uint16_t>(data + index * 2);
    return dtype == DType::kBF16 ? bf16_to_float(bits) : f16_to_float_branchless(bits);
  }
}

template <class F>
auto with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<DType::kF32>();
    case DType::kBF16:
      return f.template operator()<DType::kBF16>();
    default:
      return f.template operator()<DType::kF16>();
  }
}

int64_t padded_columns(int64_t columns) { return ceil_div(columns, kChunk) * kChunk; }

/// A line more than the columns need: where they are a multiple of 4 KiB, the same chunk of 16
/// tokens would fall into one set of a 12-way cache (4 times slower at 16 tokens, K = 4096).
int64_t prepared_stride_bytes(InputForm form, int64_t columns) {
  return padded_columns(columns) * (form == InputForm::kBF16 ? 2 : 4) + kAlignment;
}

template <DType dtype>
void prepare_floats(const std::byte* x, int64_t columns, bool even_odd, float* out) {
  int64_t column = 0;
  if (!even_odd) {
    for (; column < columns; ++column) out[column] = element<dtype>(x, column);
    return;
  }
  for (; column + kChunk <= columns; column += kChunk)
    for (int64_t i = 0; i < kChunk / 2; ++i) {
      out[column + i] = element<dtype>(x, column + 2 * i);
      out[column + kChunk / 2 + i] = element<dtype>(x, column + 2 * i + 1);
    }
  for (int64_t i = 0; column + i < columns; ++i)
    out[column + (i % 2) * (kChunk / 2) + i / 2] = element<dtype>(x, column + i);
}

void prepare_token(InputForm form, DType dtype, const std::byte* x, int64_t columns,
                   std::byte* out) {
  const int64_t stride = prepared_stride_bytes(form, columns);
  const int64_t whole = columns / kChunk * kChunk;  // the last chunk may be padded
  const int64_t width = form == InputForm::kBF16 ? 2 : 4;
  std::memset(out + whole * width, 0, static_cast<size_t>(stride - whole * width));
  if (form == InputForm::kBF16) {
    std::memcpy(out, x, static_cast<size_t>(columns) * 2);
    return;
  }
  with_dtype(dtype, [&]<DType kType>() {
    prepare_floats<kType>(x, columns, form == InputForm::kFloatEvenOdd,
                          reinterpret_cast<float*>(out));
  });
}

/// First row of a task. Multiples of 4, the most rows of a tile.
int64_t first_row_of_task(const RowsView& rows, int64_t task, int64_t tasks) {
  if (task == tasks) return rows.rows;
  return first_of_task(rows.rows, task, tasks,
                       [&](int64_t row) { return rows.bytes_before(row); }) /
         4 * 4;
}

/// The weights of one row, dropped ones as 0.
void read_row(const RowsView& rows, int64_t row, std::vector<float>& out) {
  std::fill(out.begin(), out.end(), 0.0f);
  const Pattern& pattern = rows.pattern;
  if (rows.block_offsets) {
    const int64_t end = rows.blocks_before(row / pattern.block_rows + 1);
    for (int64_t block = rows.blocks_before(row / pattern.block_rows); block < end; ++block) {
      const int64_t left = rows.block_column(block) * pattern.block_columns;
      const int64_t first =
          (block * pattern.block_rows + row % pattern.block_rows) * pattern.block_columns;
      for (int64_t i = 0; i < std::min<int64_t>(pattern.block_columns, rows.columns - left); ++i)
        out[static_cast<size_t>(left + i)] = read_float(rows.values, rows.dtype, first + i);
    }
    return;
  }
  int64_t next = rows.value_index(row);
  const auto weight = [&](int64_t column) {
    if (rows.dtype != DType::kF8E4M3) return read_float(rows.values, rows.dtype, next++);
    return f8e4m3_to_float(static_cast<uint8_t>(rows.values[next++])) *
           scale_at(rows.row_scales(row), column, rows.scale_shift);
  };
  for (int64_t column = 0; column < rows.columns; ++column)
    if (rows.bitmap == nullptr || (rows.row_bits(row)[column / 8] >> (column % 8) & 1))
      out[static_cast<size_t>(column)] = weight(column);
}

}  // namespace

size_t row_product_workspace_bytes(int64_t tokens, int64_t columns) {
  return static_cast<size_t>(
      padded_tokens(tokens) * prepared_stride_bytes(InputForm::kFloat, columns) + kAlignment);
}

void run_row_product(const RowImplementation& implementation, const RowsView& rows,
                     const RowProduct& product, void* workspace, const Executor& executor) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  std::byte* x = static_cast<std::byte*>(workspace) + (-address & (kAlignment - 1));
  const int64_t stride = prepared_stride_bytes(implementation.form, rows.columns);
  const int64_t tokens = padded_tokens(product.tokens);
  const auto width = static_cast<int64_t>(size_bytes(product.dtype));
  for (int64_t t = 0; t < product.tokens; ++t)
    prepare_token(implementation.form, product.dtype,
                  static_cast<const std::byte*>(product.x) + t * product.x_stride * width,
                  rows.columns, x + t * stride);
  std::memset(x + product.tokens * stride, 0,
              static_cast<size_t>((tokens - product.tokens) * stride));

  // Several tasks a thread, so that a thread the system holds up doesn't hold up the others.
  const int64_t tasks =
      executor.threads <= 1 ? 1 : std::clamp<int64_t>(rows.rows / 32, 1, 8 * executor.threads);
  executor.parallel_for(tasks, [&](int64_t task) {
    const int64_t end = first_row_of_task(rows, task + 1, tasks);
    alignas(64) float sums[kMaxTokens * kRowsAtOnce];
    for (int64_t first = first_row_of_task(rows, task, tasks); first < end; first += kRowsAtOnce) {
      const int64_t last = std::min(first + kRowsAtOnce, end);
      implementation.kernel(rows, first, last, x, stride, tokens, sums);
      for (int64_t t = 0; t < product.tokens; ++t)
        for (int64_t row = first; row < last; ++row) {
          float sum = sums[t * kRowsAtOnce + row - first];
          if (product.bias) sum += read_float(product.bias, product.dtype, row);
          write_float(product.y, product.dtype, t * product.y_stride + row, sum);
        }
    }
  });
}

void reference_row_product(const RowsView& rows, const RowProduct& product, double* sums,
                           double* weight_sums) {
  const auto width = static_cast<int64_t>(size_bytes(product.dtype));
  std::vector<float> weights(static_cast<size_t>(rows.columns));
  for (int64_t row = 0; row < rows.rows; ++row) {
    read_row(rows, row, weights);
    for (int64_t t = 0; t < product.tokens; ++t) {
      const auto* x = static_cast<const std::byte*>(product.x) + t * product.x_stride * width;
      double sum = 0, weight_sum = 0;
      for (int64_t column = 0; column < rows.columns; ++column) {
        const double term = double{weights[static_cast<size_t>(column)]} *
                            double{read_float(x, product.dtype, column)};
        sum += term;
        weight_sum += std::fabs(term);
      }
      if (product.bias) {
        const double bias = read_float(product.bias, product.dtype, row);
        sum += bias;
        weight_sum += std::fabs(bias);
      }
      sums[t * rows.rows + row] = sum;
      if (weight_sums) weight_sums[t * rows.rows + row] = weight_sum;
    }
  }
}

void run_reference_row_product(const RowsView& rows, const RowProduct& product) {
  std::vector<double> sums(static_cast<size_t>(product.tokens * rows.rows));
  reference_row_product(rows, product, sums.data());
  for (int64_t t = 0; t < product.tokens; ++t)
    for (int64_t row = 0; row < rows.rows; ++row)
      write_float(product.y, product.dtype, t * product.y_stride + row,
                  static_cast<float>(sums[t * rows.rows + row]));
}

}  // namespace lacuna::format
