// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in 8-bit codes with one scale a row, on sparse
// tensor cores: for few tokens x in bf16, for many (plan_rounded) in codes.
#pragma once

#include "lacuna/kernels/gpu_abi.h"

namespace lacuna::kernels::linear_nm {

// These kernels as the library shows them. W comes dense, its codes as bf16 numbers.
// @limits cuda::coded_shape_refusal; x aligned to 16 bytes, y to 8 (N % 4 == 0) or 2; no e4m3 that
//         is not finite. Inf and NaN of x as with cuda_sm90_mma_sp. Rounded: cuda_sm90_rounded.h
// @cost 0.625 N K + 4 N bytes of weights and 2 T N of y once; 2 T K of x for each group of rows
// @determinism the same bits at every run of one plan: each sum has a fixed order
// Sums of codes times x are float32, each times its scale once, one rounding to bf16 at the end.
extern const GpuLinearKernel kFp8;
extern const GpuLinearKernel kInt8;

}  // namespace lacuna::kernels::linear_nm
