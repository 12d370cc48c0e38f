#include "lacuna/kernels/tiled.h"

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
  // Few tokens: the memory decides, and reads whole rows fastest. Many: 32 rows of a short block
  // stay in the first-level cache, x and the sums of a panel in the second.
  const bool few = tokens <= 64;
  Blocking blocking{few ? kPair : kMostRows, few ? kMostColumns : 256, kMostTokens};
  while (blocking.rows > kPair && rows < blocking.rows * 4 * threads) blocking.rows /= 2;
  blocking.columns = std::min(blocking.columns, ceil_div(columns, kColumns) * kColumns);
  return blocking;
}

Support supports_avx512_dot(const Problem& problem, const Device& device) {
  return Support::all(
      {needs(!device.gpu, "weights in host memory"),
       needs(device.cpu.avx512_vbmi2 && device.cpu.avx512_bf16, "AVX-512 VBMI2 and BF16"),
       needs(problem.values == Values::kBF16 && problem.activations == DType::kBF16,
             "bf16 values and bf16 activations")});
}

Support supports_amx_dot(const Problem& problem, const Device& device) {
  return Support::all(
      {supports_avx512_dot(problem, device), needs(device.cpu.amx_bf16, "AMX with bf16")});
}

}  // namespace lacuna::kernels::tiled
