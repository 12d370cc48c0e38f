// CSR through cuSPARSE. The library is loaded when it is first asked for, so that liblacuna_cuda.so
// needs none to be loaded; what is called of it is declared here, so that compiling needs none of
// its headers either.
#include "lacuna/kernels/linear_csr/cuda_sm80_cusparse.h"

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <cstddef>
#include <map>
#include <mutex>

namespace lacuna::kernels::linear_csr {
namespace {

constexpr int kThreads = 256;

// --- cuSPARSE (https://docs.nvidia.com/cuda/cusparse) --------------------------------------------

using Handle = void*;
using Matrix = void*;  // descriptors
using Vector = void*;
using Status = int;  // 0 is success
constexpr int kNotTransposed = 0, kIndex32 = 2, kZeroBased = 0, kColumnMajor = 1;
constexpr int kSpmvCsr2 = 3, kSpmmCsr3 = 12;

struct Cusparse {
  Status (*cusparseCreate)(Handle*);
  Status (*cusparseSetStream)(Handle, cudaStream_t);
  Status (*cusparseCreateCsr)(Matrix*, int64_t rows, int64_t columns, int64_t count, void* offsets,
                              void* column_indices, void* values, int offset_type, int index_type,
                              int base, cudaDataType);
  Status (*cusparseDestroySpMat)(Matrix);
  Status (*cusparseCreateDnVec)(Vector*, int64_t size, void*, cudaDataType);
  Status (*cusparseDestroyDnVec)(Vector);
  Status (*cusparseCreateDnMat)(Matrix*, int64_t rows, int64_t columns, int64_t stride, void*,
                                cudaDataType, int order);
  Status (*cusparseDestroyDnMat)(Matrix);
  Status (*cusparseSpMV_bufferSize)(Handle, int, const void* alpha, Matrix, Vector x,
                                    const void* beta, Vector y, cudaDataType, int algorithm,
                                    size_t*);
  Status (*cusparseSpMV)(Handle, int, const void* alpha, Matrix, Vector x, const void* beta,
                         Vector y, cudaDataType, int algorithm, void* buffer);
  Status (*cusparseSpMM_bufferSize)(Handle, int, int, const void* alpha, Matrix, Matrix x,
                                    const void* beta, Matrix y, cudaDataType, int algorithm,
                                    size_t*);
  Status (*cusparseSpMM)(Handle, int, int, const void* alpha, Matrix, Matrix x, const void* beta,
                         Matrix y, cudaDataType, int algorithm, void* buffer);
};

/// The library, loaded once and never let go; null where it isn't there.
const Cusparse* cusparse() {
  static const Cusparse* const loaded = []() -> const Cusparse* {
    void* library = dlopen("libcusparse.so.12", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    static Cusparse all;
    bool found = true;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::decay_t<decltype(function)>>(dlsym(library, name));
      found = found && function != nullptr;
    };
#define LACUNA_FIND(name) find(all.name, #name)
    LACUNA_FIND(cusparseCreate);
    LACUNA_FIND(cusparseSetStream);
    LACUNA_FIND(cusparseCreateCsr);
    LACUNA_FIND(cusparseDestroySpMat);
    LACUNA_FIND(cusparseCreateDnVec);
    LACUNA_FIND(cusparseDestroyDnVec);
    LACUNA_FIND(cusparseCreateDnMat);
    LACUNA_FIND(cusparseDestroyDnMat);
    LACUNA_FIND(cusparseSpMV_bufferSize);
    LACUNA_FIND(cusparseSpMV);
    LACUNA_FIND(cusparseSpMM_bufferSize);
    LACUNA_FIND(cusparseSpMM);
#undef LACUNA_FIND
    return found ? &all : nullptr;
  }();
  return loaded;
}

/// The current device's handle, made when it is first asked for.
Handle handle_here(const Cusparse& library) {
  static std::map<int, Handle> handles;
  int device = 0;
  cudaGetDevice(&device);
  Handle& handle = handles[device];
  if (handle == nullptr) library.cusparseCreate(&handle);
  return handle;
}

/// One at a time: a handle has one stream.
std::mutex& one_at_a_time() {
  static std::mutex mutex;
  return mutex;
}

// --- The packed weight ---------------------------------------------------------------------------

struct Layout {
  int64_t n, k, count;  // of non-zeros
  int64_t columns_at, values_at;
};

int64_t padded(int64_t bytes) { return (bytes + 255) / 256 * 256; }

/// -0.0 counts as zero.
__device__ bool is_zero(__nv_bfloat16 v) { return (__bfloat16_as_ushort(v) & 0x7fff) == 0; }

/// The non-zeros of each row, at offsets[row + 1]; a block a row.
__global__ void count_kernel(const __nv_bfloat16* w, int64_t k, int32_t* offsets) {
  __shared__ int total;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  int own = 0;
  for (int64_t i = threadIdx.x; i < k; i += kThreads) own += !is_zero(w[blockIdx.x * k + i]);
  atomicAdd(&total, own);  // of whole numbers: any order gives the same
  __syncthreads();
  if (threadIdx.x == 0) offsets[blockIdx.x + 1] = total;
}

/// Counts become offsets; one block.
__global__ void sum_kernel(int32_t* offsets, int64_t n) {
  __shared__ int32_t parts[kThreads];
  const int64_t each = (n + kThreads - 1) / kThreads;
  const int64_t first = threadIdx.x * each, last = min(first + each, n);
  int32_t sum = 0;
  for (int64_t row = first; row < last; ++row) sum += offsets[row + 1];
  parts[threadIdx.x] = sum;
  __syncthreads();
  int32_t before = 0;
  for (int i = 0; i < static_cast<int>(threadIdx.x); ++i) before += parts[i];
  for (int64_t row = first; row < last; ++row) offsets[row + 1] = before += offsets[row + 1];
  if (threadIdx.x == 0) offsets[0] = 0;
}

/// A warp a row, its non-zeros in the order of the columns.
__global__ void write_kernel(const __nv_bfloat16* w, int64_t n, int64_t k, const int32_t* offsets,
                             int32_t* columns, __nv_bfloat16* values) {
  const int64_t row = blockIdx.x * (kThreads / 32) + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= n) return;
  int64_t at = offsets[row];
  for (int64_t first = 0; first < k; first += 32) {
    const int64_t column = first + lane;
    const __nv_bfloat16 v = column < k ? w[row * k + column] : __nv_bfloat16();
    const bool kept = column < k && !is_zero(v);
    const unsigned all = __ballot_sync(~0u, kept);
    if (kept) {
      const int64_t to = at + __popc(all & ((1u << lane) - 1));
      columns[to] = static_cast<int32_t>(column);
      values[to] = v;
    }
    at += __popc(all);
  }
}

__global__ void unpack_kernel(const int32_t* offsets, const int32_t* columns,
                              const __nv_bfloat16* values, int64_t k, __nv_bfloat16* w) {
  for (int32_t i = offsets[blockIdx.x] + threadIdx.x; i < offsets[blockIdx.x + 1]; i += kThreads)
    w[blockIdx.x * k + columns[i]] = values[i];
}

__global__ void round_kernel(const float* sums, __nv_bfloat16* y, int64_t count) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) y[i] = __float2bfloat16_rn(sums[i]);
}

