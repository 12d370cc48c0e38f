// y[T,N] = x[T,K] · W[N,K]^T with W by its non-zeros (CSR), multiplied by NVIDIA's cuSPARSE: the
// floor that kernels of our own are held to, and what any GPU runs.
#pragma once

#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_csr/cuda_sm80_cusparse_limits.h"

namespace lacuna::kernels::linear_csr {

// Whether libcusparse.so.12 is there to be loaded. torch brings it; it is loaded on the first call.
bool cusparse_is_there();

// Packed: int32 row offsets [N+1], int32 columns, bf16 values, 6 bytes a weight that is not zero.
// The product goes to float32 in the workspace and is rounded once: cuSPARSE's own bf16 outputs are
// sums of rounded parts. An x that is not finite reaches only outputs whose row keeps its column.
// @limits cusparse_shape_refusal
// @determinism the algorithms that give the same bits at every run (CSR_ALG2 of SpMV for one token,
//              CSR_ALG3 of SpMM for more)
extern const GpuLinearKernel kCusparse;

}  // namespace lacuna::kernels::linear_csr
