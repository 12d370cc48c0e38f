// y[T,N] = x[T,K] · W[N,K]^T, W int8 or int4 with scales, dense or sparse, x quantised to int8 on
// the way.
#pragma once

#include "lacuna/format/row_product.h"
#include "lacuna/kernels/linear_coded/stream.h"
#include "lacuna/kernels/quantize_token.h"
#include "lacuna/kernels/select.h"

namespace lacuna::kernels::linear_coded {

/// Up to as many are few: weights are read once from memory and decide the time.
inline constexpr int64_t kMaxTokens = format::kMaxTokens;

/// Sums of one tile with tokens [first, first + count) of prepared x: Σ w (x + 128), where w
/// carries its scale if scales are grouped. sums[t * kTileRows + row].
using TileKernel = void (*)(const Stream& stream, int64_t tile, const uint8_t* x, int64_t x_stride,
                            int64_t tokens, float* sums);

/// A whole product; the workspace has workspace_bytes().
using CodedProduct = void (*)(const Stream& stream, const format::RowProduct& product,
                              void* workspace, const Executor& executor);

/// One of the two.
struct CodedCandidate : Candidate {
  TileKernel kernel = nullptr;
  CodedProduct product = nullptr;
};
using CodedCandidates = CandidateList<CodedCandidate>;

struct CodedPlan {
  Problem problem;
  const CodedCandidate* candidate = nullptr;
  size_t workspace_bytes = 0;
};

/// A candidate for the problem, whatever its pattern (the operation's name is linear_dense,
/// linear_bitmap, linear_nm or linear_bsr as the pattern says).
/// @errors kUsage: LACUNA_FORCE names an unknown candidate; kNotPossible: nothing here can do it
Result<CodedPlan> plan(const Problem& problem, const Device& device = Device::this_cpu());
/// The plan that runs this candidate, which supports the problem.
CodedPlan plan_for(const CodedCandidate& candidate, const Problem& problem);
size_t workspace_bytes(const Problem& problem);

/// y[t,n] = Σ_k W[n,k] x'[t,k] (+ bias[n]), where x' is x rounded to s_t · (-127..127) with
/// s_t = max_k |x[t,k]| / 127: products and sums of codes are exact integers (in a group of columns
/// that share a scale, or the whole row), sums over groups are float32, one rounding to the type of
/// y. A NaN or an infinity in x makes its token's y NaN.
/// @shape x [T,K], y [T,N], bias [N]
/// @dtype W int8 or int4 (format/quantization.h); x, y and bias f32, bf16 or f16
/// @limits T >= 1, any N, K <= 65536
/// @cost 2 T N K operations; the bytes of the stream once for each 8 tokens, from memory once; on
/// AMX once for each 256
/// @determinism the bits of an output depend on its row and token alone: not on the candidate, the
/// threads, nor on the other tokens of the call
void run(const CodedPlan& plan, const Stream& stream, const format::RowProduct& product,
         void* workspace, const Executor& executor);

std::vector<Explanation> explain(const Problem& problem, const Device& device = Device::this_cpu());
CodedCandidates& candidates();

}  // namespace lacuna::kernels::linear_coded
