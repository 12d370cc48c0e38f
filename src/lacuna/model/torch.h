// The border between our tensors and torch's: element types, wrapping, and which device to run on.
#pragma once

#include <ATen/ATen.h>

#include <exception>
#include <optional>
#include <string>
#include <string_view>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"

namespace lacuna::model {

at::ScalarType scalar_type(DType dtype);
DType dtype_of(at::ScalarType type);

/// A torch tensor over the same bytes (read-only by convention; the bytes stay alive as long as it
/// does).
at::Tensor wrap(const Tensor& tensor);
/// A contiguous CPU copy of a torch tensor as one of ours.
Tensor unwrap(const at::Tensor& tensor);

/// Where to run and in which floating-point type.
struct Compute {
  at::Device device = at::kCPU;
  at::ScalarType dtype = at::kFloat;
  /// Whether weights in codes may multiply activations rounded to codes, one scale a token: int8
  /// and int4 weights on the CPU (to int8), fp8 and int8 weights on a GPU from some number of
  /// tokens on (to codes of their own kind, GpuWeight). Else the activations stay as they
  /// are, and the CPU expands such weights.
  bool int8_activations = true;
  /// Whether a sparse weight on a GPU may be kept in several forms, a dense one among them, so that
  /// every number of tokens takes the fastest (FastestWeight).
  bool fastest = false;
  /// Sequences that are decoded at once: the tokens that a GPU's kernel is chosen for.
  int64_t batch = 1;
};

/// A tensor over raw memory of the device, in the type of the computation.
at::Tensor device_view(const void* data, at::IntArrayRef shape, const Compute& compute);

/// "cpu", "cuda" or "auto" (CUDA when libtorch_cuda loads and finds a GPU, else CPU). libtorch_cuda
/// is loaded here and only here. @errors kNotPossible: "cuda" without GPU or libtorch_cuda (says
/// which); kUsage: another word
Result<at::Device> open_device(std::string_view name);

/// torch's current stream on a GPU, a cudaStream_t.
void* gpu_stream(at::Device device);

/// Why the kernels of liblacuna_cuda.so can't run here (not there, or a GPU below compute
/// capability 8.0), or nothing.
std::optional<std::string> gpu_library_refusal();

/// What an exception says; of torch's own without the backtrace, which helps nobody who runs a
/// tool.
std::string what(const std::exception& error);

/// Sets torch's thread count (0 = all cores this process may use) and float32 products without
/// TF32.
void set_threads(int threads);
/// Chunks on torch's own pool.
Executor torch_executor();
/// Who cuts up work on a device: torch_executor() on a CPU; a GPU is asked by one thread.
Executor executor_for(at::Device device);

}  // namespace lacuna::model
