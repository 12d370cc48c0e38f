// 16 lanes step through their rows; no intrinsics.
#include "lacuna/format/row_product_portable.h"
#include "lacuna/kernels/linear_csr/cpu.h"

namespace lacuna::kernels::linear_csr {
namespace {

template <DType kType>
void kernel(const format::RowsView& rows, int64_t slice, const PreparedX& x, int64_t tokens,
            float* sums) {
  constexpr int64_t kWidth = kType == DType::kF32 ? 4 : 2;
  constexpr int64_t kStep = kLanes * (1 + kWidth);
  const uint8_t* step = rows.slices + rows.slice_steps[slice] * kStep;
  const uint8_t* const end = rows.slices + rows.slice_steps[slice + 1] * kStep;
  int64_t columns[kLanes] = {};
  for (int64_t i = 0; i < tokens * kLanes; ++i) sums[i] = 0;
  for (; step < end; step += kStep) {
    float w[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      columns[lane] += step[lane];
      w[lane] = format::portable::weight<kType>(
          reinterpret_cast<const std::byte*>(step + kLanes + lane * kWidth));
    }
    if (tokens == 1) {
      for (int64_t lane = 0; lane < kLanes; ++lane) sums[lane] += w[lane] * x.data[columns[lane]];
      continue;
    }
    for (int64_t t = 0; t < tokens; ++t) {
      const float* input = x.data + t / 2 * x.pair_stride + t % 2;
      float* sum = sums + t * kLanes;
      for (int64_t lane = 0; lane < kLanes; ++lane) sum[lane] += w[lane] * input[2 * columns[lane]];
    }
  }
}

}  // namespace

const SliceKernels kPortableGather = {kernel<DType::kF32>, kernel<DType::kBF16>,
                                      kernel<DType::kF16>};

}  // namespace lacuna::kernels::linear_csr
