// The two floats of 16 bits that weights and activations may be: how they are rounded to, and how
// tensor cores multiply them. What only moves them takes them for unsigned short.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "lacuna/kernels/cuda/halves.h"

namespace lacuna::kernels::cuda {

// multiply(): c += A B of 16 x 16 and 16 x 8. multiply_sparse(): the same with A of 16 x 32 of
// which two of every four are kept; kSelector: whether lanes 0 and 1 or 2 and 3 of every four hold
// their places.
#define LACUNA_HALF_PRODUCTS(type)                                                            \
  static __device__ __forceinline__ void multiply(float(&c)[4], const uint4& a, unsigned b0,  \
                                                  unsigned b1) {                              \
    asm("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                                \
        ".f32 "                                                                               \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                     \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                      \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));                          \
  }                                                                                           \
  template <int kSelector>                                                                    \
  static __device__ __forceinline__ void multiply_sparse(float(&c)[4], const uint4& a,        \
                                                         const uint4& b, unsigned metadata) { \
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." type "." type           \
        ".f32 "                                                                               \
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                      \
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w),     \
          "r"(metadata), "n"(kSelector));                                                     \
  }

struct Bf16 {
  static __device__ __forceinline__ unsigned short round(float v) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
  }
  // Two side by side, the first in the low half.
  static __device__ __forceinline__ unsigned round(float low, float high) {
    unsigned v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
  }
  // The two of a pair.
  static __device__ __forceinline__ float low(unsigned pair) { return __uint_as_float(pair << 16); }
  static __device__ __forceinline__ float high(unsigned pair) {
    return __uint_as_float(pair & 0xffff0000u);
  }
  LACUNA_HALF_PRODUCTS("bf16")
};

// What is too large for it becomes an infinity.
struct Fp16 {
  static __device__ __forceinline__ unsigned short round(float v) {
    return __half_as_ushort(__float2half_rn(v));
  }
  static __device__ __forceinline__ unsigned round(float low, float high) {
    unsigned v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
  }
  static __device__ __forceinline__ float low(unsigned pair) {
    return __half2float(__ushort_as_half(static_cast<unsigned short>(pair)));
  }
  static __device__ __forceinline__ float high(unsigned pair) { return low(pair >> 16); }
  LACUNA_HALF_PRODUCTS("f16")
};

#undef LACUNA_HALF_PRODUCTS

// Four of them, from v[0] on in memory; rows past the last are left out.
template <class Half>
__device__ __forceinline__ void store_four(unsigned short* to, const float (&v)[4], int left,
                                           bool aligned) {
  if (aligned) {
    if (left > 0)
      *reinterpret_cast<uint2*>(to) = make_uint2(Half::round(v[0], v[1]), Half::round(v[2], v[3]));
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)
      if (i < left) to[i] = Half::round(v[i]);
  }
}

}  // namespace lacuna::kernels::cuda
