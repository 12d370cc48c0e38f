// The rows of a block in pieces of 8 columns; no intrinsics.
#include <algorithm>

#include "lacuna/format/row_product_portable.h"
#include "lacuna/kernels/linear_bsr/cpu.h"

namespace lacuna::kernels::linear_bsr {
namespace {

using format::RowsView;
using format::portable::kLanes;

template <DType kType>
void row_kernel(const RowsView& rows, int64_t first, int64_t last, const std::byte* x,
                int64_t x_stride_bytes, int64_t tokens, float* sums) {
  constexpr int64_t kWidth = kType == DType::kF32 ? 4 : 2;
  const int64_t height = rows.pattern.block_rows, width = rows.pattern.block_columns;
  for (int64_t row = first; row < last; ++row) {
    float lanes[format::kMaxTokens][kLanes] = {};
    const int64_t end = rows.blocks_before(row / height + 1);
    for (int64_t block = rows.blocks_before(row / height); block < end; ++block) {
      const int64_t left = rows.block_column(block) * width;
      const int64_t columns = std::min(width, rows.columns - left);
      const std::byte* values = rows.values + (block * height + row % height) * width * kWidth;
      for (int64_t column = 0; column < columns; column += kLanes) {
        const int64_t count = std::min(kLanes, columns - column);
        float w[kLanes] = {};
        for (int64_t i = 0; i < count; ++i)
          w[i] = format::portable::weight<kType>(values + (column + i) * kWidth);
        for (int64_t t = 0; t < tokens; ++t) {
          const float* input =
              reinterpret_cast<const float*>(x + t * x_stride_bytes) + left + column;
          for (int64_t i = 0; i < count; ++i) lanes[t][i] += w[i] * input[i];
        }
      }
    }
    for (int64_t t = 0; t < tokens; ++t) {
      float sum = 0;
      for (const float lane : lanes[t]) sum += lane;
      sums[t * format::kRowsAtOnce + row - first] = sum;
    }
  }
}

}  // namespace

const format::RowImplementations kPortablePiece = {
    {format::InputForm::kFloat, row_kernel<DType::kF32>},
    {format::InputForm::kFloat, row_kernel<DType::kBF16>},
    {format::InputForm::kFloat, row_kernel<DType::kF16>}};

}  // namespace lacuna::kernels::linear_bsr
