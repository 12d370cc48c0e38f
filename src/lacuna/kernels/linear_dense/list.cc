// The candidates of linear_dense, special to general, the reference last.
#include "lacuna/kernels/cuda/sm90_coded_limits.h"
#include "lacuna/kernels/linear_dense/cpu.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_stream_limits.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::linear_dense {
namespace {

Support right_pattern(const Problem& problem) {
  return needs(problem.pattern.kind == format::PatternKind::kDense, "a dense weight");
}

Support any_cpu(const Problem& problem, const Device& device) {
  return Support::all({supports_rows_or_fp8(problem, device), right_pattern(problem)});
}

Support amx_tiled(const Problem& problem, const Device& device) {
  return Support::all({tiled::supports_amx_dot(problem, device), right_pattern(problem),
                       needs(problem.tokens >= 8, "8 tokens or more")});
}

Support dot(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), supports_bf16_dot(problem, device)});
}

Support avx512(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_vbmi2(device)});
}

Support avx2(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_avx2_f16c(device)});
}

template <DType kType>
Support stream(const Problem& problem, const Device& device) {
  const char* shape = stream_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all({needs(problem.pattern.kind == format::PatternKind::kDense, "a dense weight"),
                       supports_numbers(problem, kType),
                       shape != nullptr ? Support::no("{}", shape) : Support::yes(),
                       supports_gpu_kernel(device, 9, 0)});
}

template <Values kValues>
Support coded(const Problem& problem, const Device& device) {
  const char* shape = cuda::coded_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all({needs(problem.pattern.kind == format::PatternKind::kDense, "a dense weight"),
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
        row_candidate<kAvx512Dot>("cpu_avx512_dot", dot),
        row_candidate<kAvx512Fma>("cpu_avx512_fma", avx512),
        row_candidate<kAvx2Fma>("cpu_avx2_fma", avx2),
#endif
        row_candidate<kPortable>("cpu_portable", any_cpu), reference_candidate(any_cpu)
  };
  return list;
}

GpuCandidates& gpu_candidates() {
  static GpuCandidates list{{"cuda_sm90_stream", stream<DType::kBF16>},
                            {"cuda_sm90_stream_f16", stream<DType::kF16>},
                            {"cuda_sm90_fp8", coded<Values::kFP8>},
                            {"cuda_sm90_int8", coded<Values::kInt8>},
                            {kCublas, supports_dense_product<format::PatternKind::kDense>}};
  return list;
}

}  // namespace lacuna::kernels::linear_dense
