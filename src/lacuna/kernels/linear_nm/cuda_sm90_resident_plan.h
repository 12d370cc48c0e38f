// How one launch of the kernel of cuda_sm90_wgmma_sp_resident.cuh is cut.
#pragma once

namespace lacuna::kernels::linear_nm {

struct ResidentPlan {
  int tokens;   // that there is room for: 32 or 64
  int cluster;  // blocks that split K: 1, 2, 4 or 8
  int groups;   // warpgroups
  int stages;   // two units of W each, that each warp has in flight
  int ahead;    // of them, while the kernel ahead still runs
};

}  // namespace lacuna::kernels::linear_nm