unsigned blocks(int64_t count, int64_t each) {
  return static_cast<unsigned>((count + each - 1) / each);
}

struct Parts {
  int32_t *offsets, *columns;
  __nv_bfloat16* values;
};
Parts parts_of(const Layout& layout, const void* packed) {
  auto* base = static_cast<char*>(const_cast<void*>(packed));
  return {reinterpret_cast<int32_t*>(base), reinterpret_cast<int32_t*>(base + layout.columns_at),
          reinterpret_cast<__nv_bfloat16*>(base + layout.values_at)};
}

int measure(const void* dense, int64_t n, int64_t k, void* scratch, GpuLayout* layout,
            GpuStream stream) {
  if (cusparse_shape_refusal(n, k, 1) != nullptr) return cudaErrorInvalidValue;
  if (cusparse() == nullptr) return cudaErrorNotSupported;
  const auto queue = static_cast<cudaStream_t>(stream);
  auto* offsets = static_cast<int32_t*>(scratch);
  count_kernel<<<static_cast<unsigned>(n), kThreads, 0, queue>>>(
      static_cast<const __nv_bfloat16*>(dense), k, offsets);
  sum_kernel<<<1, kThreads, 0, queue>>>(offsets, n);
  int32_t count = 0;
  if (const auto error =
          cudaMemcpyAsync(&count, offsets + n, sizeof(count), cudaMemcpyDeviceToHost, queue))
    return error;
  if (const auto error = cudaStreamSynchronize(queue)) return error;
  Layout own = {.n = n, .k = k, .count = count};
  own.columns_at = padded((n + 1) * 4);
  own.values_at = own.columns_at + padded(std::max(int64_t{count}, int64_t{1}) * 4);
  layout->packed_bytes =
      static_cast<size_t>(own.values_at + std::max(int64_t{count}, int64_t{1}) * 2);
  hold(layout, own);
  return cudaGetLastError();
}

