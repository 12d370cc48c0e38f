#include "lacuna/model/torch.h"

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cstring>

namespace lacuna::model {
namespace {

struct Pair {
  DType ours;
  at::ScalarType theirs;
};

constexpr Pair kTypes[] = {
    {DType::kF32, at::kFloat},
    {DType::kF16, at::kHalf},
    {DType::kBF16, at::kBFloat16},
    {DType::kF8E4M3, at::kFloat8_e4m3fn},
    {DType::kF8E5M2, at::kFloat8_e5m2},
    {DType::kI8, at::kChar},
    {DType::kU8, at::kByte},
    {DType::kI16, at::kShort},
    {DType::kI32, at::kInt},
    {DType::kU32, at::kUInt32},
    {DType::kI64, at::kLong},
    {DType::kF64, at::kDouble},
    {DType::kBool, at::kBool},
};

}  // namespace

at::ScalarType scalar_type(DType dtype) {
  for (const Pair& pair : kTypes)
    if (pair.ours == dtype) return pair.theirs;
  TORCH_CHECK(false, "scalar_type: unknown element type");
}

DType dtype_of(at::ScalarType type) {
  for (const Pair& pair : kTypes)
    if (pair.theirs == type) return pair.ours;
  TORCH_CHECK(false, "dtype_of: no element type of ours for ", type);
}

at::Tensor wrap(const Tensor& tensor) {
  const auto options = at::TensorOptions().dtype(scalar_type(tensor.dtype));
  const auto* data = tensor.bytes.data();
  const bool aligned = reinterpret_cast<uintptr_t>(data) % size_bytes(tensor.dtype) == 0;
  if (tensor.bytes.empty() || !aligned) {  // a file promises no alignment; torch's kernels need it
    at::Tensor copy = at::empty(tensor.shape, options);
    if (!tensor.bytes.empty()) std::memcpy(copy.data_ptr(), data, tensor.bytes.size());
    return copy;
  }
  return at::from_blob(
      const_cast<std::byte*>(data), tensor.shape, [bytes = tensor.bytes](void*) {}, options);
}

Tensor unwrap(const at::Tensor& tensor) {
  auto held = std::make_shared<at::Tensor>(
      tensor.detach()
          .to(at::kCPU, tensor.scalar_type(), /*non_blocking=*/false, /*copy=*/true)
          .contiguous());
  const auto* data = static_cast<const std::byte*>(held->const_data_ptr());
  const size_t bytes = held->nbytes();
  return {dtype_of(held->scalar_type()), held->sizes().vec(), Bytes(held, data, bytes)};
}

at::Tensor device_view(const void* data, at::IntArrayRef shape, const Compute& compute) {
  const auto options = at::TensorOptions().device(compute.device).dtype(compute.dtype);
  return at::for_blob(const_cast<void*>(data), shape)
      .options(options)
      .target_device(compute.device)
      .make_tensor();
}

std::string what(const std::exception& error) {
  const auto* torch = dynamic_cast<const c10::Error*>(&error);
  return torch != nullptr ? torch->what_without_backtrace() : error.what();
}

Executor executor_for(at::Device device) {
  return device.is_cpu() ? torch_executor() : Executor::serial();
}

Executor torch_executor() {
  // torch's pool is libgomp's. We enter it through libgomp's own entry point in the copy that torch
  // has loaded: compiling with -fopenmp could link a second one, and two pools fight for the cores.
  using Parallel = void (*)(void (*)(void*), void*, unsigned threads, unsigned flags);
  static const auto parallel = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  Executor executor;
  executor.threads = at::get_num_threads();
  if (parallel == nullptr || at::in_parallel_region()) executor.threads = 1;
  executor.run = [](void*, int64_t chunks, Executor::Task task, void* context) {
    struct Job {
      std::atomic<int64_t> next = 0;
      int64_t chunks;
      Executor::Task task;
      void* context;
    } job{{}, chunks, task, context};
    const auto work = [](void* self) {
      auto& mine = *static_cast<Job*>(self);
      for (int64_t i; (i = mine.next.fetch_add(1, std::memory_order_relaxed)) < mine.chunks;)
        mine.task(mine.context, i);
    };
    const int64_t threads = std::min<int64_t>(chunks, at::get_num_threads());
    parallel(work, &job, static_cast<unsigned>(threads), 0);
  };
  return executor;
}

}  // namespace lacuna::model
