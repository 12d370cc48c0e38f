// 8-bit codes of weights (format/quantization.h), and the bf16 numbers that they are, for the tensor
// cores: every code of either kind is one exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lacuna::kernels::cuda {

// Four codes as a word holds them, and the same four as two pairs for a fragment: bytes 1 and 3
// (low and high half of `odd`), bytes 0 and 2 (of `even`).

__device__ __forceinline__ unsigned bytes_of(unsigned odd_low, unsigned odd_high, unsigned even_low,
                                             unsigned even_high) {
  return even_low | odd_low << 8 | even_high << 16 | odd_high << 24;
}

// e4m3, finite. 7 integer instructions and 2 products for four codes: sign, exponent and fraction
// go to their places in bf16, which is then too small by 2^120 (the biases differ), subnormals
// included.
struct Fp8 {
  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return __nv_cvt_float_to_fp8(__uint_as_float(static_cast<unsigned>(bf16) << 16), __NV_SATFINITE,
                                 __NV_E4M3);
  }
  static __device__ __forceinline__ void decode(unsigned word, unsigned* odd, unsigned* even) {
    *odd = times_2_120((word >> 4 & 0x07f007f0) | (word & 0x80008000));
    *even = times_2_120((word << 4 & 0x07f007f0) | (word << 8 & 0x80008000));
  }

 private:
  static __device__ __forceinline__ unsigned times_2_120(unsigned pair) {
    unsigned v;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(pair), "r"(0x7b807b80));
    return v;
  }
};

// -128..127. 5 integer instructions and 2 differences for four codes: 128 plus the low seven bits
// is a fraction of bf16, and what has to go again is 128, or 256 for a negative code.
struct Int8 {
  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return static_cast<unsigned>(
               static_cast<int>(__uint_as_float(static_cast<unsigned>(bf16) << 16))) &
           0xff;
  }
  static __device__ __forceinline__ void decode(unsigned word, unsigned* odd, unsigned* even) {
    *odd = pair_of(word >> 8);
    *even = pair_of(word);
  }

 private:
  static __device__ __forceinline__ unsigned pair_of(unsigned bytes) {
    unsigned v;
    asm("sub.rn.bf16x2 %0, %1, %2;"
        : "=r"(v)
        : "r"((bytes & 0x007f007f) | 0x43004300), "r"((bytes & 0x00800080) | 0x43004300));
    return v;
  }
};

// A pair of bf16, each times a float32 factor, rounded once.
__device__ __forceinline__ unsigned scaled_pair(unsigned pair, float scale) {
  const __nv_bfloat162 v = __floats2bfloat162_rn(__uint_as_float(pair << 16) * scale,
                                                 __uint_as_float(pair & 0xffff0000u) * scale);
  return *reinterpret_cast<const unsigned*>(&v);
}

}  // namespace lacuna::kernels::cuda
