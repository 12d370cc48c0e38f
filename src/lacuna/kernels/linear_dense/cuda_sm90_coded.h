// y[T,N] = x[T,K] · W[N,K]^T with W dense in 8-bit codes with one scale a row, for few tokens, x in
// bf16, on tensor cores: what sparse codes are measured against.
#pragma once

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::linear_dense {

// These kernels as the library shows them. W comes dense, its codes as bf16 numbers.
// @limits cuda::coded_shape_refusal; x aligned to 16 bytes, y to 8 (N % 4 == 0) or 2; no e4m3 that
// is not
//         finite
// @cost N K + 4 N bytes of weights and 2 T N of y once; 2 T K of x for each group of rows, from L2
// @determinism the same bits at every run of one plan: each sum has a fixed order
// Sums of codes times x are float32, each times its scale once, one rounding to bf16 at the end.
extern const GpuLinearKernel kFp8;
extern const GpuLinearKernel kInt8;

}  // namespace lacuna::kernels::linear_dense
