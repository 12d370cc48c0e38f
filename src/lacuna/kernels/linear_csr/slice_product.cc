#include "lacuna/kernels/linear_csr/slice_product.h"

#include <algorithm>
#include <limits>

#include "lacuna/format/task_split.h"
#include "lacuna/kernels/nonfinite.h"

namespace lacuna::kernels::linear_csr {
namespace {

using format::RowProduct;
using format::RowsView;

constexpr int64_t kAlignment = 64;

/// A line more than the columns need, for the reason that row_product.cc gives.
int64_t pair_stride(int64_t columns) { return 2 * columns + 16; }

const std::byte* token(const RowProduct& product, int64_t t) {
  return static_cast<const std::byte*>(product.x) +
         t * product.x_stride * static_cast<int64_t>(size_bytes(product.dtype));
}

/// A missing token of the last pair is 0.
void prepare(const RowProduct& product, int64_t columns, float* out) {
  if (product.tokens == 1) {
    for (int64_t k = 0; k < columns; ++k) out[k] = format::read_float(product.x, product.dtype, k);
    return;
  }
  const int64_t stride = pair_stride(columns);
  for (int64_t t = 0; t < product.tokens; t += 2) {
    const std::byte *even = token(product, t), *odd = token(product, t + 1);
    float* pair = out + t / 2 * stride;
    const bool both = t + 1 < product.tokens;
    for (int64_t k = 0; k < columns; ++k) {
      pair[2 * k] = format::read_float(even, product.dtype, k);
      pair[2 * k + 1] = both ? format::read_float(odd, product.dtype, k) : 0.0f;
    }
  }
}

void write(const RowProduct& product, int64_t t, int64_t row, float sum) {
  if (product.bias) sum += format::read_float(product.bias, product.dtype, row);
  format::write_float(product.y, product.dtype, t * product.y_stride + row, sum);
}

/// Tokens with an x that isn't finite, again and one by one: in a dropped column, or where a lane
/// repeats one, 0 times that is NaN.
void redo_nonfinite(const RowsView& rows, const RowProduct& product) {
  for (int64_t t = 0; t < product.tokens; ++t) {
    const std::vector<int64_t> columns = nonfinite_columns(product, t, rows.columns);
    if (columns.empty()) continue;
    for (int64_t i = 0; i < slice_count(rows.rows) * kLanes; ++i) {
      if (rows.slice_rows[i] < 0) continue;
      float sum = 0;
      auto next = columns.begin();
      for_each_entry(rows, i / kLanes, i % kLanes, [&](int64_t column, float w) {
        sum += w * format::read_float(token(product, t), product.dtype, column);
        while (next != columns.end() && *next < column) {
          sum = std::numeric_limits<float>::quiet_NaN();  // dropped
          ++next;
        }
        if (next != columns.end() && *next == column) ++next;
      });
      if (next != columns.end()) sum = std::numeric_limits<float>::quiet_NaN();
      write(product, t, rows.slice_rows[i], sum);
    }
  }
}

}  // namespace

size_t slice_product_workspace_bytes(int64_t tokens, int64_t columns) {
  const int64_t floats = tokens == 1 ? columns : (tokens + 1) / 2 * pair_stride(columns);
  return static_cast<size_t>(floats) * sizeof(float) + kAlignment;
}

void run_slice_product(SliceKernel kernel, const RowsView& rows, const RowProduct& product,
                       void* workspace, const Executor& executor) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  auto* x =
      reinterpret_cast<float*>(static_cast<std::byte*>(workspace) + (-address & (kAlignment - 1)));
  prepare(product, rows.columns, x);
  const int64_t tokens = product.tokens, stride = pair_stride(rows.columns);
  // As few passes over a slice as there can be, with equally many pairs of tokens.
  const int64_t all_pairs = (tokens + 1) / 2;
  const int64_t passes = format::ceil_div(2 * all_pairs, kTokensAtOnce);
  const int64_t at_once = format::ceil_div(all_pairs, passes);

  const int64_t slices = slice_count(rows.rows);
  const int64_t tasks =
      executor.threads <= 1 ? 1 : std::clamp<int64_t>(slices / 2, 1, 8 * executor.threads);
  const auto first_slice = [&](int64_t task) {
    return format::first_of_task(slices, task, tasks,
                                 [&](int64_t slice) { return rows.slice_steps[slice]; });
  };
  executor.parallel_for(tasks, [&](int64_t task) {
    const int64_t end = first_slice(task + 1);
    alignas(64) float sums[kTokensAtOnce * kLanes];
    for (int64_t slice = first_slice(task); slice < end; ++slice)
      for (int64_t pair = 0; pair < all_pairs; pair += at_once) {
        const int64_t pairs = std::min(at_once, all_pairs - pair);
        kernel(rows, slice, {x + pair * stride, stride}, tokens == 1 ? 1 : 2 * pairs, sums);
        for (int64_t t = 2 * pair; t < std::min(2 * (pair + pairs), tokens); ++t)
          for (int64_t lane = 0; lane < kLanes; ++lane)
            if (const int64_t row = rows.slice_rows[slice * kLanes + lane]; row >= 0)
              write(product, t, row, sums[(t - 2 * pair) * kLanes + lane]);
      }
  });
  redo_nonfinite(rows, product);
}

void run_reference_slice_product(const RowsView& rows, const RowProduct& product) {
  std::vector<double> weights(static_cast<size_t>(rows.columns));
  for (int64_t i = 0; i < slice_count(rows.rows) * kLanes; ++i) {
    if (rows.slice_rows[i] < 0) continue;
    std::fill(weights.begin(), weights.end(), 0.0);
    for_each_entry(rows, i / kLanes, i % kLanes,
                   [&](int64_t column, float w) { weights[static_cast<size_t>(column)] = w; });
    for (int64_t t = 0; t < product.tokens; ++t) {
      double sum = 0;
      for (int64_t k = 0; k < rows.columns; ++k)
        sum += weights[static_cast<size_t>(k)] *
               double{format::read_float(token(product, t), product.dtype, k)};
      if (product.bias)
        sum += double{format::read_float(product.bias, product.dtype, rows.slice_rows[i])};
      format::write_float(product.y, product.dtype, t * product.y_stride + rows.slice_rows[i],
                          static_cast<float>(sum));
    }
  }
}

}  // namespace lacuna::kernels::linear_csr
