// The candidates of linear_bitmap, special to general, the reference last.
#include "lacuna/kernels/linear_bitmap/cpu.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_coded_limits.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap_limits.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_scatter_limits.h"
#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::linear_bitmap {
namespace {

Support right_pattern(const Problem& problem) {
  return needs(problem.pattern.kind == format::PatternKind::kUnstructured,
               "an unstructured pattern");
}

Support any_cpu(const Problem& problem, const Device& device) {
  return Support::all({supports_rows_or_fp8(problem, device), right_pattern(problem)});
}

Support amx_tiled(const Problem& problem, const Device& device) {
  return Support::all({tiled::supports_amx_expansion(problem, device), right_pattern(problem)});
}

Support many(const Problem& problem, const Device& device) {
  return Support::all({tiled::supports_float(problem, device), right_pattern(problem)});
}
Support avx512_many(const Problem& problem, const Device& device) {
  return Support::all({many(problem, device), needs_vbmi2(device)});
}
Support avx2_many(const Problem& problem, const Device& device) {
  return Support::all({many(problem, device), needs_avx2(device)});
}

/// Up to two tokens, float32 sums take no longer (the memory decides) and keep denormals.
Support dot(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), supports_bf16_dot(problem, device),
                       needs(problem.tokens >= 3, "3 tokens or more")});
}

Support avx512(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_vbmi2(device)});
}

Support avx2(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_avx2_f16c(device)});
}

Support hopper(const Problem& problem, const Device& device, DType type, const char* shape_refusal,
               const Support& zeros) {
  return Support::all(
      {needs(problem.pattern.kind == format::PatternKind::kUnstructured, "an unstructured pattern"),
       supports_numbers(problem, type), zeros,
       shape_refusal != nullptr ? Support::no("{}", shape_refusal) : Support::yes(),
       supports_gpu_kernel(device, 9, 0)});
}

/// A value and its gap take 16 or 17 bits.
Support gap(const Problem& problem, const Device& device) {
  return hopper(problem, device, DType::kBF16,
                gap_shape_refusal(problem.outputs, problem.inputs, problem.tokens),
                needs(problem.sparsity >= 0.4, "40 % zeros or more"));
}

/// A value and its place in a window take 20 bits, but the x of several tokens is gathered sooner.
Support window(const Problem& problem, const Device& device) {
  return Support::all(
      {needs(problem.tokens >= 3, "3 tokens or more"),
       hopper(problem, device, DType::kBF16,
              window_shape_refusal(problem.outputs, problem.inputs, problem.tokens),
              problem.tokens <= 4
                  ? needs(problem.sparsity >= 0.4, "40 % zeros or more")
                  : needs(problem.sparsity >= 0.72, "72 % zeros or more from 5 tokens on"))});
}

/// 12 bits a weight at 50 % zeros, of 16. From 33 tokens on it is slower than a dense product, but
/// not than one of an expanded weight.
template <DType kType>
Support scatter(const Problem& problem, const Device& device) {
  return hopper(problem, device, kType,
                scatter_shape_refusal(problem.outputs, problem.inputs, problem.tokens),
                needs(problem.sparsity >= 0.45, "45 % zeros or more"));
}

/// A code and its gap take 11 or 12 bits.
template <Values kValues>
Support gap_of_codes(const Problem& problem, const Device& device) {
  const char* shape = gap_codes_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all(
      {needs(problem.pattern.kind == format::PatternKind::kUnstructured, "an unstructured pattern"),
       needs(problem.values == kValues && problem.activations == DType::kBF16,
             fmt::format("{} values and bf16 activations", text(kValues))),
       needs(problem.sparsity >= 0.45, "45 % zeros or more"),
       shape != nullptr ? Support::no("{}", shape) : Support::yes(),
       supports_gpu_kernel(device, 9, 0)});
}

/// Codes with one scale a row. The alternative is their expansion, of 16 bits a weight: never
/// fewer.
template <Values kValues>
Support coded(const Problem& problem, const Device& device) {
  const char* shape = coded_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all(
      {needs(problem.pattern.kind == format::PatternKind::kUnstructured, "an unstructured pattern"),
       needs(problem.values == kValues && problem.activations == DType::kBF16,
             fmt::format("{} values and bf16 activations", text(kValues))),
       shape != nullptr ? Support::no("{}", shape) : Support::yes(),
       supports_gpu_kernel(device, 9, 0)});
}

}  // namespace

LinearCandidates& candidates() {
  static LinearCandidates list {
#if defined(__x86_64__)
    tiled::candidate<tiled::run_amx_dot>("cpu_amx_tiled_dot", amx_tiled),
        row_candidate<kAvx512ExpandDot>("cpu_avx512_expand_dot", dot),
        row_candidate<kAvx512ExpandFma>("cpu_avx512_expand_fma", avx512),
        row_candidate<kAvx2Shuffle>("cpu_avx2_shuffle", avx2),
        tiled::float_candidate<tiled::run_avx512_fma>("cpu_avx512_tiled_fma", avx512_many),
        tiled::float_candidate<tiled::run_avx2_fma>("cpu_avx2_tiled_fma", avx2_many),
#endif
        row_candidate<kPortable>("cpu_portable", any_cpu),
        tiled::float_candidate<tiled::run_portable>("cpu_portable_tiled", many),
        reference_candidate(any_cpu)
  };
  return list;
}

GpuCandidates& gpu_candidates() {
  static GpuCandidates list{
      {"cuda_sm90_window", window},
      {"cuda_sm90_gap", gap},
      {"cuda_sm90_scatter", scatter<DType::kBF16>},
      {"cuda_sm90_scatter_f16", scatter<DType::kF16>},
      {"cuda_sm90_gap_fp8", gap_of_codes<Values::kFP8>},
      {"cuda_sm90_gap_int8", gap_of_codes<Values::kInt8>},
      {"cuda_sm90_fp8", coded<Values::kFP8>},
      {"cuda_sm90_int8", coded<Values::kInt8>},
      {kExpandCublas, supports_dense_product<format::PatternKind::kUnstructured>}};
  return list;
}

}  // namespace lacuna::kernels::linear_bitmap
