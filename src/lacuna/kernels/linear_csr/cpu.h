// The CPU implementations of linear_csr, one file for each instruction set.
#pragma once

#include "lacuna/kernels/linear_csr/slices.h"

namespace lacuna::kernels::linear_csr {

/// Most tokens of one call of a kernel.
inline constexpr int64_t kTokensAtOnce = 8;
/// How far ahead of its loads the stream is fetched: gathers fill the window of instructions in
/// flight, so that the hardware sees the stream too late (twice the time from memory).
inline constexpr int64_t kAheadBytes = 2048;

/// Prepared x: float32 [K] for one token; for more [ceil(T/2)][stride][2], so that one load brings
/// a column's x of two tokens.
struct PreparedX {
  const float* data;
  int64_t pair_stride;  ///< floats
};

/// Sums of a slice's 16 rows with `tokens` tokens, one or an even number up to kTokensAtOnce:
/// sums[token * 16 + lane].
using SliceKernel = void (*)(const format::RowsView& rows, int64_t slice, const PreparedX& x,
                             int64_t tokens, float* sums);

/// One kernel for each type of the values.
struct SliceKernels {
  SliceKernel f32, bf16, f16;
  SliceKernel for_values(DType dtype) const {
    return dtype == DType::kF32 ? f32 : dtype == DType::kBF16 ? bf16 : f16;
  }
};

extern const SliceKernels kAvx512Gather;
extern const SliceKernels kAvx2Gather;
extern const SliceKernels kPortableGather;

}  // namespace lacuna::kernels::linear_csr
