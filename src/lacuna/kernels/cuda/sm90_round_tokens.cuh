// Activations as codes on a GPU, as kernels/quantize_token.h rounds them on a CPU: each token has a
// scale, the largest magnitude over that of the code (Code::kLargest). A NaN or an infinity makes
// all codes of its token 0 and the scale NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdint>

#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_codes.cuh"

namespace lacuna::kernels::cuda {

inline constexpr int kRoundThreads = 512;

enum class ColumnOrder {
  kPlain,
  // That in which wgmma.sp meets the 2:4 codes of linear_nm/cuda_sm90_coded (two fragments of
  // mma.sp for bf16 side by side): of every 32 columns groups of four 0, 4, 1, 5, 2, 6, 3, 7.
  kWgmmaSp,
};

// One block a token. k is a multiple of 16, of 32 where the order isn't plain; a thread rounds 16
// columns at a time.
template <class Code, ColumnOrder kOrder>
__global__ void __launch_bounds__(kRoundThreads)
    round_tokens_kernel(const __nv_bfloat16* x, int k, unsigned char* codes, float* scales) {
  __shared__ unsigned of_warps[kRoundThreads / 32];
  launch_next();
  await_previous();
  const __nv_bfloat16* const token = x + static_cast<std::size_t>(blockIdx.x) * k;
  const auto read = [&](int piece, int half) {
    const int column = kOrder == ColumnOrder::kPlain ? piece * 16 + half * 8
                                                     : piece / 2 * 32 + piece % 2 * 8 + half * 16;
    return *reinterpret_cast<const uint4*>(token + column);
  };
  // As integers, the bits of magnitudes have the order of their values, NaN above infinity.
  unsigned largest = 0;  // of even columns and of odd ones
#pragma unroll 2
  for (int piece = threadIdx.x; piece < k / 16; piece += blockDim.x) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = read(piece, half);
      largest = __vmaxu2(largest, __vmaxu2(__vmaxu2(v.x & 0x7fff7fff, v.y & 0x7fff7fff),
                                           __vmaxu2(v.z & 0x7fff7fff, v.w & 0x7fff7fff)));
    }
  }
  largest = __reduce_max_sync(~0u, max(largest & 0xffff, largest >> 16));
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = largest;
  __syncthreads();
  for (int i = 0; i < static_cast<int>(blockDim.x) / 32; ++i) largest = max(largest, of_warps[i]);

  const bool finite = largest < 0x7f80;
  const float scale = fmaxf(__fdiv_rn(__uint_as_float(largest << 16), Code::kLargest), 0x1p-126f);
  const float inverse = finite && largest > 0 ? __fdiv_rn(1.f, scale) : 0.f;
  if (threadIdx.x == 0) {
    scales[blockIdx.x] = !finite ? __uint_as_float(0x7fffffff) : largest > 0 ? scale : 0.f;
  }
  unsigned char* const to = codes + static_cast<std::size_t>(blockIdx.x) * k;
#pragma unroll 2
  for (int piece = threadIdx.x; piece < k / 16; piece += blockDim.x) {
    unsigned words[4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint4 v = read(piece, half);
      const unsigned pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
      for (int i = 0; i < 2; ++i) {  // groups of four
        float numbers[4];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          numbers[2 * j] = __fmul_rn(__uint_as_float(pairs[2 * i + j] << 16), inverse);
          numbers[2 * j + 1] = __fmul_rn(__uint_as_float(pairs[2 * i + j] & 0xffff0000), inverse);
        }
        words[kOrder == ColumnOrder::kPlain ? 2 * half + i : 2 * i + half] =
            finite ? Code::four_codes(numbers) : 0;
      }
    }
    *reinterpret_cast<uint4*>(to + piece * 16) = make_uint4(words[0], words[1], words[2], words[3]);
  }
}

// @param x  [tokens, k], aligned to 16 bytes, as the codes
template <class Code, ColumnOrder kOrder>
cudaError_t round_tokens(const void* x, std::int64_t tokens, std::int64_t k, unsigned char* codes,
                         float* scales, bool overlap_previous, cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(tokens));
  config.blockDim =
      dim3(static_cast<unsigned>(std::min<std::int64_t>((k / 16 + 31) / 32 * 32, kRoundThreads)));
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = overlap_previous ? 1 : 0;
  return cudaLaunchKernelEx(&config, round_tokens_kernel<Code, kOrder>,
                            static_cast<const __nv_bfloat16*>(x), static_cast<int>(k), codes,
                            scales);
}

}  // namespace lacuna::kernels::cuda
