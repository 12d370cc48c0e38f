// y[T,N] = x[T,K] · W[N,K]^T with W 2:4 sparse in 8-bit codes with one scale a row, x rounded to
// codes of the same kind with one scale a token, for many tokens, on W as cuda_sm90_coded packs it.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <variant>

#include "lacuna/kernels/cuda/sm90_stream_plan.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_resident_plan.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.h"

namespace lacuna::kernels::linear_nm {

// How one launch is cut; each may be set by hand to measure others.
using RoundedPlan = std::variant<ResidentPlan, WgmmaSpPlan>;

// What the plans of cuda_sm90_fp8 and cuda_sm90_int8 hold: x as it is, or rounded.
struct CodedCall {
  std::int64_t t;
  std::variant<cuda::StreamPlan, ResidentPlan, WgmmaSpPlan> plan;
};

struct RoundedOperands {
  const void* units;    // of W, as packed
  const float* scales;  // of W's rows, up to a multiple of 16
  const void* x;        // bf16 [T,K]
  void* y;              // bf16 [T,N]
  void* workspace;      // rounded_workspace_bytes
};

// Tokens from which rounding x pays, from measurements (bench/lab/cuda_linear_coded), and from
// which on any number can be multiplied; 0: never.
std::int64_t rounded_from_tokens(std::int64_t n, std::int64_t k);

// Codes and scales of x.
std::size_t rounded_workspace_bytes(std::int64_t k, std::int64_t t);

// For one kind of code.
struct Rounded {
  // Chooses the cut for a problem on the current device from measured rules.
  // @errors cudaErrorInvalidValue: a shape without a kernel
  cudaError_t (*plan)(std::int64_t n, std::int64_t k, std::int64_t t, RoundedPlan* plan);
  // Two launches: x is rounded (cuda/sm90_round_tokens.cuh), then multiplied; the second reads W
  // while the first still runs. Products of codes are added by the tensor cores, exactly for int8,
  // with some 14 bits for e4m3; the sums of up to eight blocks that share K as float32, in an
  // order that the plan fixes. Both scales are multiplied in float32, then one rounding to bf16.
  // @limits compute capability 9.0; K a multiple of 128; with a WgmmaSpPlan N a multiple of 8;
  //         x, y, units and workspace aligned to 16 bytes. A token with NaN or Inf gives NaN, all
  //         of it; a dropped weight meets no x
  // @determinism the same bits at every run of one plan
  cudaError_t (*run)(const RoundedOperands& operands, std::int64_t n, std::int64_t k,
                     std::int64_t t, const RoundedPlan& plan, bool overlap_previous,
                     cudaStream_t stream);
};
extern const Rounded kRoundedFp8;
extern const Rounded kRoundedInt8;

}  // namespace lacuna::kernels::linear_nm
