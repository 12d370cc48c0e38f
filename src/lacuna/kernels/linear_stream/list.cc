// The candidates of linear_stream, special to general, the reference last.
#include "lacuna/kernels/linear_stream/linear_stream.h"
#include "lacuna/kernels/linear_stream/tile_product.h"
#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::linear_stream {
namespace {

Support right_weight(const Problem& problem) {
  using format::PatternKind;
  return Support::all({needs(problem.pattern.kind == PatternKind::kUnstructured ||
                                 problem.pattern.kind == PatternKind::kKeepOf,
                             "an unstructured or a KEEP:OF pattern"),
                       needs(problem.values == Values::kBF16 || problem.values == Values::kF16,
                             "bf16 or f16 values")});
}

Support any_cpu(const Problem& problem, const Device& device) {
  return Support::all({supports_rows(problem, device), right_weight(problem)});
}

Support amx_tiled(const Problem& problem, const Device& device) {
  return Support::all({tiled::supports_amx_expansion(problem, device), right_weight(problem)});
}

/// One token gains nothing from tiles (bench/lab/cpu_linear).
Support amx_few(const Problem& problem, const Device& device) {
  return Support::all(
      {tiled::supports_amx_dot(problem, device), right_weight(problem),
       needs(problem.tokens >= 2 && problem.tokens <= kMostTokens, "2 to 32 tokens")});
}

Support avx512(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_vbmi2(device)});
}

Support avx2(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_avx2_f16c(device)});
}

template <const TileKernels& kKernels>
LinearCandidate tile_candidate(std::string name,
                               Support (*supports)(const Problem&, const Device&)) {
  return {{std::move(name), supports},
          [](const Problem& problem) {
            return tile_product_workspace_bytes(problem.tokens, problem.inputs);
          },
          [](const format::RowsView& rows, const format::RowProduct& product, void* workspace,
             const Executor& executor) {
            run_tile_product(kKernels, rows, product, workspace, executor);
          }};
}

}  // namespace

LinearCandidates& candidates() {
  static LinearCandidates list {
#if defined(__x86_64__)
    tile_candidate<kAmxDot>("cpu_amx_stream_few_dot", amx_few),
        tiled::candidate<tiled::run_amx_stream_dot, tiled::Blocking::of_panels>(
            "cpu_amx_stream_dot", amx_tiled),
        tile_candidate<kAvx512Fma>("cpu_avx512_stream_fma", avx512),
        tile_candidate<kAvx2BufferFma>("cpu_avx2_stream_fma", avx2),
#endif
        tile_candidate<kPortable>("cpu_portable_stream", any_cpu), LinearCandidate {
      {"reference", any_cpu}, [](const Problem&) -> size_t { return 0; },
          [](const format::RowsView& rows, const format::RowProduct& product, void*,
             const Executor&) { run_reference_tile_product(rows, product); }
    }
  };
  return list;
}

GpuCandidates& gpu_candidates() {
  static GpuCandidates list{
      {kExpandCublas, supports_dense_product<format::PatternKind::kUnstructured>}};
  return list;
}

}  // namespace lacuna::kernels::linear_stream
