// The candidates of linear_csr, special to general, the reference last.
#include "lacuna/kernels/linear_csr/cuda_sm80_cusparse_limits.h"
#include "lacuna/kernels/linear_csr/linear_csr.h"
#include "lacuna/kernels/linear_csr/slice_product.h"

namespace lacuna::kernels::linear_csr {
namespace {

Support any_cpu(const Problem& problem, const Device& device) {
  return Support::all({supports_rows(problem, device),
                       needs(problem.pattern.kind == format::PatternKind::kUnstructured,
                             "an unstructured pattern")});
}

Support avx512(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_vbmi2(device)});
}

Support avx2(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_avx2_f16c(device)});
}

Support cusparse(const Problem& problem, const Device& device) {
  const char* shape = cusparse_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  const Support kernel = Support::all(
      {needs(problem.pattern.kind == format::PatternKind::kUnstructured, "an unstructured pattern"),
       supports_numbers(problem, DType::kBF16),
       shape != nullptr ? Support::no("{}", shape) : Support::yes(), supports_gpu_kernel(device)});
  if (!kernel) return kernel;
  return needs((*gpu_library())->has_cusparse() != 0, "libcusparse.so.12, which torch brings");
}

template <const SliceKernels& kKernels>
LinearCandidate slice_candidate(std::string name,
                                Support (*supports)(const Problem&, const Device&)) {
  return {{std::move(name), supports},
          [](const Problem& problem) {
            return slice_product_workspace_bytes(problem.tokens, problem.inputs);
          },
          [](const format::RowsView& rows, const format::RowProduct& product, void* workspace,
             const Executor& executor) {
            run_slice_product(kKernels.for_values(rows.dtype), rows, product, workspace, executor);
          }};
}

}  // namespace

LinearCandidates& candidates() {
  static LinearCandidates list {
#if defined(__x86_64__)
    slice_candidate<kAvx512Gather>("cpu_avx512_gather", avx512),
        slice_candidate<kAvx2Gather>("cpu_avx2_gather", avx2),
#endif
        slice_candidate<kPortableGather>("cpu_portable_gather", any_cpu), LinearCandidate {
      {"reference", any_cpu}, [](const Problem&) -> size_t { return 0; },
          [](const format::RowsView& rows, const format::RowProduct& product, void*,
             const Executor&) { run_reference_slice_product(rows, product); }
    }
  };
  return list;
}

GpuCandidates& gpu_candidates() {
  static GpuCandidates list{
      {"cuda_sm80_cusparse", cusparse},
      {kExpandCublas, supports_dense_product<format::PatternKind::kUnstructured>}};
  return list;
}

}  // namespace lacuna::kernels::linear_csr
