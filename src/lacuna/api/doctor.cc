#include "lacuna/api/doctor.h"

#include <fmt/format.h>
#include <torch/version.h>

#include <nlohmann/json.hpp>

#include "lacuna/core/cpu.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/gpu.h"
#include "lacuna/core/version.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/torch.h"

namespace lacuna::api {

DoctorReport doctor() {
  DoctorReport report;
  const CpuFeatures& cpu = cpu_features();
  report.cpu = cpu.name;
  report.cores = available_cores();
  report.features = cpu.list();
  report.libraries = {
      fmt::format("lacuna {}", kVersion), fmt::format("libtorch {}", TORCH_VERSION),
      fmt::format("fmt {}.{}.{}", FMT_VERSION / 10000, FMT_VERSION / 100 % 100, FMT_VERSION % 100)};
  if (kernels::gpu_library().ok())
    report.libraries.push_back(fmt::format("liblacuna_cuda.so ({} kernels, interface {})",
                                           (*kernels::gpu_library())->linear_count,
                                           (*kernels::gpu_library())->version));
  if (!cpu.avx2)
    report.missing.push_back(
        "AVX2: the portable kernels run, several times slower. A newer CPU has it.");
  if (!cpu.avx512_vbmi2)
    report.missing.push_back(
        "AVX-512 VBMI2: sparse weights expand through slower kernels on this CPU.");
  if (!cpu.avx512_bf16)
    report.missing.push_back("AVX-512 BF16: --dtype auto computes in float32 on this CPU.");
  const auto device = model::open_device("cuda");
  if (device.ok()) {
    for (const GpuFacts& gpu : gpus())
      report.gpus.push_back(fmt::format(
          "{}, {:.0f} GB, {} multiprocessors, compute capability {}.{}", gpu.name,
          static_cast<double>(gpu.memory_bytes) / 1e9, gpu.multiprocessors, gpu.major, gpu.minor));
    for (std::string& version : gpu_library_versions())
      report.libraries.push_back(std::move(version));
    if (!kernels::gpu_library().ok())
      report.missing.push_back(
          fmt::format("GPU kernels: sparse weights are expanded before each product. {}",
                      kernels::gpu_library().error().message));
  } else {
    report.missing.push_back(device.error().message);
  }
  return report;
}

nlohmann::json to_json(const DoctorReport& report) {
  return {{"verb", "doctor"},         {"cpu", report.cpu},
          {"cores", report.cores},    {"features", report.features},
          {"gpus", report.gpus},      {"libraries", report.libraries},
          {"missing", report.missing}};
}

}  // namespace lacuna::api
