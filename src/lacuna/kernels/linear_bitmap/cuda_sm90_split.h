// y[T,N] = x[T,K] · W[N,K]^T with W sparse without a pattern in bf16, for 1 to 32 tokens, on sparse
// tensor cores: a part that is 2:4, and the rest scattered into tiles of shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lacuna/kernels/cuda/sm90_stream_plan.h"
#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_split_limits.h"

namespace lacuna::kernels::linear_bitmap {

// Which values a unit holds in the places of mma.sp, and which it holds in lists.
enum class SplitForm : int {
  kChoose = 0,
  kPairs = 1,  // two of each group of four in places, further ones in lists
  kLists = 2,  // all in lists
};

// How one W is packed. `split_measure` fills it; the packed bytes mean nothing without it.
struct SplitLayout {
  std::int64_t n = 0, k = 0;
  SplitForm form = SplitForm::kChoose;
  int unit_bytes = 0;          // of a unit of 16 rows x 128 columns
  std::int64_t kept = 0;       // values that are not zero
  std::int64_t elsewhere = 0;  // units whose lists are too long and stand behind the units
  std::size_t packed_bytes = 0;
};

using SplitPlan = cuda::StreamPlan;

// Null if this machine and problem can be run, else the reason.
// @limits compute capability 9.0; 1 <= T <= 32; 1 <= N < 2^25; K a multiple of 128, K < 2^20;
//         x and the packed weights aligned to 16 bytes, y to 8 (N % 4 == 0) or 2 bytes
const char* split_refusal(std::int64_t n, std::int64_t k, int t, int device);

// Device memory that `split_measure` and `split_pack` need beside their operands.
std::size_t split_scratch_bytes(std::int64_t n, std::int64_t k);

// Counts what is kept in W (bf16, row-major, zeros already in place) and decides the layout. A form
// in *layout that is not kChoose is kept. -0.0 counts as zero. Waits for the stream. The scratch
// then belongs to this W until `split_pack` is done.
// @shape dense [N,K], scratch split_scratch_bytes(N, K)
cudaError_t split_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                          SplitLayout* layout, cudaStream_t stream);

// Packs W. NaN and Inf are kept as they are.
// @shape dense [N,K], packed layout.packed_bytes, aligned to 128 bytes
cudaError_t split_pack(const void* dense, const void* scratch, const SplitLayout& layout,
                       void* packed, cudaStream_t stream);

// Writes W again, to the bit, but -0.0 as 0.0.
// @shape dense [N,K], aligned to 8 bytes
cudaError_t split_unpack(const void* packed, const SplitLayout& layout, void* dense,
                         cudaStream_t stream);

// Chooses the cut for a packed W on the current device from measured rules.
cudaError_t split_plan(const SplitLayout& layout, int t, SplitPlan* plan);

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
std::size_t split_shared_bytes(const SplitLayout& layout, const SplitPlan& plan);

// y = x · W^T, float32 sums, one rounding to bf16 at the end.
// @shape x [T,K] and y [T,N] row-major and contiguous
// @limits as split_refusal; some dropped weights are multiplied as zeros, and there Inf or NaN of x
//         gives NaN, as dense W would
// @cost layout.packed_bytes and 2 T N of y once; 2 T K of x for each group of rows, from L2
// @determinism the same bits at every run of one packed W and plan: each sum has a fixed order
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
// With `overlap_previous` the launch is programmatic: it may start before the previous kernel of
// the stream is done and reads W, but neither reads x nor writes y, before that kernel is complete.
// Nothing directly ahead of it in the stream may write the packed weights then.
cudaError_t split_run(const void* packed, const SplitLayout& layout, const void* x, void* y, int t,
                      const SplitPlan& plan, bool overlap_previous, cudaStream_t stream);

// The same as an entry of the library's table.
extern const GpuLinearKernel kSplit;

}  // namespace lacuna::kernels::linear_bitmap
