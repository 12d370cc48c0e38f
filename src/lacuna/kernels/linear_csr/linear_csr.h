// y[T,N] = x[T,K] · W[N,K]^T for up to 16 tokens at a price per non-zero, W unstructured and very
// sparse.
#pragma once

#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/kernels/linear_csr/slices.h"

namespace lacuna::kernels::linear_csr {

/// The second operation of unstructured weights: the candidates of linear_bitmap pay for every
/// slot, these for every non-zero, in another packing (Slices). kernels/linear.h says which of the
/// two a weight takes. More than 16 tokens are the caller's, as those of linear_bitmap.
///
inline constexpr std::string_view kOperation = "linear_csr";

/// A candidate for the problem. @errors kUsage: not this operation, or LACUNA_FORCE names an
/// unknown candidate; kNotPossible: nothing here can do it
Result<LinearPlan> plan(const Problem& problem, const Device& device = Device::this_cpu());

/// y[t,n] = sum_k W[n,k] x[t,k] (+ bias[n]): float32 sums, one rounding to the type of y.
/// @param rows  the view of Slices
/// @shape x [T,K], y [T,N], bias [N]
/// @dtype W f32, bf16, f16; x, y and bias f32, bf16, f16, any combination
/// @limits 1 <= T <= 16, any N and K below 2^31, no alignment
/// @cost 2 T density N K flops; 3 density N K bytes (5 of f32) + 4 T K + T N
/// @determinism as linear_bitmap
/// @error gamma(K + 1) (|W||x| + |bias|) + one rounding to the type of y
/// @errors none: plan() has checked; `product` must agree with the problem of the plan
void run(const LinearPlan& plan, const format::RowsView& rows, const format::RowProduct& product,
         void* workspace, const Executor& executor);

/// Every candidate with yes or why not.
std::vector<Explanation> explain(const Problem& problem, const Device& device = Device::this_cpu());

/// The list itself.
LinearCandidates& candidates();
/// Those of a GPU: cuSPARSE's product.
GpuCandidates& gpu_candidates();

}  // namespace lacuna::kernels::linear_csr
