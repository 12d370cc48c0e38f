// The kernels of liblacuna_cuda.so: loading it, and what every candidate on a GPU asks for.
#pragma once

#include <filesystem>

#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/select.h"

namespace lacuna::kernels {

/// The candidates of one operation on a GPU, special to general. One that names a kernel of the
/// library runs it; kExpandCublas and kCublas stand for torch's dense product, which the model tier
/// calls.
using GpuCandidates = CandidateList<Candidate>;
/// The last of every list of a sparse weight: expand it into a scratch, then the dense product.
inline constexpr const char* kExpandCublas = "cuda_expand_cublas";
/// The last of the list of a dense weight.
inline constexpr const char* kCublas = "cuda_cublas";

/// Loads a liblacuna_cuda.so for the life of the program. It needs no GPU to be loaded.
/// @errors kNotPossible: not there, not loadable, or built with another interface
Result<const GpuTable*> open_gpu_library(const std::filesystem::path& file);
/// The one that this program uses: $LACUNA_CUDA_LIBRARY, else liblacuna_cuda.so beside the program.
/// Opened once; the error remembers why there is none.
const Result<const GpuTable*>& gpu_library();
/// The library's kernel of this name, or null.
const GpuLinearKernel* gpu_kernel(std::string_view operation, std::string_view candidate);

/// A GPU that answers.
Support supports_gpu(const Device& device);
/// supports_gpu(), this compute capability exactly, and a library to take the kernel from.
Support supports_gpu_kernel(const Device& device, int major, int minor);
/// supports_gpu(), compute capability 8.0 or later, and a library to take the kernel from.
Support supports_gpu_kernel(const Device& device);
/// Values and activations of this type.
Support supports_numbers(const Problem& problem, DType type);
/// What kExpandCublas and kCublas ask for: a GPU and a weight of this pattern, whatever its values.
template <format::PatternKind kKind>
Support supports_dense_product(const Problem& problem, const Device& device) {
  return Support::all(
      {needs(problem.pattern.kind == kKind, "the operation's own pattern"), supports_gpu(device)});
}

}  // namespace lacuna::kernels
