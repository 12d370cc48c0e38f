// 2:4 through cuSPARSELt. The library is loaded when it is first asked for, so that
// liblacuna_cuda.so needs none to be loaded; what is called of it is declared here, so that
// compiling needs none of its headers either.
//
//   y^T [N,T] = W [N,K] · x^T [K,T]: W the structured operand, row-major; x as it lies ([T,K]
//   row-major, transposed by the library); y^T column-major is y as it lies.
//
//   T = 64 i + rest:  |-- 64 i tokens, straight from x into y --|-- rest: copied, padded to 64 --|
//   so that a plan for each multiple of 64 serves all T, each made once.
#include "lacuna/kernels/linear_nm/cuda_sm80_cusparselt.h"

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <tuple>
#include <type_traits>

namespace lacuna::kernels::linear_nm {
namespace {

constexpr int64_t kStep = 64;            // of tokens
constexpr int64_t kMostSearched = 8192;  // tokens: what more of them take too
constexpr int kThreads = 256;

// --- cuSPARSELt (https://docs.nvidia.com/cuda/cusparselt) ----------------------------------------

// Its structs are opaque, of 512 bytes; it gets room for more.
struct alignas(64) Opaque {
  unsigned char bytes[4096] = {};
};
using Status = int;  // 0 is success
constexpr int kColumnMajor = 1, kRowMajor = 2, kNotTransposed = 0, kTransposed = 1;
constexpr int kHalfOfEachFour = 0, kDefault = 0, kConfigId = 0;
constexpr int kSumsInFloat = 2;
constexpr unsigned kAlignment = 16;

struct Cusparselt {
  Status (*cusparseLtInit)(Opaque* handle);
  Status (*cusparseLtGetProperty)(int property, int* value);
  Status (*cusparseLtDenseDescriptorInit)(const Opaque*, Opaque* matrix, int64_t rows,
                                          int64_t columns, int64_t stride, uint32_t alignment,
                                          cudaDataType, int order);
  Status (*cusparseLtStructuredDescriptorInit)(const Opaque*, Opaque* matrix, int64_t rows,
                                               int64_t columns, int64_t stride, uint32_t alignment,
                                               cudaDataType, int order, int sparsity);
  Status (*cusparseLtMatDescriptorDestroy)(const Opaque*);
  Status (*cusparseLtMatmulDescriptorInit)(const Opaque*, Opaque* product, int, int,
                                           const Opaque* a, const Opaque* b, const Opaque* c,
                                           const Opaque* d, int sums);
  Status (*cusparseLtMatmulAlgSelectionInit)(const Opaque*, Opaque* selection,
                                             const Opaque* product, int algorithm);
  Status (*cusparseLtMatmulAlgSetAttribute)(const Opaque*, Opaque* selection, int attribute,
                                            const void*, size_t);
  Status (*cusparseLtMatmulAlgGetAttribute)(const Opaque*, const Opaque* selection, int attribute,
                                            void*, size_t);
  Status (*cusparseLtMatmulGetWorkspace)(const Opaque*, const Opaque* plan, size_t* bytes);
  Status (*cusparseLtMatmulPlanInit)(const Opaque*, Opaque* plan, const Opaque* product,
                                     const Opaque* selection);
  Status (*cusparseLtMatmulPlanDestroy)(const Opaque*);
  Status (*cusparseLtMatmul)(const Opaque*, const Opaque* plan, const void* alpha, const void* a,
                             const void* b, const void* beta, const void* c, void* d,
                             void* workspace, cudaStream_t*, int32_t streams);
  Status (*cusparseLtMatmulSearch)(const Opaque*, Opaque* plan, const void* alpha, const void* a,
                                   const void* b, const void* beta, const void* c, void* d,
                                   void* workspace, cudaStream_t*, int32_t streams);
  Status (*cusparseLtSpMMACompressedSize2)(const Opaque*, const Opaque* matrix, size_t* bytes,
                                           size_t* buffer_bytes);
  Status (*cusparseLtSpMMACompress2)(const Opaque*, const Opaque* matrix, int is_a, int operation,
                                     const void* dense, void* compressed, void* buffer,
                                     cudaStream_t);
};

/// The library, loaded once and never let go; null where it isn't there, or too old.
const Cusparselt* cusparselt() {
  static const Cusparselt* const loaded = []() -> const Cusparselt* {
    void* library = dlopen("libcusparseLt.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    static Cusparselt all;
    bool found = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      found = found && function != nullptr;
    };
#define LACUNA_FIND(name) find(all.name, #name)
    LACUNA_FIND(cusparseLtInit);
    LACUNA_FIND(cusparseLtGetProperty);
    LACUNA_FIND(cusparseLtDenseDescriptorInit);
    LACUNA_FIND(cusparseLtStructuredDescriptorInit);
    LACUNA_FIND(cusparseLtMatDescriptorDestroy);
    LACUNA_FIND(cusparseLtMatmulDescriptorInit);
    LACUNA_FIND(cusparseLtMatmulAlgSelectionInit);
    LACUNA_FIND(cusparseLtMatmulAlgSetAttribute);
    LACUNA_FIND(cusparseLtMatmulAlgGetAttribute);
    LACUNA_FIND(cusparseLtMatmulGetWorkspace);
    LACUNA_FIND(cusparseLtMatmulPlanInit);
    LACUNA_FIND(cusparseLtMatmulPlanDestroy);
    LACUNA_FIND(cusparseLtMatmul);
    LACUNA_FIND(cusparseLtMatmulSearch);
    LACUNA_FIND(cusparseLtSpMMACompressedSize2);
    LACUNA_FIND(cusparseLtSpMMACompress2);
#undef LACUNA_FIND
    if (!found) return nullptr;
    int major = 0, minor = 0;
    // Numbers and signatures are those of 0.8, which later ones keep.
    if (all.cusparseLtGetProperty(MAJOR_VERSION, &major) != 0 ||
        all.cusparseLtGetProperty(MINOR_VERSION, &minor) != 0 || major != 0 || minor < 8)
      return nullptr;
    return &all;
  }();
  return loaded;
}

/// Whatever is called, one at a time: a handle and its plans are shared.
std::mutex& one_at_a_time() {
  static std::mutex mutex;
  return mutex;
}

int device_here() {
  int device = 0;
  cudaGetDevice(&device);
  return device;
}

/// The current device's handle, made when it is first asked for; null where that fails.
const Opaque* handle_here() {
  static std::map<int, std::unique_ptr<Opaque>> handles;
  auto& handle = handles[device_here()];
  if (handle == nullptr) {
    handle = std::make_unique<Opaque>();
    if (cusparselt()->cusparseLtInit(handle.get()) != 0) handle.reset();
  }
  return handle.get();
}

constexpr float kOne = 1, kNone = 0;

struct Shape {
  int64_t n, k;
  auto operator<=>(const Shape&) const = default;
};

/// W to the library.
Status describe(const Opaque* handle, const Shape& shape, Opaque* w) {
  return cusparselt()->cusparseLtStructuredDescriptorInit(
      handle, w, shape.n, shape.k, shape.k, kAlignment, CUDA_R_16BF, kRowMajor, kHalfOfEachFour);
}

/// One number of tokens, a multiple of kStep, ready to run.
struct Ready {
  Opaque w, x, y, product, selection, plan;
  size_t workspace_bytes = 0;

