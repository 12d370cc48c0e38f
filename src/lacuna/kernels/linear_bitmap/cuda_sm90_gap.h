// y[T,N] = x[T,K] · W[N,K]^T with W sparse without a pattern in bf16, for few tokens: kept values
// with the gaps between their columns.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_limits.h"

namespace lacuna::kernels::linear_bitmap {

// What is kept: numbers, or codes of 8 bits with one scale a row, which come as bf16 numbers.
enum class GapValues : int { kBf16, kInt8, kFp8 };

// `bits` of windows: 16 places of a row in any order, each with its distance from the 16 before,
// put into the order in which the x of 4 tokens meets few banks. 20 bits a place.
inline constexpr int kWindowBits = 7;

// How one W is packed. `gap_measure` fills it; the packed bytes mean nothing without it.
struct GapLayout {
  std::int64_t n = 0, k = 0;
  GapValues values = GapValues::kBf16;
  int bits = 0;           // of one gap: 3 or 4; kWindowBits
  int lanes_per_row = 0;  // 1, 2, 4 or 8: a warp holds 32 / lanes_per_row rows
  int warps = 0;          // of one block, which share its weights evenly
  int blocks = 0;
  int groups_per_block = 0;  // most groups (of 32 / lanes_per_row rows) that a block has
  int least_chunks = 0;      // least and most chunks (8 or 16 values a lane) that a warp has
  int most_chunks = 0;
  int top = 0;              // exponent of the largest bf16 that isn't a stray
  std::int64_t strays = 0;  // values that do not fit into 13 bits
  std::int64_t kept = 0;    // values that are not zero
  std::int64_t places = 0;  // values stored, zeros that bridge long gaps or fill up included
  std::size_t packed_bytes = 0;
};

// How one launch is done. `gap_plan` fills it; every field may be set by hand to measure others.
struct GapPlan {
  int tokens = 0;  // multiplied at a time: 1, 2 or 4; of windows 4 or 8
};

// Null if this machine and problem can be run, else the reason.
// @limits compute capability 9.0; 1 <= T <= 4 (codes: 2 at a time, windows: 1 <= T <= 8); 1 <= N <
// 2^25;
//         1 <= K <= 65472, from 2 tokens on K <= 53000 (x must fit in shared memory); K beyond some
//         25000 reads W twice for 3 or 4
const char* gap_refusal(std::int64_t n, std::int64_t k, int t, int device);

// Device memory that `gap_measure` and `gap_pack` need beside their operands.
std::size_t gap_scratch_bytes(std::int64_t n);

// Counts what is kept in W (bf16, row-major, zeros already in place) and decides the layout of the
// `values` that *layout names. Fields that are not 0 on entry are kept: bits (windows are only
// taken where it names them), lanes_per_row, warps.
// -0.0 counts as zero. Waits for the stream. The scratch then belongs to this W until `gap_pack` is
// done.
// @shape dense [N,K], scratch gap_scratch_bytes(N)
cudaError_t gap_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                        GapLayout* layout, cudaStream_t stream);

// Packs W. NaN and Inf are kept as they are.
// @shape dense [N,K], packed layout.packed_bytes, aligned to 128 bytes
cudaError_t gap_pack(const void* dense, const void* scratch, const GapLayout& layout, void* packed,
                     cudaStream_t stream);

// Adds the scales to what `gap_pack` has written of codes.
// @shape scales [N] in bf16
cudaError_t gap_pack_scales(const void* scales, const GapLayout& layout, void* packed,
                            cudaStream_t stream);

// Writes W again, to the bit, but -0.0 as 0.0; codes times their scales, rounded to bf16.
// @shape dense [N,K]
cudaError_t gap_unpack(const void* packed, const GapLayout& layout, void* dense,
                       cudaStream_t stream);
// Writes the codes of a W that has some. @shape codes [N,K], a byte each
cudaError_t gap_unpack_codes(const void* packed, const GapLayout& layout, void* codes,
                             cudaStream_t stream);

// Chooses how to multiply by a packed W on the current device from measured rules.
cudaError_t gap_plan(const GapLayout& layout, int t, GapPlan* plan);

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
std::size_t gap_shared_bytes(const GapLayout& layout, const GapPlan& plan);

// y = x · W^T, float32 sums, one rounding to bf16 at the end. Of bf16, places are summed as numbers
// up to 2^16 and their sum scaled last: an |x| beyond 2^100 may give Inf where y is finite.
// @shape x [T,K] and y [T,N] row-major and contiguous
// @limits as gap_refusal; x aligned to 16 bytes and K a multiple of 8 is faster. x is multiplied
//         only where packing kept a place; some places hold zeros, and there Inf or NaN of x gives
//         NaN, as dense W would
// @cost layout.packed_bytes once for each plan.tokens tokens, 2 T K of x for each block, from L2
// @determinism the same bits at every run of one packed W and plan: each sum has a fixed order
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
// With `overlap_previous` the launch is programmatic: it may start before the previous kernel of
// the stream is done and reads W, but neither reads x nor writes y, before that kernel is complete.
// Nothing directly ahead of it in the stream may write the packed weights then.
cudaError_t gap_run(const void* packed, const GapLayout& layout, const void* x, void* y, int t,
                    const GapPlan& plan, bool overlap_previous, cudaStream_t stream);

// The same as entries of the library's table. Codes of 8 bits: sums times the scale of the row
// once.
extern const GpuLinearKernel kGap;
extern const GpuLinearKernel kWindow;  // for 3 to 8 tokens
extern const GpuLinearKernel kGapInt8;
extern const GpuLinearKernel kGapFp8;

}  // namespace lacuna::kernels::linear_bitmap
