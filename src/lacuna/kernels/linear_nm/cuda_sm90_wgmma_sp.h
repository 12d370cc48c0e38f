// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in bf16 or f16, for many tokens, on W as
// cuda_sm90_mma_sp packs it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lacuna/kernels/cuda/halves.h"

namespace lacuna::kernels::linear_nm {

// How one launch is cut. `wgmma_sp_plan` fills it; every field may be set by hand to measure
// others.
struct WgmmaSpPlan {
  int tokens;  // of a block's tile: 128 or 256, or 64 where K may be split
  int band;    // token tiles that are walked for the same rows before the next rows
  // The rest is for codes alone (cuda_sm90_rounded).
  int rows = 128;      // of a block's tile: 128 or 256
  bool split = false;  // clusters that have one tile each and may split K: tiles of 128 x 128
  int pair = 2;        // blocks of a cluster with other rows, which share x: with `split` also 1
  int parts = 1;       // of K, one a block of the cluster: up to 8 blocks in all
};

// Whether the kernel takes a shape: N a multiple of 8 (y's rows then begin at 16 bytes), K of 128.
bool wgmma_sp_takes(std::int64_t n, std::int64_t k);

// Tokens from which this kernel beats expanding W and the dense product, from measurements; 0 if it
// does not take the shape.
std::int64_t wgmma_sp_from_tokens(std::int64_t n, std::int64_t k);

// Chooses the cut for a problem on the current device from measured rules.
// @errors cudaErrorInvalidValue: a shape that wgmma_sp_takes() refuses, or T < 1
cudaError_t wgmma_sp_plan(std::int64_t n, std::int64_t k, std::int64_t t, WgmmaSpPlan* plan);

// y = x · W^T, float32 sums, one rounding to Half at the end.
// @shape packed mma_sp_packed_bytes(N, K), x [T,K] and y [T,N] row-major and contiguous
// @limits compute capability 9.0; N < 2^25 and a multiple of 8; K < 2^20 and a multiple of 128;
//         1 <= T < 2^28; packed weights, x and y aligned to 16 bytes. NaN and Inf of x meet
//         dropped weights as mma_sp_run says
// @cost 2 T N K multiplications and additions, half of them skipped
// @determinism the same bits at every run of one plan, and of every plan: a sum runs along K
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
template <class Half = cuda::Bf16>
cudaError_t wgmma_sp_run(const void* packed, const void* x, void* y, std::int64_t n, std::int64_t k,
                         std::int64_t t, const WgmmaSpPlan& plan, cudaStream_t stream);

}  // namespace lacuna::kernels::linear_nm
