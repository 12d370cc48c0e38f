// How one launch of a kernel of sm90_stream.cuh is cut.
#pragma once

namespace lacuna::kernels::cuda {

struct StreamPlan {
  int token_tiles = 0;     // of 8 tokens: 1, 2, 4 or 8
  int tiles_per_warp = 0;  // row tiles (16 rows) that a warp multiplies with one x fragment
  int row_warps = 0;       // warps side by side along N
  int k_warps = 0;         // warps side by side along K, summed through shared memory
  int stage_units = 0;     // units (128 columns) a warp fetches at a time
  int stages = 0;          // depth of each warp's ring of weights
  int x_stages = 0;        // depth of the block's ring of x
  int cluster = 0;         // blocks that share rows and split K, summed through their shared memory
  int x_first = 1;         // stages of x asked for before anything is waited for
  int x_warps = 1;         // warps that fetch x
  int least_shared = 0;    // bytes of shared memory to ask for at least
};

}  // namespace lacuna::kernels::cuda
