// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in bf16 or f16, for few tokens, on sparse tensor
// cores.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lacuna/kernels/cuda/halves.h"
#include "lacuna/kernels/cuda/sm90_stream_plan.h"
#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp_pack.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp_limits.h"

namespace lacuna::kernels::linear_nm {

// These kernels as the library shows them: of bf16 and of f16.
extern const GpuLinearKernel kMmaSp, kMmaSpF16;

// How one launch is cut. `mma_sp_plan` fills it; every field may be set by hand to measure others.
using MmaSpPlan = cuda::StreamPlan;

// Scratch that `mma_sp_run` needs: none, every sum stays in shared memory.
std::size_t mma_sp_workspace_bytes(std::int64_t n, std::int64_t k, int t);

// Null if this machine and problem can be run, else the reason.
// @limits compute capability 9.0; 1 <= T <= 64; 1 <= N < 2^25; K a multiple of 128, K < 2^20;
//         x and the packed weights aligned to 16 bytes, y to 8 (N % 4 == 0) or 2 bytes.
const char* mma_sp_refusal(std::int64_t n, std::int64_t k, int t, int device);

// Chooses the cut for a problem on the current device from measured rules.
cudaError_t mma_sp_plan(std::int64_t n, std::int64_t k, int t, MmaSpPlan* plan);

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
std::size_t mma_sp_shared_bytes(const MmaSpPlan& plan);

// y = x · W^T, float32 sums, one rounding to Half at the end.
// @shape x [T,K] and y [T,N] row-major and contiguous
// @limits as mma_sp_refusal; x is multiplied only where packing kept a place, so an Inf or NaN of x
//         that meets a dropped weight does not reach y. Two places are kept in every group: one
//         with fewer non-zeros keeps zeros too, and there Inf or NaN of x gives NaN, as dense W
//         would
// @cost 1.125 N K bytes of weights and 2 T N of y once; 2 T K of x for each group of rows, from L2
// @determinism the same bits at every run of one plan: each sum has a fixed order
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
// With `overlap_previous` the launch is programmatic: it may start before the previous kernel of
// the stream is done and reads W, but neither reads x nor writes y, before that kernel is complete.
// Nothing directly ahead of it in the stream may write the packed weights then.
template <class Half = cuda::Bf16>
cudaError_t mma_sp_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                       int t, const MmaSpPlan& plan, bool overlap_previous, cudaStream_t stream);

}  // namespace lacuna::kernels::linear_nm
