// y[T,N] = x[T,K] · W[N,K]^T with W sparse without a pattern in 8-bit codes with one scale a row,
// for few tokens, x in bf16, on tensor cores.
#pragma once

#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_coded_limits.h"

namespace lacuna::kernels::linear_bitmap {

// How one launch is cut. The kernels' plan() decides; a study may hold others in a CodedCall.
struct CodedCut {
  unsigned char token_tiles = 0;     // of 8 tokens: 1 or 2
  unsigned char tiles_per_warp = 0;  // row tiles (16 rows) that a warp multiplies side by side
  unsigned char row_warps = 0;       // warps side by side along N
  unsigned char k_warps = 0;         // warps side by side along K, summed through shared memory
  unsigned char stages = 0;          // depth of each warp's ring of weights
  unsigned char cluster = 0;         // blocks that share rows and split K
};

// What a GpuPlan of these kernels holds.
struct CodedCall {
  int tokens = 0;  // of all launches
  int each = 0;    // of one launch
  CodedCut cut;
};

// These kernels as the library shows them. W comes dense, its codes as bf16 numbers.
// @limits coded_shape_refusal; x aligned to 16 bytes if K % 8 == 0, y to 8 if N % 4 == 0, else
//         both to 2; no e4m3 that is not finite. In each 256 columns of a token, x is rounded to
//         the 2^-39th part of its largest magnitude there (bf16 within 2^29 of it are exact); a
//         token with Inf or NaN gives NaN or Inf wherever dense W would
// @cost layout.packed_bytes once for each 16 tokens; 2 T K of x for each group of rows
// @determinism the same bits at every run of one plan: each sum has a fixed order
// Sums of codes times x are float32, each times its scale once, one rounding to bf16 at the end.
extern const GpuLinearKernel kFp8;
extern const GpuLinearKernel kInt8;

}  // namespace lacuna::kernels::linear_bitmap
