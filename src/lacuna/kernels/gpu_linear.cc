#include "lacuna/kernels/gpu_linear.h"

#include <dlfcn.h>

#include <cstdlib>

namespace lacuna::kernels {
namespace {

/// The file that this code is in: the program, or a shared library (liblacuna_torch.so).
std::filesystem::path own_file() {
  std::error_code ignored;
  const auto program = std::filesystem::read_symlink("/proc/self/exe", ignored);
  Dl_info info;
  if (dladdr(reinterpret_cast<void*>(&gpu_library), &info) == 0 || info.dli_fname == nullptr)
    return program;
  const std::filesystem::path file = info.dli_fname;  // of a program as it was called
  return file.is_absolute() && file.filename().string().find(".so") != std::string::npos ? file
                                                                                         : program;
}

std::filesystem::path library_path() {
  if (const char* named = std::getenv("LACUNA_CUDA_LIBRARY")) return named;
  const auto file = own_file();
  // Never a bare name, which the loader would look for elsewhere.
  return (file.empty() ? "/" : file.parent_path()) / "liblacuna_cuda.so";
}

Support supports_library() {
  if (!gpu_library().ok())
    return Support::no("needs the GPU kernels ({})", gpu_library().error().message);
  return Support::yes();
}

}  // namespace

Result<const GpuTable*> open_gpu_library(const std::filesystem::path& file) {
  std::error_code ignored;
  if (!std::filesystem::exists(file, ignored))
    return not_possible("{}: there is no such file. ./dev cuda builds it.", file.string());
  void* library = dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr)
    return not_possible("{}: can't be loaded ({}).", file.string(), dlerror());
  const auto table = reinterpret_cast<GpuTableFunction>(dlsym(library, kGpuTableSymbol));
  if (table == nullptr)
    return not_possible("{}: is no library of kernels ({} is missing).", file.string(),
                        kGpuTableSymbol);
  if (table()->version != kGpuAbiVersion)
    return not_possible(
        "{}: was built with another interface (got {}; need {}). ./dev cuda builds "
        "it anew.",
        file.string(), table()->version, kGpuAbiVersion);
  return table();
}

const Result<const GpuTable*>& gpu_library() {
  static const Result<const GpuTable*> library = open_gpu_library(library_path());
  return library;
}

const GpuLinearKernel* gpu_kernel(std::string_view operation, std::string_view candidate) {
  if (!gpu_library().ok()) return nullptr;
  const GpuTable& table = **gpu_library();
  for (int32_t i = 0; i < table.linear_count; ++i)
    if (table.linear[i]->operation == operation && table.linear[i]->name == candidate)
      return table.linear[i];
  return nullptr;
}

Support supports_gpu(const Device& device) {
  return needs(device.gpu && device.gpu->major > 0,
               device.gpu ? "a GPU, but no NVIDIA GPU or driver answers" : "weights on a GPU");
}

Support supports_gpu_kernel(const Device& device, int major, int minor) {
  const Support gpu = supports_gpu(device);
  if (!gpu) return gpu;
  if (device.gpu->major != major || device.gpu->minor != minor)
    return Support::no("needs compute capability {}.{} (this GPU has {}.{})", major, minor,
                       device.gpu->major, device.gpu->minor);
  return supports_library();
}

Support supports_gpu_kernel(const Device& device) {
  const Support gpu = supports_gpu(device);
  if (!gpu) return gpu;
  if (device.gpu->major < 8)
    return Support::no("needs compute capability 8.0 or later (this GPU has {}.{})",
                       device.gpu->major, device.gpu->minor);
  return supports_library();
}

Support supports_numbers(const Problem& problem, DType type) {
  const Values values = values_of(type);
  return needs(problem.values == values && problem.activations == type,
               fmt::format("{} values and {} activations", text(values), text(values)));
}

}  // namespace lacuna::kernels
