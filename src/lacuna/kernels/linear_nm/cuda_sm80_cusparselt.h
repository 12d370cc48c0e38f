// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in bf16, for many tokens, multiplied by
// NVIDIA's cuSPARSELt: on compute capability 9.0 mostly faster than cuda_sm90_wgmma_sp, and the
// only way for many tokens elsewhere. It lays W out in its own way, which few tokens can't use.
#pragma once

#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_nm/cuda_sm80_cusparselt_limits.h"

namespace lacuna::kernels::linear_nm {

// Whether libcusparseLt.so.0 is there to be loaded, 0.8 or a later 0.x.
// torch brings it; it is loaded on the first call.
bool cusparselt_is_there();

// Packed: cuSPARSELt's, 9 bits a weight. (Of f16 version 0.8.0 ends in an illegal instruction on
// an H200.) Its algorithms are tried once (its own search) for each
// shape and power of two of tokens, when that is first planned. Tokens that are no multiple of 64
// take a second, padded product.
// @limits cusparselt_shape_refusal; a weight that isn't finite isn't unpacked to the bit (unpack()
//         multiplies by the identity); NaN and Inf of x reach their own token alone
// @determinism the same bits at every run of one process; which algorithm is fastest may differ
//              from process to process
extern const GpuLinearKernel kCusparselt;

}  // namespace lacuna::kernels::linear_nm
