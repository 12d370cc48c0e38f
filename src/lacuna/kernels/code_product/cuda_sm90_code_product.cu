#include "lacuna/kernels/code_product/cuda_sm90_code_product.h"

#include <cuda_bf16.h>

#include <cstdint>

#include "lacuna/kernels/cuda/sm90_round_tokens.cuh"

namespace lacuna::kernels::code_product {
namespace {

constexpr int kThreads = 256;

bool aligned(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

// A thread takes 8 rows of W for each of the block's tokens.
__global__ void __launch_bounds__(kThreads) scale_sums_kernel(const GpuScaling s) {
  const std::int64_t row = 8 * (static_cast<std::int64_t>(blockIdx.x) * kThreads + threadIdx.x);
  if (row >= s.rows) return;
  const auto* const scales = reinterpret_cast<const float4*>(s.row_scales + row);
  const float4 low = scales[0], high = scales[1];
  for (std::int64_t token = blockIdx.y; token < s.tokens; token += gridDim.y) {
    const std::int64_t at = token * s.rows + row;
    const auto* const from = reinterpret_cast<const int4*>(s.sums + at);
    const int4 a = __ldcs(from), b = __ldcs(from + 1);
    const float scale = s.token_scales[token];
    const auto pair = [&](int first, int second, float first_scale, float second_scale) {
      const __nv_bfloat162 v =
          __floats2bfloat162_rn(static_cast<float>(first) * (scale * first_scale),
                                static_cast<float>(second) * (scale * second_scale));
      return *reinterpret_cast<const unsigned*>(&v);
    };
    *reinterpret_cast<uint4*>(static_cast<__nv_bfloat16*>(s.y) + at) =
        make_uint4(pair(a.x, a.y, low.x, low.y), pair(a.z, a.w, low.z, low.w),
                   pair(b.x, b.y, high.x, high.y), pair(b.z, b.w, high.z, high.w));
  }
}

}  // namespace

cudaError_t round_tokens(const GpuRounding& r, cudaStream_t stream) {
  if (r.tokens < 1 || r.tokens > INT32_MAX || r.columns < 16 || r.columns % 16 != 0 ||
      r.columns > INT32_MAX || !aligned(r.x) || !aligned(r.codes)) {
    return cudaErrorInvalidValue;
  }
  const auto round = r.e4m3 ? cuda::round_tokens<cuda::Fp8, cuda::ColumnOrder::kPlain>
                            : cuda::round_tokens<cuda::Int8, cuda::ColumnOrder::kPlain>;
  return round(r.x, r.tokens, r.columns, static_cast<unsigned char*>(r.codes), r.scales,
               /*overlap_previous=*/false, stream);
}

cudaError_t scale_sums(const GpuScaling& s, cudaStream_t stream) {
  if (s.tokens < 1 || s.rows < 8 || s.rows % 8 != 0 || !aligned(s.sums) || !aligned(s.y) ||
      !aligned(s.row_scales)) {
    return cudaErrorInvalidValue;
  }
  const dim3 grid(static_cast<unsigned>((s.rows / 8 + kThreads - 1) / kThreads),
                  static_cast<unsigned>(s.tokens < 4096 ? s.tokens : 4096));
  scale_sums_kernel<<<grid, kThreads, 0, stream>>>(s);
  return cudaGetLastError();
}

}  // namespace lacuna::kernels::code_product
