// How the kernels of this library are launched, on the host.
#pragma once

#include <cuda_runtime.h>

namespace lacuna::kernels::cuda {

/// What a launch asks for beside the kernel's parameters.
struct Launch {
  int blocks = 0, threads = 0;
  int shared_bytes = 0;           ///< dynamic; more than 48 KiB need no word of their own
  int cluster = 1;                ///< blocks
  bool overlap_previous = false;  ///< programmatic: it may start before the kernel ahead is done
  cudaStream_t stream = nullptr;
};

/// @errors what the launch returned
template <class Params>
cudaError_t launch(void (*kernel)(Params), const Launch& l, const Params& p) {
  const cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(l.blocks);
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = l.stream;
  config.attrs = attributes;
  if (l.cluster > 1) {
    cudaLaunchAttribute& shape = attributes[config.numAttrs++];
    shape.id = cudaLaunchAttributeClusterDimension;
    shape.val.clusterDim.x = l.cluster;
    shape.val.clusterDim.y = 1;
    shape.val.clusterDim.z = 1;
  }
  if (l.overlap_previous) {
    cudaLaunchAttribute& order = attributes[config.numAttrs++];
    order.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    order.val.programmaticStreamSerializationAllowed = 1;
  }
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace lacuna::kernels::cuda