int pack(const GpuLayout* held_layout, const void* dense, const void* scratch, void* packed,
         GpuPackReport*, GpuStream stream) {
  const auto layout = held<Layout>(held_layout);
  const auto queue = static_cast<cudaStream_t>(stream);
  const Parts to = parts_of(layout, packed);
  if (const auto error = cudaMemcpyAsync(to.offsets, scratch, (layout.n + 1) * sizeof(int32_t),
                                         cudaMemcpyDeviceToDevice, queue))
    return error;
  write_kernel<<<blocks(layout.n, kThreads / 32), kThreads, 0, queue>>>(
      static_cast<const __nv_bfloat16*>(dense), layout.n, layout.k, to.offsets, to.columns,
      to.values);
  return cudaGetLastError();
}

int unpack(const GpuLayout* held_layout, const void* packed, void* dense, GpuStream stream) {
  const auto layout = held<Layout>(held_layout);
  const auto queue = static_cast<cudaStream_t>(stream);
  const Parts from = parts_of(layout, packed);
  if (const auto error = cudaMemsetAsync(dense, 0, layout.n * layout.k * 2, queue)) return error;
  unpack_kernel<<<static_cast<unsigned>(layout.n), kThreads, 0, queue>>>(
      from.offsets, from.columns, from.values, layout.k, static_cast<__nv_bfloat16*>(dense));
  return cudaGetLastError();
}

// --- The product ---------------------------------------------------------------------------------

/// W, x and y as cuSPARSE wants them: y^T = W · x^T, and row-major [T,K] is column-major [K,T].
class Product {
 public:
  Product(const Cusparse& library, const Layout& layout, const void* packed, const void* x,
          void* sums, int64_t tokens)
      : library_(library), one_token_(tokens == 1) {
    const Parts w = parts_of(layout, packed);
    auto* in = const_cast<void*>(x);
    note(library.cusparseCreateCsr(&w_, layout.n, layout.k, layout.count, w.offsets, w.columns,
                                   w.values, kIndex32, kIndex32, kZeroBased, CUDA_R_16BF));
    if (one_token_) {
      note(library.cusparseCreateDnVec(&x_, layout.k, in, CUDA_R_16BF));
      note(library.cusparseCreateDnVec(&y_, layout.n, sums, CUDA_R_32F));
    } else {
      note(library.cusparseCreateDnMat(&x_, layout.k, tokens, layout.k, in, CUDA_R_16BF,
                                       kColumnMajor));
      note(library.cusparseCreateDnMat(&y_, layout.n, tokens, layout.n, sums, CUDA_R_32F,
                                       kColumnMajor));
    }
  }
  Product(const Product&) = delete;
  ~Product() {
    const auto destroy = one_token_ ? library_.cusparseDestroyDnVec : library_.cusparseDestroyDnMat;
    if (y_ != nullptr) destroy(y_);
    if (x_ != nullptr) destroy(x_);
    if (w_ != nullptr) library_.cusparseDestroySpMat(w_);
  }
  bool buffer_bytes(Handle handle, size_t* bytes) {
    return ok_ && 0 == (one_token_ ? library_.cusparseSpMV_bufferSize(handle, kNotTransposed, &kOne,
                                                                      w_, x_, &kNone, y_,
                                                                      CUDA_R_32F, kSpmvCsr2, bytes)
                                   : library_.cusparseSpMM_bufferSize(
                                         handle, kNotTransposed, kNotTransposed, &kOne, w_, x_,
                                         &kNone, y_, CUDA_R_32F, kSpmmCsr3, bytes));
  }
  bool run(Handle handle, void* buffer) {
    return ok_ &&
           0 == (one_token_
                     ? library_.cusparseSpMV(handle, kNotTransposed, &kOne, w_, x_, &kNone, y_,
                                             CUDA_R_32F, kSpmvCsr2, buffer)
                     : library_.cusparseSpMM(handle, kNotTransposed, kNotTransposed, &kOne, w_, x_,
                                             &kNone, y_, CUDA_R_32F, kSpmmCsr3, buffer));
  }