  /// @param config  the algorithm that a search has found, or null
  bool make(const Opaque* handle, const Shape& shape, int64_t tokens, const int* config) {
    const Cusparselt& lt = *cusparselt();
    return describe(handle, shape, &w) == 0 &&
           lt.cusparseLtDenseDescriptorInit(handle, &x, tokens, shape.k, shape.k, kAlignment,
                                            CUDA_R_16BF, kRowMajor) == 0 &&
           lt.cusparseLtDenseDescriptorInit(handle, &y, shape.n, tokens, shape.n, kAlignment,
                                            CUDA_R_16BF, kColumnMajor) == 0 &&
           lt.cusparseLtMatmulDescriptorInit(handle, &product, kNotTransposed, kTransposed, &w, &x,
                                             &y, &y, kSumsInFloat) == 0 &&
           lt.cusparseLtMatmulAlgSelectionInit(handle, &selection, &product, kDefault) == 0 &&
           (config == nullptr || lt.cusparseLtMatmulAlgSetAttribute(handle, &selection, kConfigId,
                                                                    config, sizeof *config) == 0) &&
           lt.cusparseLtMatmulPlanInit(handle, &plan, &product, &selection) == 0 &&
           lt.cusparseLtMatmulGetWorkspace(handle, &plan, &workspace_bytes) == 0;
  }
};

/// Device memory for the length of a search.
struct Memory {
  void* at = nullptr;
  explicit Memory(size_t bytes) {
    if (cudaMalloc(&at, std::max<size_t>(bytes, 256)) != cudaSuccess) {
      cudaGetLastError();
      at = nullptr;
    } else {
      cudaMemset(at, 0x44, bytes);  // as places: the first two of every four
    }
  }
  ~Memory() { cudaFree(at); }
  Memory(const Memory&) = delete;
};

/// The library's fastest algorithm for so many tokens, tried on made-up numbers; its default where
/// there is no memory to try.
int searched(const Opaque* handle, const Shape& shape, int64_t tokens) {
  const Cusparselt& lt = *cusparselt();
  const auto trial = std::make_unique<Ready>();
  int config = 0;
  if (!trial->make(handle, shape, tokens, nullptr)) return config;
  size_t packed_bytes = 0, buffer_bytes = 0;
  lt.cusparseLtSpMMACompressedSize2(handle, &trial->w, &packed_bytes, &buffer_bytes);
  constexpr size_t kRoom = 64 << 20;  // of workspace for what it tries
  const Memory w(packed_bytes), x(static_cast<size_t>(tokens * shape.k) * 2),
      y(static_cast<size_t>(tokens * shape.n) * 2), room(std::max(kRoom, trial->workspace_bytes));
  cudaStream_t stream = nullptr;
  if (w.at != nullptr && x.at != nullptr && y.at != nullptr && room.at != nullptr &&
      cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking) == cudaSuccess) {
    cudaDeviceSynchronize();
    lt.cusparseLtMatmulSearch(handle, &trial->plan, &kOne, w.at, x.at, &kNone, y.at, y.at, room.at,
                              &stream, 1);
    cudaStreamDestroy(stream);
  }
  cudaGetLastError();  // whatever it has tried
  lt.cusparseLtMatmulAlgGetAttribute(handle, &trial->selection, kConfigId, &config, sizeof config);
  lt.cusparseLtMatmulPlanDestroy(&trial->plan);
  return config;
}

/// Kept for the life of the process; null where the library refuses. Locked by the caller.
const Ready* ready_for(const Shape& shape, int64_t tokens) {
  static std::map<std::tuple<int, Shape, int64_t>, std::unique_ptr<Ready>> all;
  static std::map<std::tuple<int, Shape, int64_t>, int> configs;  // by powers of two of tokens
  const Opaque* handle = handle_here();
  if (handle == nullptr) return nullptr;
  auto& ready = all[{device_here(), shape, tokens}];
  if (ready != nullptr) return ready.get();
  const auto power =
      std::min(static_cast<int64_t>(std::bit_ceil(static_cast<uint64_t>(tokens))), kMostSearched);
  const auto [config, unknown] = configs.try_emplace({device_here(), shape, power}, 0);
  if (unknown) config->second = searched(handle, shape, power);
  for (const int* algorithm :
       {static_cast<const int*>(&config->second), static_cast<const int*>(nullptr)}) {
    auto made = std::make_unique<Ready>();
    if (!made->make(handle, shape, tokens, algorithm)) continue;
    ready = std::move(made);
    break;
  }
  return ready.get();
}

// --- The packed weight ---------------------------------------------------------------------------

/// W without -0.0, which the library might take for a weight; groups of four with more than two
/// weights are counted.
__global__ void clean_kernel(const uint2* dense, int64_t groups, uint2* clean,
                             GpuPackReport* report) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= groups) return;
  const uint2 word = dense[i];
  const auto cleaned = [](unsigned pair) {
    if ((pair & 0x7fff) == 0) pair &= 0xffff0000;
    if ((pair & 0x7fff0000) == 0) pair &= 0xffff;
    return pair;
  };
  const uint2 v = make_uint2(cleaned(word.x), cleaned(word.y));
  const int kept =
      ((v.x & 0xffff) != 0) + (v.x >> 16 != 0) + ((v.y & 0xffff) != 0) + (v.y >> 16 != 0);
  if (kept > 2) {
    atomicAdd(&report->violations, 1ull);
    atomicMin(&report->first_group, static_cast<unsigned long long>(i));
  }
  clean[i] = v;
}

