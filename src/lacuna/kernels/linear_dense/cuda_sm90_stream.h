// y[N] = W[N,K] x[K] with W dense in bf16 or f16, as it lies: the baseline of decoding at the speed
// of the memory.
#pragma once

#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_stream_limits.h"

namespace lacuna::kernels::linear_dense {

// This kernel as the library shows it. W stays as it is stored: its layout has no packed bytes.
// @limits as stream_shape_refusal; W and x aligned to 16 bytes, y to 2
// @cost 2 N K bytes of weights and 2 N of y once; 2 K of x for every block, from L2
// @determinism the same bits on every GPU: the order of a row's sum depends on K alone
extern const GpuLinearKernel kStream, kStreamF16;

}  // namespace lacuna::kernels::linear_dense
