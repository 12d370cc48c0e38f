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

}  // namespace lacuna
