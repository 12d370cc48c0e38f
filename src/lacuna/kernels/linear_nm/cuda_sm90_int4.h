// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in 4-bit codes with one scale for 64 columns of a
// row, for few tokens, x in bf16, on sparse tensor cores.
#pragma once

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::linear_nm {

// The kernel as the library shows it. W comes dense, its codes (-8 .. 7) as bf16 numbers, scales
// are bf16 [N, K/64].
// @limits cuda::coded_shape_refusal; x aligned to 16 bytes, y to 8 (N % 4 == 0) or 2. Inf and NaN
//         of x as with cuda_sm90_mma_sp
// @cost 0.40625 N K bytes of weights and 2 T N of y once; 2 T K of x for each group of rows
// @determinism the same bits at every run of one plan: each sum has a fixed order
// Sums of codes times x are float32, those of a group times its scale once, one rounding to bf16 at
// the end.
extern const GpuLinearKernel kInt4;

}  // namespace lacuna::kernels::linear_nm