/// Rows first .. first + kStep - 1 of the identity, and W's columns of those from its product.
__global__ void identity_kernel(unsigned short* x, int64_t k, int64_t first, unsigned short one) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < kStep * k) x[i] = i % k == first + i / k ? one : 0;
}
__global__ void columns_kernel(const unsigned short* y, int64_t n, int64_t k, int64_t first,
                               unsigned short* dense) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < kStep * n) dense[i / kStep * k + first + i % kStep] = y[i % kStep * n + i / kStep];
}

unsigned blocks(int64_t count) { return static_cast<unsigned>((count + kThreads - 1) / kThreads); }

size_t padded(size_t bytes) { return (bytes + 255) / 256 * 256; }

struct Layout {
  Shape shape;
  size_t buffer_bytes;  // for packing, behind W without -0.0
};

size_t scratch_bytes_of(int64_t n, int64_t k) {
  return padded(static_cast<size_t>(n * k) * 2) + padded(static_cast<size_t>(n * k) / 2) + 4096;
}

int measure(const void*, int64_t n, int64_t k, void*, GpuLayout* layout, GpuStream) {
  if (cusparselt_shape_refusal(n, k, kCusparseltFromTokens) != nullptr)
    return cudaErrorInvalidValue;
  const std::lock_guard lock(one_at_a_time());
  const Opaque* handle = cusparselt() != nullptr ? handle_here() : nullptr;
  if (handle == nullptr) return cudaErrorNotSupported;
  Layout own = {{n, k}, 0};
  const auto w = std::make_unique<Opaque>();
  if (describe(handle, own.shape, w.get()) != 0 ||
      cusparselt()->cusparseLtSpMMACompressedSize2(handle, w.get(), &layout->packed_bytes,
                                                   &own.buffer_bytes) != 0 ||
      padded(static_cast<size_t>(n * k) * 2) + own.buffer_bytes > scratch_bytes_of(n, k))
    return cudaErrorNotSupported;
  cusparselt()->cusparseLtMatDescriptorDestroy(w.get());
  hold(layout, own);
  return cudaSuccess;
}

