// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in bf16 or f16, for few tokens, on the sparse tensor
// cores of every card that has them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lacuna/kernels/cuda/halves.h"
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_pack.h"

namespace lacuna::kernels::linear_nm {

// These kernels as the library shows them: of bf16 and of f16.
extern const GpuLinearKernel kMmaSp80, kMmaSp80F16;

// How one launch is cut. `mma_sp80_plan` fills it; every field may be set by hand to measure
// others.
struct MmaSp80Plan {
  int token_tiles = 0;     // of 8 tokens: 1, 2, 4 or 8
  int tiles_per_warp = 0;  // row tiles (16 rows): 1 or 2
  int row_warps = 0;       // warps side by side along N, which share x
  int k_warps = 0;         // groups of them along K, summed through shared memory
};

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
std::size_t mma_sp80_shared_bytes(const MmaSp80Plan& plan);

// Chooses the cut for a problem on the current device.
cudaError_t mma_sp80_plan(std::int64_t n, std::int64_t k, int t, MmaSp80Plan* plan);

// y = x · W^T, float32 sums, one rounding to Half at the end.
// @shape packed mma_sp_packed_bytes(N, K), x [T,K] and y [T,N] row-major and contiguous
// @limits compute capability 8.0 or later; else as mma_sp_run (cuda_sm90_mma_sp.h), also for NaN
//         and Inf of x
// @cost 1.125 N K bytes of weights once; 2 T K of x for each block, from L2
// @determinism the same bits at every run of one plan: each sum has a fixed order
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
template <class Half = cuda::Bf16>
cudaError_t mma_sp80_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                         int t, const MmaSp80Plan& plan, bool overlap_previous,
                         cudaStream_t stream);

}  // namespace lacuna::kernels::linear_nm
