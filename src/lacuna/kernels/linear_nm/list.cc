// The candidates of linear_nm, special to general, the reference last.
#include "lacuna/kernels/cuda/sm90_coded_limits.h"
#include "lacuna/kernels/linear_nm/cpu.h"
#include "lacuna/kernels/linear_nm/cuda_sm80_cusparselt_limits.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp_limits.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"
#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::linear_nm {
namespace {

Support right_pattern(const Problem& problem) {
  return needs(problem.pattern.kind == format::PatternKind::kKeepOf, "a KEEP:OF pattern");
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

/// The same number of values in every 16 (or 8) columns.
template <int kColumns, Support (*kOtherwise)(const Problem&, const Device&)>
Support fixed(const Problem& problem, const Device& device) {
  const Support otherwise = kOtherwise(problem, device);
  if (!otherwise) return otherwise;
  return needs(kColumns % problem.pattern.of == 0,
               kColumns == 16 ? "an OF that divides 16" : "an OF that divides 8");
}

/// 2:4 in this type, as mma.sp takes it, on what `card` says.
Support two_of_four(const Problem& problem, DType type, const Support& card) {
  const char* shape = mma_sp_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all({needs(problem.pattern == format::Pattern::keep_of(2, 4), "2:4"),
                       supports_numbers(problem, type),
                       shape != nullptr ? Support::no("{}", shape) : Support::yes(), card});
}
template <DType kType>
Support mma_sp(const Problem& problem, const Device& device) {
  return two_of_four(problem, kType, supports_gpu_kernel(device, 9, 0));
}
template <DType kType>
Support mma_sp80(const Problem& problem, const Device& device) {
  return two_of_four(problem, kType, supports_gpu_kernel(device));
}

/// Of many tokens, where `--memory fastest` packs W for each number of them.
Support cusparselt(const Problem& problem, const Device& device) {
  const char* shape = cusparselt_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  const Support kernel = Support::all(
      {needs(problem.pattern == format::Pattern::keep_of(2, 4), "2:4"),
       supports_numbers(problem, DType::kBF16),
       shape != nullptr ? Support::no("{}", shape) : Support::yes(), supports_gpu_kernel(device)});
  if (!kernel) return kernel;
  return needs((*gpu_library())->has_cusparselt() != 0, "libcusparseLt.so.0, which torch brings");
}

template <Values kValues>
Support coded(const Problem& problem, const Device& device) {
  const char* shape = cuda::coded_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all({needs(problem.pattern == format::Pattern::keep_of(2, 4), "2:4"),
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
        row_candidate<kAvx512FixedDot>("cpu_avx512_fixed_dot", fixed<16, dot>),
        row_candidate<kAvx512FixedFma>("cpu_avx512_fixed_fma", fixed<16, avx512>),
        row_candidate<kAvx512CountDot>("cpu_avx512_count_dot", dot),
        row_candidate<kAvx512CountFma>("cpu_avx512_count_fma", avx512),
        row_candidate<kAvx2FixedShuffle>("cpu_avx2_fixed_shuffle", fixed<8, avx2>),
        row_candidate<kAvx2CountShuffle>("cpu_avx2_count_shuffle", avx2),
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
  static GpuCandidates list{{"cuda_sm90_mma_sp", mma_sp<DType::kBF16>},
                            {"cuda_sm90_mma_sp_f16", mma_sp<DType::kF16>},
                            {"cuda_sm80_mma_sp", mma_sp80<DType::kBF16>},
                            {"cuda_sm80_mma_sp_f16", mma_sp80<DType::kF16>},
                            {"cuda_sm80_cusparselt", cusparselt},
                            {"cuda_sm90_fp8", coded<Values::kFP8>},
                            {"cuda_sm90_int8", coded<Values::kInt8>},
                            {"cuda_sm90_int4", coded<Values::kInt4G64>},
                            {kExpandCublas, supports_dense_product<format::PatternKind::kKeepOf>}};
  return list;
}

}  // namespace lacuna::kernels::linear_nm
