// y[T,N] = x[T,K] · W[N,K]^T, W bf16 or f16 with a bitmap, packed as one stream a thread.
#pragma once

#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/kernels/linear_stream/value_stream.h"

namespace lacuna::kernels::linear_stream {

/// The second operation of unstructured and KEEP:OF weights: the candidates of linear_bitmap and
/// linear_nm walk the compact layout, several rows at a time; these read one run of bytes, in
/// another packing of the same size (ValueStream). kernels/linear.h says which of the two a weight
/// takes. More than 16 tokens run on AMX (kernels/tiled.h); elsewhere they are the caller's:
/// expand_tile() into a scratch, and a dense product.
///
inline constexpr std::string_view kOperation = "linear_stream";

/// A candidate for the problem. @errors kUsage: not this operation, or LACUNA_FORCE names an
/// unknown candidate; kNotPossible: nothing here can do it
Result<LinearPlan> plan(const Problem& problem, const Device& device = Device::this_cpu());

/// y[t,n] = sum_k W[n,k] x[t,k] (+ bias[n]): float32 sums, one rounding to the type of y.
/// @param rows  the view of ValueStream
/// @shape x [T,K], y [T,N], bias [N]
/// @dtype W bf16, f16; x, y and bias f32, bf16, f16, any combination
/// @limits 1 <= T <= 16, with AMX and bf16 any T; any N and K, no alignment
/// @cost 2 T N K flops; (1/8 + 2 density) N K + 4 T K + T N bytes
/// @determinism as linear_bitmap
/// @error gamma(n) (|W||x| + |bias|) + one rounding to the type of y, where a sum of at most
/// 32 products for each 64 columns is followed by three additions: n = 32 ceil(K/64) + 3, 64
/// ceil(K/64) + 3 without fused multiply-adds; AMX has gamma(ceil(K/32) + 17). Candidates named
/// _dot take denormal weights and inputs as zero.
/// @errors none: plan() has checked; `product` must agree with the problem of the plan
void run(const LinearPlan& plan, const format::RowsView& rows, const format::RowProduct& product,
         void* workspace, const Executor& executor);

/// Every candidate with yes or why not.
std::vector<Explanation> explain(const Problem& problem, const Device& device = Device::this_cpu());

/// The list itself.
LinearCandidates& candidates();
/// What runs it on a GPU: nothing of its own.
GpuCandidates& gpu_candidates();

}  // namespace lacuna::kernels::linear_stream
