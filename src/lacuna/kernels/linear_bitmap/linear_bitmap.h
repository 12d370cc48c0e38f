// y[T,N] = x[T,K] · W[N,K]^T, W unstructured sparse, straight from the compact
// form.
#pragma once

#include "lacuna/format/rows.h"
#include "lacuna/kernels/gpu_linear.h"

namespace lacuna::kernels::linear_bitmap {

/// The CPU kernels walk the compact layout itself: what is resident is the compact matrix and 8
/// bytes a row (format::CompactRows). More than 16 tokens run on AMX (kernels/tiled.h); elsewhere
/// they are the caller's: format::expand_rows into a scratch that is reused, and a dense product.
///
inline constexpr std::string_view kOperation = "linear_bitmap";

/// A candidate for the problem. @errors kUsage: not this operation, or LACUNA_FORCE names an
/// unknown candidate; kNotPossible: nothing here can do it
Result<LinearPlan> plan(const Problem& problem, const Device& device = Device::this_cpu());
/// The packed form of the CPU: no copy of the weight.
/// @errors kUsage: another pattern than unstructured
Result<format::CompactRows> pack(format::CompactMatrix weight);

/// y[t,n] = sum_k W[n,k] x[t,k] (+ bias[n]): float32 sums, one rounding to the type of y.
/// @shape x [T,K], y [T,N], bias [N]
/// @dtype W f32, bf16, f16; x, y and bias f32, bf16, f16, any combination
/// @limits 1 <= T <= 16, with AMX and bf16 any T; any N and K, no alignment
/// @cost 2 T N K flops; (1/8 + density * width) N K + 2 T K + T N bytes
/// @determinism with one candidate, the bits of an output depend on its row and token alone: not on
/// the threads, nor on the other tokens of the call
/// @error |y - exact| <= gamma(2 ceil(K/32) + 5) (|W||x| + |bias|) + one rounding to the type of y
/// (AVX-512; AMX has gamma(ceil(K/32) + 17), the others gamma(K/8 + 6)). Candidates named _dot take
/// denormal weights and inputs as zero.
/// @errors none: plan() has checked; `product` must agree with the problem of the plan
void run(const LinearPlan& plan, const format::RowsView& rows, const format::RowProduct& product,
         void* workspace, const Executor& executor);

/// Every candidate with yes or why not.
std::vector<Explanation> explain(const Problem& problem, const Device& device = Device::this_cpu());

/// The list itself; the model tier adds candidates that stand on torch at start-up.
LinearCandidates& candidates();
/// What runs it on a GPU.
GpuCandidates& gpu_candidates();

}  // namespace lacuna::kernels::linear_bitmap
