// What the studies of kernels with codes in rings (kernels/cuda/sm90_coded.cuh) share: a packed
// weight, and the cuts that a sweep tries. One translation unit a program includes it.
#pragma once

#include "../cuda_harness.h"
#include "lacuna/kernels/cuda/sm90_stream_plan.h"
#include "lacuna/kernels/gpu_abi.h"

namespace k = lacuna::kernels;
using Plan = k::cuda::StreamPlan;

// ---------- a packed weight ----------
struct Call {  // what the kernel holds in a plan
  int64_t t;
  Plan plan;
  int32_t kind = 0;  // for 2:4 fp8 and int8: this one of several kinds of plan, x as it is
};
static std::string name_of(const k::GpuPlan& held) {
  const Plan p = k::held<Call>(&held).plan;
  char b[96];
  snprintf(b, sizeof b, "NT%d MT%d RW%d KW%d U%d S%d X%d C%d P%d", p.token_tiles, p.tiles_per_warp,
           p.row_warps, p.k_warps, p.stage_units, p.stages, p.x_stages, p.cluster, p.x_warps);
  return b;
}
struct Packed {
  const k::GpuLinearKernel& kernel;
  const int n, k;
  k::GpuLayout layout;
  vector<unsigned char*> copies;
  Packed(const k::GpuLinearKernel& kernel_, int n_, int k_) : kernel(kernel_), n(n_), k(k_) {
    CK((cudaError_t)kernel.measure(nullptr, n, k, nullptr, &layout, st));
  }
  ~Packed() {
    for (auto p : copies) cudaFree(p);
  }
  void add(const bf16* codes, const bf16* scales, k::GpuPackReport* report) {
    unsigned char* p;
    CK(cudaMalloc(&p, layout.packed_bytes));
    CK((cudaError_t)kernel.pack(&layout, codes, nullptr, p, report, st));
    CK((cudaError_t)kernel.pack_scales(&layout, scales, p, st));
    copies.push_back(p);
  }
  k::GpuPlan plan(int t) const {
    k::GpuPlan p;
    CK((cudaError_t)kernel.plan(&layout, t, &p));
    return p;
  }
  cudaError_t run(int i, const k::GpuPlan& plan, const bf16* x, bf16* y, bool pdl) const {
    return (cudaError_t)kernel.run(&layout, &plan, copies[i % copies.size()], x, y, nullptr, pdl,
                                   st);
  }
};

// Cuts of one wave of blocks.
static vector<k::GpuPlan> cuts(int n, int k, int t, int least_warps,
                               const vector<int>& stage_units) {
  vector<k::GpuPlan> all;
  const int nt = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;
  const int tiles = (n + 15) / 16, units = k / 128;
  for (int cluster : {1, 2, 4})
    for (int mt : {1, 2}) {
      const int groups = cluster == 1 ? 132 : cluster == 2 ? 66 : 30;
      const int rw = ((tiles + groups - 1) / groups + mt - 1) / mt, part = units / cluster;
      for (int kw : {1, 2, 3, 4, 6, 8, 12}) {
        if (kw > part || rw * kw < least_warps || rw * kw > 30) continue;
        for (int su : stage_units)
          for (int stages : {2, 3})
            for (int xw : {2, 3, 4}) {
              Plan p;
              const int rounds = (part + su * kw - 1) / (su * kw);
              if (rounds < 2 || stages > rounds || (xw == 4 && nt < 8) || (xw == 3 && nt > 2))
                continue;
              p.token_tiles = nt;
              p.cluster = cluster;
              p.tiles_per_warp = mt;
              p.row_warps = rw;
              p.k_warps = kw;
              p.stage_units = su;
              p.stages = stages;
              p.x_stages = std::min(3, rounds);
              p.x_warps = xw;
              p.least_shared = 116 * 1024;
              k::GpuPlan held;
              k::hold(&held, Call{t, p});
              all.push_back(held);
            }
      }
    }
  return all;
}
