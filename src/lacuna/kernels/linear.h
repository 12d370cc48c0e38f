// The linear operations, found by the pattern of their weight or by their name.
#pragma once

#include <array>
#include <string_view>
#include <vector>

#include "lacuna/format/pattern.h"
#include "lacuna/kernels/gpu_linear.h"

namespace lacuna::kernels {

/// One of the folders linear_*; each of its headers says what the functions do.
struct LinearOperation {
  std::string_view name;
  format::PatternKind weight;  ///< the first it multiplies: linear_stream takes KEEP:OF too
  Result<LinearPlan> (*plan)(const Problem& problem, const Device& device) = nullptr;
  std::vector<Explanation> (*explain)(const Problem& problem, const Device& device) = nullptr;
  LinearCandidates& (*candidates)() = nullptr;
  GpuCandidates& (*gpu_candidates)() = nullptr;
};

const std::array<LinearOperation, 6>& linear_operations();
/// The first operation that multiplies such a weight; there is one for every pattern.
const LinearOperation* linear_operation(format::PatternKind weight);

/// From 85 % zeros on (rows round their share) an unstructured weight is multiplied by its
/// non-zeros: 1.3 times as fast as by its slots at one token, more at more
/// (bench/lab/cpu_high_sparsity). It takes 6 % more memory there, no more from 87.5 % on.
inline constexpr double kLeastCsrSparsity = 0.845;
/// The operation for a weight in host memory, by what is fastest at one token: for unstructured
/// values (no codes) with kLeastCsrSparsity zeros or more linear_csr; for other unstructured or
/// KEEP:OF values of bf16 linear_stream, where AVX-512 has its expansion; else
/// linear_operation(). LACUNA_FORCE goes first: where it pins a candidate of one of those that
/// multiply such a weight, that one it is (of several the first here).
const LinearOperation* linear_operation_on_cpu(const Problem& problem,
                                               const Device& cpu = Device::this_cpu());
/// The operation for a weight on a GPU: linear_operation(), unless LACUNA_FORCE pins a candidate of
/// linear_csr for an unstructured one. cuSPARSE has lost to the kernels of linear_bitmap at every
/// share of zeros that was measured (docs/results/h200.md), so it is never chosen otherwise.
const LinearOperation* linear_operation_on_gpu(const Problem& problem,
                                               const Device& gpu = Device::this_gpu());
/// Every candidate for a problem of an operation, with its answer: those of the GPU for a GPU, else
/// those that walk rows, or those of linear_coded where the values are int8 or int4.
std::vector<Explanation> explain_linear(const LinearOperation& operation, const Problem& problem,
                                        const Device& device);
/// The library's kernel for a problem on a GPU, or null where the dense product takes it.
/// @errors kUsage: LACUNA_FORCE names an unknown candidate; kNotPossible: nothing there can do it
Result<const GpuLinearKernel*> choose_gpu_kernel(const LinearOperation& operation,
                                                 const Problem& problem, const Device& device);
/// The operation of this name. @errors kUsage: there is none (the known ones are listed)
Result<const LinearOperation*> find_linear_operation(std::string_view name);

/// Whether LACUNA_FORCE says what it means: OPERATION:CANDIDATE[,...] of known names. An unknown
/// one would otherwise be noticed only where that operation is planned, or never.
/// @errors kUsage: the name, and those that are known
Status check_forced();

}  // namespace lacuna::kernels
