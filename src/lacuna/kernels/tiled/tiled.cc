#include "lacuna/kernels/tiled.h"

#include "lacuna/kernels/tiled/coded_layout.h"
#include "lacuna/kernels/tiled/float_layout.h"
#include "lacuna/kernels/tiled/layout.h"

namespace lacuna::kernels::tiled {

int most_threads() {
  static const int cores = available_cores();
  return cores;
}

size_t workspace_bytes(int64_t tokens, int64_t columns) {
  return static_cast<size_t>(Layout(tokens, columns, most_threads()).bytes()) + 64;
}

Blocking Blocking::of(int64_t tokens, int64_t rows, int64_t columns, int threads) {
  if (tokens <= kPair) return {kPair, 256, kPair};  // sums never leave the tiles (pair_avx512.h)
  return of_panels(tokens, rows, columns, threads);
}

Blocking Blocking::of_panels(int64_t tokens, int64_t rows, int64_t columns, int threads) {
  // Up to 64 tokens the memory decides, and gives whole rows fastest, if 32 of them fit in the
  // second-level cache. With more, a short block of 32 rows stays in the first-level cache, x and
  // the sums of a panel in the second; the more tokens, the more rows a panel needs lest x be read
  // again too often.
  Blocking blocking{kMostRows, 256, kMostTokens};
  if (tokens <= 128) blocking = {256, 1024, kMostTokens};
  if (tokens <= 64) blocking = {128, columns <= kMostColumns ? kMostColumns : 1024, kMostTokens};
  while (blocking.rows > kPair && rows < blocking.rows * 4 * threads) blocking.rows /= 2;
  blocking.columns = std::min(blocking.columns, ceil_div(columns, kColumns) * kColumns);
  return blocking;
}

Blocking Blocking::of_codes(int64_t tokens, int64_t rows, int64_t columns, int threads) {
  // As many bytes as above.
  Blocking blocking{kMostRows, 512, kMostTokens};
  if (tokens <= 128) blocking = {256, 1024, kMostTokens};
  if (tokens <= 64) blocking = {128, columns <= kMostColumns ? kMostColumns : 1024, kMostTokens};
  while (blocking.rows > kPair && rows < blocking.rows * 4 * threads) blocking.rows /= 2;
  blocking.columns = std::min(blocking.columns, ceil_div(columns, kCodedColumns) * kCodedColumns);
  return blocking;
}

size_t coded_workspace_bytes(int64_t tokens, int64_t columns) {
  const int threads = most_threads();
  return static_cast<size_t>(Layout(tokens, columns, threads, kCodedColumns).bytes() +
                             scale_bytes(tokens) + threads * token_bytes(columns) + 64);
}

Support supports_amx_coded(const Problem& problem, const Device& device) {
  const CpuFeatures& cpu = device.cpu;
  return Support::all(
      {needs(!device.gpu, "weights in host memory"),
       needs(cpu.amx_int8 && cpu.avx512_vbmi2 && cpu.gfni, "AMX with int8, AVX-512 VBMI2 and GFNI"),
       needs(problem.values == Values::kInt8 || problem.values == Values::kInt4G64,
             "int8 or int4 values"),
       needs(problem.inputs <= (int64_t{1} << 16), "at most 65536 inputs (sums are 32-bit)")});
}

Support supports_amx_dot(const Problem& problem, const Device& device) {
  const CpuFeatures& cpu = device.cpu;
  return Support::all({needs(!device.gpu, "weights in host memory"),
                       needs(cpu.amx_bf16 && cpu.avx512_vbmi2 && cpu.avx512_bf16,
                             "AMX with bf16, AVX-512 VBMI2 and BF16"),
                       needs(problem.values == Values::kBF16 && problem.activations == DType::kBF16,
                             "bf16 values and bf16 activations")});
}

Support supports_amx_expansion(const Problem& problem, const Device& device) {
  return Support::all(
      {supports_amx_dot(problem, device), needs(problem.tokens >= 13, "13 tokens or more")});
}

size_t float_workspace_bytes(int64_t tokens, int64_t columns) {
  return static_cast<size_t>(FloatLayout(tokens, columns, kMostStepTokens).bytes(most_threads())) +
         64;
}

Support supports_float(const Problem& problem, const Device& device) {
  return Support::all({needs(!device.gpu, "weights in host memory"),
                       needs(dtype_of(problem.values).has_value(), "f32, bf16 or f16 values"),
                       needs(problem.tokens > format::kMaxTokens, "17 tokens or more")});
}

}  // namespace lacuna::kernels::tiled