int pack(const GpuLayout* held_layout, const void* dense, const void* scratch, void* packed,
         GpuPackReport* report, GpuStream stream) {
  const Layout layout = held<Layout>(held_layout);
  const auto [n, k] = layout.shape;
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* const clean = static_cast<unsigned char*>(const_cast<void*>(scratch));
  if (const auto error =
          cudaMemsetAsync(&report->first_group, 0xff, sizeof(report->first_group), queue))
    return error;
  clean_kernel<<<blocks(n * k / 4), kThreads, 0, queue>>>(
      static_cast<const uint2*>(dense), n * k / 4, reinterpret_cast<uint2*>(clean), report);
  if (const auto error = cudaGetLastError()) return error;
  const std::lock_guard lock(one_at_a_time());
  const Opaque* handle = handle_here();
  const auto w = std::make_unique<Opaque>();
  if (handle == nullptr || describe(handle, layout.shape, w.get()) != 0 ||
      cusparselt()->cusparseLtSpMMACompress2(handle, w.get(), 1, kNotTransposed, clean, packed,
                                             clean + padded(static_cast<size_t>(n * k) * 2),
                                             queue) != 0)
    return cudaErrorUnknown;
  cusparselt()->cusparseLtMatDescriptorDestroy(w.get());
  return cudaSuccess;
}

// --- The product ---------------------------------------------------------------------------------

/// Of one launch. Workspace: x and y of the padded tokens, then the library's.
struct Call {
  int64_t whole, rest;  // tokens
  size_t y_at, library_at, bytes;
};

int plan(const GpuLayout* held_layout, int64_t tokens, GpuPlan* plan) {
  const Shape shape = held<Layout>(held_layout).shape;
  if (tokens < 1) return cudaErrorInvalidValue;
  Call call = {.whole = tokens / kStep * kStep, .rest = tokens % kStep};
  const std::lock_guard lock(one_at_a_time());
  size_t library_bytes = 0;
  for (const int64_t count : {call.whole, call.rest > 0 ? kStep : int64_t{0}}) {
    if (count == 0) continue;
    const Ready* ready = ready_for(shape, count);
    if (ready == nullptr) return cudaErrorNotSupported;
    library_bytes = std::max(library_bytes, ready->workspace_bytes);
  }
  if (call.rest > 0) {
    call.y_at = padded(static_cast<size_t>(kStep * shape.k) * 2);
    call.library_at = call.y_at + padded(static_cast<size_t>(kStep * shape.n) * 2);
  }
  call.bytes = call.library_at + library_bytes;
  hold(plan, call);
  return cudaSuccess;
}

