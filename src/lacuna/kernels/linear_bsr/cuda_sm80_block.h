// y[T,N] = x[T,K] · W[N,K]^T with W made of dense blocks in bf16 or f16, on tensor cores, straight
// from memory into registers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>

#include "lacuna/kernels/cuda/halves.h"
#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_bsr/cuda_sm80_block_limits.h"

namespace lacuna::kernels::linear_bsr {

// How one W is packed. `block_measure` fills it; the packed bytes mean nothing without it.
struct BlockLayout {
  std::int64_t n = 0, k = 0;
  int group_tiles = 0;  // row tiles (16 rows) that share a list of units: 1, 2 or 4
  int groups = 0;
  std::int64_t units = 0;  // of 16 group_tiles rows x 32 columns, in all lists
  int columns_stride = 0;  // the longest list
  std::size_t columns_at = 0, values_at = 0, packed_bytes = 0;
};

// How one launch is cut.
struct BlockPlan {
  int token_tiles = 0;  // of 8 tokens, that a block multiplies: 1, 2, 4 or 8
  int row_tiles = 0;    // of 16 rows, that a block multiplies: 1, 2 or 4, at most group_tiles
  int depth = 0;        // units that a warp asks for at one time: 1 or 2
  int k_warps = 0;      // warps of a block; each takes every so manieth unit
};

// Device memory that `block_measure` and `block_pack` need beside their operands.
std::size_t block_scratch_bytes(std::int64_t n, std::int64_t k);

// Finds what is kept of W (bf16 or f16, row-major, zeros already in place) and decides the layout:
// any tile of 16 x 32 that holds a weight is stored whole, so blocks of multiples of these sizes
// cost nothing more. -0.0 counts as zero. A group_tiles that is set on entry is kept. Waits for the
// stream. The scratch then belongs to this W until `block_pack` is done.
// @shape dense [N,K], aligned to 16 bytes, scratch block_scratch_bytes(N, K), aligned to 16
cudaError_t block_measure(const void* dense, std::int64_t n, std::int64_t k, void* scratch,
                          BlockLayout* layout, cudaStream_t stream);

// Packs W, bit by bit.
// @shape dense [N,K], packed layout.packed_bytes, aligned to 128 bytes
cudaError_t block_pack(const void* dense, const void* scratch, const BlockLayout& layout,
                       void* packed, cudaStream_t stream);

// Writes W again, to the bit where a tile is stored, elsewhere 0.0.
// @shape dense [N,K], aligned to 16 bytes
cudaError_t block_unpack(const void* packed, const BlockLayout& layout, void* dense,
                         cudaStream_t stream);

// Chooses the cut for the current device from measured rules.
cudaError_t block_plan(const BlockLayout& layout, std::int64_t t, BlockPlan* plan);

// Bytes of shared memory that a plan needs; 0 if the plan is not one the kernel has.
std::size_t block_shared_bytes(const BlockLayout& layout, const BlockPlan& plan);

// y = x · W^T, float32 sums, one rounding to Half at the end.
// @shape x [T,K] and y [T,N] row-major and contiguous; x aligned to 16 bytes, y to 8 (N % 4 == 0)
//        or 2 bytes
// @limits block_shape_refusal; compute capability 8.0 or later. Tiles that are not stored are not
//         multiplied: an x that is not finite reaches only outputs whose row keeps its column
// @cost layout.packed_bytes and 2 T N of y once; 2 T of x for each stored column of each group of
//       row_tiles, from L2; for more than 64 tokens the weights once more from L2 for every 64
// @determinism the same bits at every run of one packed W and plan: each sum has a fixed order
// @errors cudaErrorInvalidValue on what the limits exclude, else what the launch returned
// With `overlap_previous` the launch is programmatic (compute capability 9.0): it may start before
// the previous kernel of the stream is done and reads W, but neither reads x nor writes y, before
// that kernel is complete. Nothing directly ahead of it in the stream may write the packed weights
// then.
template <class Half = cuda::Bf16>
cudaError_t block_run(const void* packed, const BlockLayout& layout, const void* x, void* y,
                      std::int64_t t, const BlockPlan& plan, bool overlap_previous,
                      cudaStream_t stream);

// The same as an entry of the library's table.
extern const GpuLinearKernel kBlock, kBlockF16;

}  // namespace lacuna::kernels::linear_bsr
