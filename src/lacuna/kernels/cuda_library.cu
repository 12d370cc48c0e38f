// liblacuna_cuda.so's only export: the table of its kernels. A new kernel is one more line here,
// and a candidate of the same name in its folder's list.cc.
#include <cuda_runtime_api.h>

#include "lacuna/kernels/expand/cuda_sm80_expand.h"
#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp.h"

namespace lacuna::kernels {
namespace {

constexpr const GpuLinearKernel* kLinear[] = {
    &linear_nm::kMmaSp,
};

const GpuTable kTable = {
    .version = kGpuAbiVersion,
    .error_text = [](int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); },
    .expand = [](const GpuBitmapMatrix* matrix, void* dense, GpuStream stream) -> int {
      return expand::expand(*matrix, dense, static_cast<cudaStream_t>(stream));
    },
    .linear = kLinear,
    .linear_count = sizeof(kLinear) / sizeof(kLinear[0]),
};

}  // namespace
}  // namespace lacuna::kernels

extern "C" __attribute__((visibility("default"))) const lacuna::kernels::GpuTable*
lacuna_gpu_table() {
  return &lacuna::kernels::kTable;
}
