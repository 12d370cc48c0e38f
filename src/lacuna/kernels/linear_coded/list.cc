// The candidates of linear_coded, special to general.
#include "lacuna/kernels/linear_coded/cpu.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/tiled.h"

namespace lacuna::kernels::linear_coded {
namespace {

Support any_cpu(const Problem& problem, const Device& device) {
  return Support::all(
      {needs(!device.gpu, "weights in host memory"),
       needs(problem.values == Values::kInt8 || problem.values == Values::kInt4G64,
             "int8 or int4 values"),
       needs(problem.inputs <= (int64_t{1} << 16), "at most 65536 inputs (sums are 32-bit)")});
}

Support amx(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device), tiled::supports_amx_coded(problem, device),
                       needs(problem.tokens > kMaxTokens, "17 tokens or more")});
}

void run_amx(const Stream& stream, const format::RowProduct& product, void* workspace,
             const Executor& executor) {
  tiled::run_amx_coded_dot(
      stream, product, workspace, executor,
      tiled::Blocking::of_codes(product.tokens, stream.rows(), stream.columns(), executor.threads));
}

Support avx512(const Problem& problem, const Device& device) {
  return Support::all({any_cpu(problem, device),
                       needs(device.cpu.avx512_vbmi2 && device.cpu.avx512_vnni && device.cpu.gfni,
                             "AVX-512 with VBMI2 and VNNI, and GFNI")});
}

/// With many tokens of float32, a dense product of the expanded weight is three to five times as
/// fast; one of bf16 is slower, without instructions for it (bench/lab/cpu_tiled).
Support avx2(const Problem& problem, const Device& device) {
  return Support::all(
      {any_cpu(problem, device), needs_avx2(device),
       needs(problem.tokens <= kMaxTokens || problem.activations != DType::kF32,
             "at most 16 tokens of f32 (for more, expand the weight and take a dense product)")});
}

Support avx2_vnni(const Problem& problem, const Device& device) {
  return Support::all({avx2(problem, device), needs(device.cpu.avx_vnni, "AVX-VNNI")});
}

Support portable(const Problem& problem, const Device& device) {
  return Support::all(
      {any_cpu(problem, device),
       needs(problem.tokens <= kMaxTokens,
             "at most 16 tokens (for more, expand the weight and take a dense product)")});
}

}  // namespace

CodedCandidates& candidates() {
  static CodedCandidates list {
#if defined(__x86_64__)
    {{"cpu_amx_tiled_dot", amx}, nullptr, run_amx},
        {{"cpu_avx512_stream_dot", avx512}, tile_avx512_stream_dot},
        {{"cpu_avx2_vnni_buffer_dot", avx2_vnni}, tile_avx2_vnni_buffer_dot},
        {{"cpu_avx2_buffer_dot", avx2}, tile_avx2_buffer_dot},
#endif
        {{"cpu_portable", portable}, tile_portable},
  };
  return list;
}

}  // namespace lacuna::kernels::linear_coded
