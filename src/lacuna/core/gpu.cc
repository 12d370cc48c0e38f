#include "lacuna/core/gpu.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <type_traits>

namespace lacuna {
namespace {

// The few driver entry points that are needed, with the types of cuda.h (CUresult and CUdevice are
// ints).
struct Driver {
  int (*init)(unsigned) = nullptr;
  int (*count)(int*) = nullptr;
  int (*get)(int*, int) = nullptr;
  int (*name)(char*, int, int) = nullptr;
  int (*memory)(size_t*, int) = nullptr;
  int (*attribute)(int*, int, int) = nullptr;

  bool load() {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return false;
    const auto find = [&](auto& function, const char* symbol) {
      function =
          reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, symbol));
      return function != nullptr;
    };
    return find(init, "cuInit") && find(count, "cuDeviceGetCount") && find(get, "cuDeviceGet") &&
           find(name, "cuDeviceGetName") && find(memory, "cuDeviceTotalMem_v2") &&
           find(attribute, "cuDeviceGetAttribute");
  }
};

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CUdevice_attribute

std::vector<GpuFacts> ask() {
  std::vector<GpuFacts> found;
  Driver driver;
  int devices = 0;
  if (!driver.load() || driver.init(0) != 0 || driver.count(&devices) != 0) return found;
  for (int i = 0; i < devices; ++i) {
    int device = 0;
    if (driver.get(&device, i) != 0) continue;
    GpuFacts gpu;
    char name[256] = {};
    size_t memory = 0;
    if (driver.name(name, sizeof(name) - 1, device) == 0) gpu.name = name;
    if (driver.memory(&memory, device) == 0) gpu.memory_bytes = memory;
    driver.attribute(&gpu.major, kMajor, device);
    driver.attribute(&gpu.minor, kMinor, device);
    driver.attribute(&gpu.multiprocessors, kMultiprocessors, device);
    found.push_back(gpu);
  }
  return found;
}

/// Of a function that tells 1000 * major + 10 * minor.
void add_version(void* library, const char* symbol, const char* what,
                 std::vector<std::string>& versions) {
  const auto ask_version = reinterpret_cast<int (*)(int*)>(dlsym(library, symbol));
  int version = 0;
  if (ask_version != nullptr && ask_version(&version) == 0)
    versions.push_back(fmt::format("{} {}.{}", what, version / 1000, version % 1000 / 10));
}

}  // namespace

std::vector<std::string> gpu_library_versions() {
  std::vector<std::string> versions;
  if (void* driver = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD); driver != nullptr)
    add_version(driver, "cuDriverGetVersion", "CUDA driver", versions);
  add_version(RTLD_DEFAULT, "cudaRuntimeGetVersion", "CUDA runtime", versions);
  const auto property =
      reinterpret_cast<int (*)(int, int*)>(dlsym(RTLD_DEFAULT, "cublasGetProperty"));
  int parts[3] = {};  // libraryPropertyType: major, minor, patch
  if (property != nullptr && property(0, &parts[0]) == 0 && property(1, &parts[1]) == 0 &&
      property(2, &parts[2]) == 0)
    versions.push_back(fmt::format("cuBLAS {}.{}.{}", parts[0], parts[1], parts[2]));
  return versions;
}

const std::vector<GpuFacts>& gpus() {
  static const std::vector<GpuFacts> found = ask();
  return found;
}

}  // namespace lacuna
