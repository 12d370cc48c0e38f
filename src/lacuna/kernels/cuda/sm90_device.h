// What kernels for compute capability 9.0 ask a device, on the host.
#pragma once

#include <cuda_runtime.h>

namespace lacuna::kernels::cuda {

/// Why a device can't run them, or null.
inline const char* sm90_refusal(int device) {
  int major = 0, minor = 0;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    return "no such device";
  }
  return major == 9 && minor == 0 ? nullptr : "needs compute capability 9.0";
}

/// Of the current device.
inline cudaError_t multiprocessors(int* count) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess
             ? error
             : cudaDeviceGetAttribute(count, cudaDevAttrMultiProcessorCount, device);
}

}  // namespace lacuna::kernels::cuda
