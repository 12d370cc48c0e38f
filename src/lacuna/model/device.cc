#include <ATen/Context.h>
#include <ATen/Parallel.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>

#include <filesystem>

#include "lacuna/core/gpu.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {
namespace {

/// Loads libtorch_cuda from beside libtorch_cpu, once. Empty when it is there, else the reason.
/// It must come before anything asks torch for CUDA: torch remembers the first answer for good.
const std::string& cuda_refusal() {
  static const std::string reason = []() -> std::string {
    if (gpus().empty()) return "no NVIDIA GPU or driver answers";
    Dl_info info;
    if (dladdr(reinterpret_cast<void*>(&at::get_num_threads), &info) == 0 ||
        info.dli_fname == nullptr)
      return "libtorch_cpu could not be located";
    // torch reads it once, at the first product; without it, it refuses all products while it is
    // asked for the same bits every time (prune/reconstruct.cc).
    (void)setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8", /*overwrite=*/0);
    const auto library = std::filesystem::path(info.dli_fname).parent_path() / "libtorch_cuda.so";
    if (dlopen(library.c_str(), RTLD_NOW | RTLD_GLOBAL) == nullptr) return dlerror();
    if (!at::hasCUDA()) return "no NVIDIA GPU or driver answers";
    return {};
  }();
  return reason;
}

}  // namespace

Result<at::Device> open_device(std::string_view name) {
  if (name == "cpu") return at::Device(at::kCPU);
  if (name != "auto" && name != "cuda")
    return usage_error("--device: unknown device (got {}; need auto, cpu or cuda).", name);
  if (cuda_refusal().empty()) return at::Device(at::kCUDA, 0);
  if (name == "auto") return at::Device(at::kCPU);
  return not_possible(
      "--device cuda: no GPU can be used here ({}). Use --device cpu, or install "
      "the CUDA libraries of torch and a driver.",
      cuda_refusal());
}

void* gpu_stream(at::Device device) {
  const auto* torch = c10::impl::getDeviceGuardImpl(device.type());
  return torch->getStreamNativeHandle(torch->getStream(device));
}

std::optional<std::string> gpu_library_refusal() {
  if (!kernels::gpu_library().ok()) return kernels::gpu_library().error().message;
  if (gpus().empty()) return "no NVIDIA GPU or driver answers";
  const GpuFacts& gpu = gpus().front();
  if (gpu.major < 8)
    return fmt::format("{}: the GPU kernels need compute capability 8.0 (got {}.{})", gpu.name,
                       gpu.major, gpu.minor);
  return std::nullopt;
}

void set_threads(int threads) {
  at::set_num_threads(threads > 0 ? threads : available_cores());
  at::globalContext().setFloat32MatmulPrecision("highest");
}

}  // namespace lacuna::model
