// Launches of kernels for every card from 8.0 on, which on 9.0 may begin before the kernel ahead of
// them is done (programmatic dependent launch) and elsewhere simply come after it.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

#include "lacuna/kernels/cuda/sm90_device.h"

namespace lacuna::kernels::cuda {

// The next kernel may start, to fetch what nobody writes while this one still runs; what the one
// before has written is there from here on. Whoever calls it in all of its kernels knows that a
// complete one has everything before it complete. (Before 9.0 there is no overlap, and nothing to
// do.)
__device__ __forceinline__ void follow() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Asked of compute capability 9.0 alone: earlier ones can't, later ones were never tried.
inline bool overlaps() {
  int device = 0;
  return cudaGetDevice(&device) == cudaSuccess && sm90_refusal(device) == nullptr;
}

// A kernel that calls follow() before it touches what others write.
template <class Params>
cudaError_t launch_following(void (*kernel)(Params), const Params& params, dim3 blocks, int threads,
                             std::size_t shared_bytes, bool overlap_previous, cudaStream_t stream) {
  if (shared_bytes > 48 * 1024) {
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap_previous && overlaps() ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

}  // namespace lacuna::kernels::cuda
