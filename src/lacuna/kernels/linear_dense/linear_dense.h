// y[T,N] = x[T,K] · W[N,K]^T, W dense: the honest baseline of decoding.
#pragma once

#include "lacuna/format/rows.h"
#include "lacuna/kernels/gpu_linear.h"

namespace lacuna::kernels::linear_dense {

/// The rows are what format::dense_rows() says of a row-major W.
///
inline constexpr std::string_view kOperation = "linear_dense";

/// A candidate for the problem. @errors kUsage: not this operation, or LACUNA_FORCE names an
/// unknown candidate; kNotPossible: nothing here can do it
Result<LinearPlan> plan(const Problem& problem, const Device& device = Device::this_cpu());

/// y[t,n] = sum_k W[n,k] x[t,k] (+ bias[n]): float32 sums, one rounding to the type of y.
/// @shape x [T,K], y [T,N], bias [N]
/// @dtype W f32, bf16, f16; x, y and bias f32, bf16, f16, any combination
/// @limits 1 <= T <= 16, with AMX and bf16 any T; any N and K, no alignment
/// @cost 2 T N K flops; width N K + 2 T K + T N bytes
/// @determinism as linear_bitmap
/// @error as linear_bitmap
/// @errors none: plan() has checked; `product` must agree with the problem of the plan
void run(const LinearPlan& plan, const format::RowsView& rows, const format::RowProduct& product,
         void* workspace, const Executor& executor);

/// Every candidate with yes or why not.
std::vector<Explanation> explain(const Problem& problem, const Device& device = Device::this_cpu());

/// The list itself; the model tier adds candidates that stand on torch at start-up.
LinearCandidates& candidates();
/// What runs it on a GPU.
GpuCandidates& gpu_candidates();

}  // namespace lacuna::kernels::linear_dense
