// What GPUs the driver shows, asked without linking CUDA.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace lacuna {

struct GpuFacts {
  std::string name;
  int major = 0, minor = 0;  ///< compute capability
  int multiprocessors = 0;
  uint64_t memory_bytes = 0;
};

/// The NVIDIA GPUs of this machine (libcuda is loaded on demand); empty without driver or GPU.
const std::vector<GpuFacts>& gpus();
/// "CUDA driver 13.0", "CUDA runtime 13.0", "cuBLAS 13.1.0": of those that this process has loaded.
std::vector<std::string> gpu_library_versions();

}  // namespace lacuna