 private:
  static constexpr float kOne = 1, kNone = 0;
  void note(Status status) { ok_ = ok_ && status == 0; }
  const Cusparse& library_;
  const bool one_token_;
  bool ok_ = true;
  Matrix w_ = nullptr, x_ = nullptr, y_ = nullptr;
};

/// Of one launch: float32 sums come first in the workspace, then what cuSPARSE wants.
struct Call {
  int64_t tokens, buffer_at;
  size_t buffer_bytes;
};

int plan(const GpuLayout* held_layout, int64_t tokens, GpuPlan* plan) {
  const auto layout = held<Layout>(held_layout);
  if (cusparse_shape_refusal(layout.n, layout.k, tokens) != nullptr) return cudaErrorInvalidValue;
  Call call = {.tokens = tokens, .buffer_at = padded(tokens * layout.n * 4), .buffer_bytes = 0};
  if (layout.count > 0) {
    const std::lock_guard lock(one_at_a_time());
    // How much it wants depends on sizes; of the pointers it only asks that there are some.
    void* const somewhere = reinterpret_cast<void*>(256);
    Product product(*cusparse(), layout, somewhere, somewhere, somewhere, tokens);
    if (!product.buffer_bytes(handle_here(*cusparse()), &call.buffer_bytes))
      return cudaErrorNotSupported;
  }
  hold(plan, call);
  return cudaSuccess;
}

int run(const GpuLayout* held_layout, const GpuPlan* plan, const void* packed, const void* x,
        void* y, void* workspace, int, GpuStream stream) {
  const auto layout = held<Layout>(held_layout);
  const auto call = held<Call>(plan);
  const auto queue = static_cast<cudaStream_t>(stream);
  const int64_t count = call.tokens * layout.n;
  if (layout.count == 0) return cudaMemsetAsync(y, 0, count * 2, queue);
  {
    const std::lock_guard lock(one_at_a_time());
    const Handle handle = handle_here(*cusparse());
    Product product(*cusparse(), layout, packed, x, workspace, call.tokens);
    if (cusparse()->cusparseSetStream(handle, queue) != 0 ||
        !product.run(handle, static_cast<char*>(workspace) + call.buffer_at)) {
      const cudaError_t error = cudaGetLastError();
      return error != cudaSuccess ? error : cudaErrorNotSupported;
    }
  }
  round_kernel<<<blocks(count, kThreads), kThreads, 0, queue>>>(
      static_cast<const float*>(workspace), static_cast<__nv_bfloat16*>(y), count);
  return cudaGetLastError();
}

}  // namespace

bool cusparse_is_there() { return cusparse() != nullptr; }

const GpuLinearKernel kCusparse = {
    .operation = "linear_csr",
    .name = "cuda_sm80_cusparse",
    .scratch_bytes = [](int64_t n, int64_t) -> size_t { return (n + 1) * sizeof(int32_t); },
    .measure = measure,
    .pack = pack,
    .unpack = unpack,
    .max_tokens = [](const GpuLayout*) -> int64_t { return 64; },
    .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
    .plan = plan,
    .workspace_bytes = [](const GpuLayout*, const GpuPlan* plan) -> size_t {
      const auto call = held<Call>(plan);
      return static_cast<size_t>(call.buffer_at) + call.buffer_bytes;
    },
    .run = run,
};

}  // namespace lacuna::kernels::linear_csr