/// Locked by the caller.
int multiply(const Shape& shape, int64_t tokens, const void* packed, const void* x, void* y,
             void* workspace, cudaStream_t stream) {
  const Ready* ready = ready_for(shape, tokens);
  if (ready == nullptr) return cudaErrorNotSupported;
  return cusparselt()->cusparseLtMatmul(handle_here(), &ready->plan, &kOne, packed, x, &kNone, y, y,
                                        workspace, &stream, 1) == 0
             ? cudaSuccess
             : cudaErrorUnknown;
}

int run(const GpuLayout* held_layout, const GpuPlan* plan, const void* packed, const void* x,
        void* y, void* workspace, int, GpuStream stream) {
  const Shape shape = held<Layout>(held_layout).shape;
  const auto call = held<Call>(plan);
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* const room = static_cast<unsigned char*>(workspace);
  const std::lock_guard lock(one_at_a_time());
  if (call.whole > 0) {
    if (const int error = multiply(shape, call.whole, packed, x, y, room + call.library_at, queue))
      return error;
  }
  if (call.rest == 0) return cudaSuccess;
  const auto bytes_of = [](int64_t tokens, int64_t width) {
    return static_cast<size_t>(tokens * width) * 2;
  };
  const size_t given = bytes_of(call.rest, shape.k);
  int error =
      cudaMemcpyAsync(room, static_cast<const unsigned char*>(x) + bytes_of(call.whole, shape.k),
                      given, cudaMemcpyDeviceToDevice, queue);
  if (error == cudaSuccess)
    error = cudaMemsetAsync(room + given, 0, bytes_of(kStep, shape.k) - given, queue);
  if (error == cudaSuccess)
    error = multiply(shape, kStep, packed, room, room + call.y_at, room + call.library_at, queue);
  if (error == cudaSuccess)
    error = cudaMemcpyAsync(static_cast<unsigned char*>(y) + bytes_of(call.whole, shape.n),
                            room + call.y_at, bytes_of(call.rest, shape.n),
                            cudaMemcpyDeviceToDevice, queue);
  return error;
}

int unpack(const GpuLayout* held_layout, const void* packed, void* dense, GpuStream stream) {
  const Shape shape = held<Layout>(held_layout).shape;
  const auto queue = static_cast<cudaStream_t>(stream);
  GpuPlan step;
  if (const int error = plan(held_layout, kStep, &step)) return error;
  const size_t x_bytes = padded(static_cast<size_t>(kStep * shape.k) * 2);
  const size_t y_bytes = padded(static_cast<size_t>(kStep * shape.n) * 2);
  void* memory = nullptr;
  if (const auto error =
          cudaMallocAsync(&memory, x_bytes + y_bytes + held<Call>(&step).bytes, queue))
    return error;
  auto* const x = static_cast<unsigned char*>(memory);
  auto* const y = x + x_bytes;
  constexpr unsigned short kOneInBf16 = 0x3f80;
  int error = cudaSuccess;
  for (int64_t first = 0; first < shape.k && error == cudaSuccess; first += kStep) {
    identity_kernel<<<blocks(kStep * shape.k), kThreads, 0, queue>>>(
        reinterpret_cast<unsigned short*>(x), shape.k, first, kOneInBf16);
    error = run(held_layout, &step, packed, x, y, y + y_bytes, 0, stream);
    columns_kernel<<<blocks(kStep * shape.n), kThreads, 0, queue>>>(
        reinterpret_cast<const unsigned short*>(y), shape.n, shape.k, first,
        static_cast<unsigned short*>(dense));
    if (error == cudaSuccess) error = cudaGetLastError();
  }
  const int freed = cudaFreeAsync(memory, queue);
  return error != cudaSuccess ? error : freed;
}

}  // namespace

bool cusparselt_is_there() { return cusparselt() != nullptr; }

const GpuLinearKernel kCusparselt = {
    .operation = "linear_nm",
    .name = "cuda_sm80_cusparselt",
    .scratch_bytes = scratch_bytes_of,
    .measure = measure,
    .pack = pack,
    .unpack = unpack,
    .max_tokens = [](const GpuLayout*) -> int64_t { return 0; },
    .many_tokens = [](const GpuLayout*) -> int64_t { return kCusparseltFromTokens; },
    .plan = plan,
    .workspace_bytes = [](const GpuLayout*, const GpuPlan* plan) -> size_t {
      return held<Call>(plan).bytes;
    },
    .run = run,
};

}  // namespace lacuna::kernels::linear_nm
