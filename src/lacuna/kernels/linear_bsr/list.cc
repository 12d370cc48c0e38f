// The candidates of linear_bsr, special to general, the reference last.
#include <algorithm>

#include "lacuna/kernels/linear_bsr/cpu.h"
#include "lacuna/kernels/linear_bsr/cuda_sm80_block_limits.h"
#include "lacuna/kernels/linear_bsr/linear_bsr.h"
#include "lacuna/kernels/nonfinite.h"

namespace lacuna::kernels::linear_bsr {
namespace {

Support any_cpu(const Problem& problem, const Device& device) {
  return Support::all({supports_rows(problem, device),
                       needs(problem.pattern.kind == format::PatternKind::kBlock, "blocks")});
}

Support avx512(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_vbmi2(device)});
}

/// A block's row in whole registers.
Support chunks(const Problem& problem, const Device& device) {
  const Support otherwise = avx512(problem, device);
  if (!otherwise) return otherwise;
  return needs(problem.pattern.block_columns % 32 == 0, "blocks of a multiple of 32 columns");
}

/// A whole number of rows in 16 lanes.
Support flat(const Problem& problem, const Device& device) {
  const Support otherwise = avx512(problem, device);
  if (!otherwise) return otherwise;
  const int height = problem.pattern.block_rows, width = problem.pattern.block_columns;
  return needs(width <= 16 && 16 % width == 0 && height % (16 / width) == 0,
               "blocks of 1, 2, 4, 8 or 16 columns and a multiple of 16 weights");
}

/// Up to two tokens, float32 sums take no longer (the memory decides) and keep denormals.
Support dot(const Problem& problem, const Device& device) {
  return Support::all({chunks(problem, device), supports_bf16_dot(problem, device),
                       needs(problem.tokens >= 3, "3 tokens or more")});
}

Support avx2(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), needs_avx2_f16c(device)});
}

/// Tiles of 16 x 32 that hold a weight are stored whole, so blocks of 16 columns fill half of them.
template <DType kType>
Support tensor_core_blocks(const Problem& problem, const Device& device) {
  const char* shape = block_shape_refusal(problem.outputs, problem.inputs, problem.tokens);
  return Support::all(
      {needs(problem.pattern.kind == format::PatternKind::kBlock, "blocks"),
       needs(problem.pattern.block_rows % 16 == 0 && problem.pattern.block_columns % 16 == 0,
             "blocks of a multiple of 16 rows and columns"),
       supports_numbers(problem, kType), needs(problem.sparsity >= 0.5, "50 % zeros or more"),
       shape != nullptr ? Support::no("{}", shape) : Support::yes(), supports_gpu_kernel(device)});
}

/// Block rows that drop a column in which x is not finite: 0 times that is NaN.
void spread_nonfinite(const format::RowsView& rows, const format::RowProduct& product) {
  const int64_t height = rows.pattern.block_rows, width = rows.pattern.block_columns;
  for (int64_t t = 0; t < product.tokens; ++t) {
    const std::vector<int64_t> columns = nonfinite_columns(product, t, rows.columns);
    if (columns.empty()) continue;
    for (int64_t top = 0; top < rows.rows; top += height) {
      int64_t block = rows.blocks_before(top / height);
      const int64_t end = rows.blocks_before(top / height + 1);
      const bool keeps_all = std::ranges::all_of(columns, [&](int64_t column) {
        while (block < end && rows.block_column(block) < column / width) ++block;
        return block < end && rows.block_column(block) == column / width;
      });
      if (keeps_all) continue;
      for (int64_t row = top; row < std::min(top + height, rows.rows); ++row)
        set_nan(product, t, row);
    }
  }
}

template <const format::RowImplementations& kImplementations>
LinearCandidate block_candidate(std::string name,
                                Support (*supports)(const Problem&, const Device&)) {
  LinearCandidate candidate = row_candidate<kImplementations>(std::move(name), supports);
  candidate.run = [](const format::RowsView& rows, const format::RowProduct& product,
                     void* workspace, const Executor& executor) {
    format::run_row_product(kImplementations.for_values(rows.dtype), rows, product, workspace,
                            executor);
    spread_nonfinite(rows, product);
  };
  return candidate;
}

}  // namespace

LinearCandidates& candidates() {
  static LinearCandidates list {
#if defined(__x86_64__)
    block_candidate<kAvx512ChunkDot>("cpu_avx512_chunk_dot", dot),
        block_candidate<kAvx512ChunkFma>("cpu_avx512_chunk_fma", chunks),
        block_candidate<kAvx512FlatFma>("cpu_avx512_flat_fma", flat),
        block_candidate<kAvx512PieceFma>("cpu_avx512_piece_fma", avx512),
        block_candidate<kAvx2PieceFma>("cpu_avx2_piece_fma", avx2),
#endif
        block_candidate<kPortablePiece>("cpu_portable_piece", any_cpu), reference_candidate(any_cpu)
  };
  return list;
}

GpuCandidates& gpu_candidates() {
  static GpuCandidates list{{"cuda_sm80_block", tensor_core_blocks<DType::kBF16>},
                            {"cuda_sm80_block_f16", tensor_core_blocks<DType::kF16>},
                            {kExpandCublas, supports_dense_product<format::PatternKind::kBlock>}};
  return list;
}

}  // namespace lacuna::kernels::linear_bsr
