// y[T,N] = x[T,K] · W[N,K]^T for many tokens on a CPU: W is expanded 32 rows at a time into a
// buffer that stays in a cache, and multiplied there as a dense matrix. The linear_* operations
// share this; whichever layout their rows lie in, the buffer looks the same.
//
//   W        32 rows x a block of K   expanded between the steps in which the 32 before are
//   multiplied x        16 tokens x 32 columns   a tile; transposed once a call, shared by all
//   threads sums     a panel of rows x a block of tokens, float32, between two blocks of K
//
// No dense copy of W ever reaches memory, so a compact weight costs its own bytes and no more.
// What was measured: bench/lab/cpu_tiled.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lacuna/core/executor.h"
#include "lacuna/format/row_product.h"
#include "lacuna/kernels/coded_stream.h"
#include "lacuna/kernels/select.h"

namespace lacuna::kernels::tiled {

/// The loops, from outside in: panels of rows, blocks of tokens, blocks of K, 32 rows, 32 tokens.
struct Blocking {
  int64_t rows = 0;     ///< of a panel: a multiple of 32, at most kMostRows
  int64_t columns = 0;  ///< of a block of K: a multiple of 32, at most kMostColumns
  int64_t tokens = 0;   ///< of a block: a multiple of 32, at most kMostTokens
  /// What measured best; fewer rows where the threads would lack panels.
  static Blocking of(int64_t tokens, int64_t rows, int64_t columns, int threads);
  /// The same where up to 32 tokens have no loop of their own (pair_avx512.h).
  static Blocking of_panels(int64_t tokens, int64_t rows, int64_t columns, int threads);
  /// The same for codes.
  static Blocking of_codes(int64_t tokens, int64_t rows, int64_t columns, int threads);
};
inline constexpr int64_t kMostRows = 512, kMostColumns = 4096, kMostTokens = 256;

/// Bytes that a product of T tokens and K columns needs, for all threads of this machine.
size_t workspace_bytes(int64_t tokens, int64_t columns);

/// @param rows  bf16, dense or with a bitmap
/// @param product  bf16, any number of tokens
/// @determinism an output's bits depend on its row and its token alone: each sum runs over K in one
/// order, whatever the threads, the blocking or the other tokens
using Run = void (*)(const format::RowsView& rows, const format::RowProduct& product,
                     void* workspace, const Executor& executor, const Blocking& blocking);

/// tdpbf16ps on tiles of 16 rows x 16 tokens x 32 columns. Takes denormals as zero.
void run_amx_dot(const format::RowsView& rows, const format::RowProduct& product, void* workspace,
                 const Executor& executor, const Blocking& blocking);
/// The same from a stream (kernels/stream.h).
void run_amx_stream_dot(const format::RowsView& rows, const format::RowProduct& product,
                        void* workspace, const Executor& executor, const Blocking& blocking);
/// Whether that can be, whatever the pattern.
Support supports_amx_dot(const Problem& problem, const Device& device);
/// The same of a sparse weight: from 13 tokens on the tiles are faster than one token after the
/// other, whatever the sparsity.
Support supports_amx_expansion(const Problem& problem, const Device& device);

/// The candidate of a product.
template <Run kRun, auto kBlocking = Blocking::of>
LinearCandidate candidate(std::string name, Support (*supports)(const Problem&, const Device&)) {
  return {{std::move(name), supports},
          [](const Problem& problem) { return workspace_bytes(problem.tokens, problem.inputs); },
          [](const format::RowsView& rows, const format::RowProduct& product, void* workspace,
             const Executor& executor) {
            kRun(rows, product, workspace, executor,
                 kBlocking(product.tokens, rows.rows, rows.columns, executor.threads));
          }};
}

// --- Codes ---------------------------------------------------------------------------------------

/// int8 or int4 in a stream, x rounded to codes as quantize_token() does; x, y and bias f32, bf16
/// or f16. The outputs are those of linear_coded for few tokens, to the bit.
/// @determinism as above
using CodedRun = void (*)(const stream::CodedView& weight, const format::RowProduct& product,
                          void* workspace, const Executor& executor, const Blocking& blocking);
/// tdpbusd on tiles of 16 tokens x 16 rows x 64 columns.
void run_amx_coded_dot(const stream::CodedView& weight, const format::RowProduct& product,
                       void* workspace, const Executor& executor, const Blocking& blocking);
size_t coded_workspace_bytes(int64_t tokens, int64_t columns);
Support supports_amx_coded(const Problem& problem, const Device& device);

// --- float32 -------------------------------------------------------------------------------------

/// Values f32, bf16 or f16, rows dense or with a bitmap; x, y and bias f32, bf16 or f16: all is
/// multiplied as float32.
/// @determinism as above: every sum runs over K from front to back
/// @error |y - exact| <= gamma(K + 1) (|W||x| + |bias|) + one rounding to the type of y
using FloatRun = void (*)(const format::RowsView& rows, const format::RowProduct& product,
                          void* workspace, const Executor& executor);
void run_avx512_fma(const format::RowsView& rows, const format::RowProduct& product,
                    void* workspace, const Executor& executor);
void run_avx2_fma(const format::RowsView& rows, const format::RowProduct& product, void* workspace,
                  const Executor& executor);
void run_portable(const format::RowsView& rows, const format::RowProduct& product, void* workspace,
                  const Executor& executor);
/// Whether that can be, whatever the pattern and the instruction set.
Support supports_float(const Problem& problem, const Device& device);
size_t float_workspace_bytes(int64_t tokens, int64_t columns);

template <FloatRun kRun>
LinearCandidate float_candidate(std::string name,
                                Support (*supports)(const Problem&, const Device&)) {
  return {
      {std::move(name), supports},
      [](const Problem& problem) { return float_workspace_bytes(problem.tokens, problem.inputs); },
      kRun};
}

}  // namespace lacuna::kernels::tiled
