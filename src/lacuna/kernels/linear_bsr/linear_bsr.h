// y[T,N] = x[T,K] · W[N,K]^T for up to 16 tokens, W made of dense blocks, straight from the compact
// form.
#pragma once

#include "lacuna/format/rows.h"
#include "lacuna/kernels/gpu_linear.h"

namespace lacuna::kernels::linear_bsr {

/// The CPU kernels walk the compact layout itself: what is resident is the compact matrix. More
/// than 16 tokens are the caller's, as those of linear_bitmap.
///
inline constexpr std::string_view kOperation = "linear_bsr";

/// A candidate for the problem. @errors kUsage: not this operation, or LACUNA_FORCE names an
/// unknown candidate; kNotPossible: nothing here can do it
Result<LinearPlan> plan(const Problem& problem, const Device& device = Device::this_cpu());
/// The packed form of the CPU: no copy of the weight.
/// @errors kUsage: another pattern than blocks
Result<format::CompactRows> pack(format::CompactMatrix weight);

/// y[t,n] = sum_k W[n,k] x[t,k] (+ bias[n]): float32 sums, one rounding to the type of y.
/// @shape x [T,K], y [T,N], bias [N]
/// @dtype W f32, bf16, f16; x, y and bias f32, bf16, f16, any combination
/// @limits 1 <= T <= 16, any N, K and blocks, no alignment
/// @cost 2 T density N K flops; density width N K + 2 T K + T N bytes
/// @determinism as linear_bitmap
/// @error as linear_bitmap for blocks of a multiple of 32 columns in AVX-512; the others have
/// gamma(K + 1). Candidates named _dot take denormal weights and inputs as zero.
/// @errors none: plan() has checked; `product` must agree with the problem of the plan
void run(const LinearPlan& plan, const format::RowsView& rows, const format::RowProduct& product,
         void* workspace, const Executor& executor);

/// Every candidate with yes or why not.
std::vector<Explanation> explain(const Problem& problem, const Device& device = Device::this_cpu());

/// The list itself; the model tier adds candidates that stand on torch at start-up.
LinearCandidates& candidates();
/// What runs it on a GPU.
GpuCandidates& gpu_candidates();

}  // namespace lacuna::kernels::linear_bsr
