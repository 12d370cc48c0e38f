// y[T,N] = x[T,K] · W[N,K]^T with W sparse without a pattern in bf16 or f16, for up to 64 tokens,
// on tensor cores: kept values are scattered into fragments in shared memory.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lacuna/kernels/cuda/halves.h"
#include "lacuna/kernels/cuda/sm90_stream_plan.h"
#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_scatter_limits.h"

namespace lacuna::kernels::linear_bitmap {

// What a unit of 16 rows x 128 columns is made of.
enum class ScatterForm : int {
  kChoose = 0,
  kPairs = 1,  // two values of each group of 4 where mma.sp takes them, further ones in a list
  kList = 2,   // a list of all
};

// How one W is packed. `scatter_measure` fills it; the packed bytes mean nothing without it.
struct ScatterLayout {
  std::int64_t n = 0, k = 0;
  ScatterForm form = ScatterForm::kChoose;
  int fours = 0;               // of values in the list of a unit
  std::int64_t kept = 0;       // values that are not zero
  std::int64_t elsewhere = 0;  // units with more values, of which some stand behind the units
  std::size_t order_at = 0;    // in bytes, of where each four packed rows come from; 0: as they lie
  std::size_t packed_bytes = 0;
};

// How one launch is cut; it has no ring of weights (`stages` is 0).
using ScatterPlan = cuda::StreamPlan;

// Null if this machine and problem can be run, else the reason.
// @limits compute capability 9.0; 1 <= T <= 64; 1 <= N < 2^25; K a multiple of 8, K < 2^20;
//         x aligned to 16 bytes, the packed weights to 128, y to 8 (N % 4 == 0) or 2 bytes
const char* scatter_refusal(std::int64_t n, std::int64_t k, int t, int device);

// Device memory that `scatter_measure` and `scatter_pack` need beside their operands.
std::size_t scatter_scratch_bytes(std::int64_t n, std::int64_t k);

// Counts what is kept in W (bf16 or f16, row-major, zeros already in place) and decides the layout.
// A form and fours that are set on entry are kept. -0.0 counts as zero. Waits for the stream. The
// scratch then belongs to this W until `scatter_pack` is done.
// @shape dense [N,K], aligned to 8 bytes, scratch scatter_scratch_bytes(N, K)
cudaError_t scatter_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                            ScatterLayout* layout, cudaStream_t stream);

// Packs W. NaN and Inf are kept as they are.
// @shape dense [N,K], packed layout.packed_bytes, aligned to 128 bytes
cudaError_t scatter_pack(const void* dense, const void* scratch, const ScatterLayout& layout,
                         void* packed, cudaStream_t stream);

// Writes W again, to the bit, but -0.0 as 0.0.
// @shape dense [N,K], aligned to 8 bytes
cudaError_t scatter_unpack(const void* packed, const ScatterLayout& layout, void* dense,
                           cudaStream_t stream);

// Chooses the cut for a packed W on the current device from measured rules.
cudaError_t scatter_plan(const ScatterLayout& layout, int t, ScatterPlan* plan);

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
std::size_t scatter_shared_bytes(const ScatterLayout& layout, const ScatterPlan& plan);

// y = x · W^T, float32 sums, one rounding to Half at the end.
// @shape x [T,K] and y [T,N] row-major and contiguous
// @limits as scatter_refusal; dropped weights are multiplied as zeros (in form kPairs some of them
//         twice, some not at all), so Inf of x gives NaN or Inf
// @cost layout.packed_bytes and 2 T N of y once; 2 T K of x for each group of rows, from L2
// @determinism the same bits at every run of one packed W and plan: each sum has a fixed order
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
// With `overlap_previous` the launch is programmatic: it may start before the previous kernel of
// the stream is done and reads W, but neither reads x nor writes y, before that kernel is complete.
// Nothing directly ahead of it in the stream may write the packed weights then.
template <class Half = cuda::Bf16>
cudaError_t scatter_run(const void* packed, const ScatterLayout& layout, const void* x, void* y,
                        int t, const ScatterPlan& plan, bool overlap_previous, cudaStream_t stream);

// The same as an entry of the library's table.
extern const GpuLinearKernel kScatter, kScatterF16;

}  // namespace lacuna::kernels::linear_bitmap
