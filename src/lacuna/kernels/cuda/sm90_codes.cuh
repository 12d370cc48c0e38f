// 8-bit codes of weights (format/quantization.h), and the bf16 numbers that they are, for the
// tensor cores: every code of either kind is one exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace lacuna::kernels::cuda {

// Four codes in a word, and the same four as two pairs for a fragment: `odd` and `even`, each with
// a low and a high half.
struct FourCodes {
  unsigned odd_low, odd_high, even_low, even_high;  // a byte each
};

// The bits of `a` where kMask has ones, else those of `b`: in one instruction, which the compiler
// misses when it drops bits of the mask that nobody looks at.
template <unsigned kMask>
__device__ __forceinline__ unsigned select(unsigned a, unsigned b) {
  unsigned v;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(v) : "r"(a), "r"(b), "n"(kMask));
  return v;
}

// Both kinds also give the codes as they are, for products of bytes: `rows` those of two words, low
// and high of the first and of the second, and make codes of activations: `four_codes` of numbers
// up to kLargest in size, rounded to nearest, ties to even.

// e4m3, finite. The pair `odd` stands in the word as bf16 wants it (sign, four bits of exponent,
// three of fraction; the rest is 0), the bits of `even` between them, where two shifts take them to
// their places. The bf16 numbers are then too small by 2^120 (the biases differ), subnormals
// included: 5 integer instructions and 2 products for four codes. As bytes, eight codes of two
// words take 8 instructions.
//
//   bit of each half   15 | 14..12 | 11 | 10....4 | 3..0
//   odd                s  |        |    |  6....0 |
//   even                  | 6....4 | s  |         | 3..0
struct Fp8 {
  static constexpr float kLargest = 448.f;
  static __device__ __forceinline__ unsigned four_codes(const float (&v)[4]) {
    const unsigned low = __nv_cvt_float2_to_fp8x2({v[0], v[1]}, __NV_SATFINITE, __NV_E4M3);
    const unsigned high = __nv_cvt_float2_to_fp8x2({v[2], v[3]}, __NV_SATFINITE, __NV_E4M3);
    return low | high << 16;
  }
  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return __nv_cvt_float_to_fp8(__uint_as_float(static_cast<unsigned>(bf16) << 16), __NV_SATFINITE,
                                 __NV_E4M3);
  }
  static __device__ __forceinline__ unsigned word(const FourCodes& c) {
    const auto odd = [](unsigned code) { return (code & 0x80) << 8 | (code & 0x7f) << 4; };
    const auto even = [](unsigned code) {
      return (code & 0x70) << 8 | (code & 0x80) << 4 | (code & 0x0f);
    };
    return odd(c.odd_low) | even(c.even_low) | (odd(c.odd_high) | even(c.even_high)) << 16;
  }
  static __device__ __forceinline__ void decode(unsigned word, unsigned* odd, unsigned* even) {
    *odd = times_2_120(word & 0x87f087f0);
    *even = times_2_120((word << 4 & 0x80f080f0) | (word >> 4 & 0x07000700));
  }
  static __device__ __forceinline__ void rows(unsigned first, unsigned second, unsigned* odd,
                                              unsigned* even) {
    // Both bytes of the four halves. What a shift takes into a neighbour is not selected.
    const unsigned low = __byte_perm(first, second, 0x6420);
    const unsigned high = __byte_perm(first, second, 0x7531);
    *odd = select<0x80808080>(high, select<0x70707070>(high << 4, low >> 4));
    *even = select<0x80808080>(high << 4, select<0x70707070>(high, low));
  }

 private:
  static __device__ __forceinline__ unsigned times_2_120(unsigned pair) {
    unsigned v;
    asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(pair), "r"(0x7b807b80));
    return v;
  }
};

// -128..127, in the order even, odd of both halves. 5 integer instructions and 2 differences for
// four codes: 128 plus the low seven bits is a fraction of bf16, and what has to go again is 128,
// or 256 for a negative code.
struct Int8 {
  static constexpr float kLargest = 127.f;
  static __device__ __forceinline__ unsigned four_codes(const float (&v)[4]) {
    unsigned codes = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) codes |= (__float2int_rn(v[i]) & 0xff) << (8 * i);
    return codes;
  }
  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return static_cast<unsigned>(
               static_cast<int>(__uint_as_float(static_cast<unsigned>(bf16) << 16))) &
           0xff;
  }
  static __device__ __forceinline__ unsigned word(const FourCodes& c) {
    return c.even_low | c.odd_low << 8 | c.even_high << 16 | c.odd_high << 24;
  }
  static __device__ __forceinline__ void decode(unsigned word, unsigned* odd, unsigned* even) {
    *odd = pair_of(word >> 8);
    *even = pair_of(word);
  }
  static __device__ __forceinline__ void rows(unsigned first, unsigned second, unsigned* odd,
                                              unsigned* even) {
    *odd = __byte_perm(first, second, 0x7531);
    *even = __byte_perm(first, second, 0x6420);
  }

 private:
  static __device__ __forceinline__ unsigned pair_of(unsigned bytes) {
    unsigned v;
    asm("fma.rn.bf16x2 %0, %1, %2, %3;"
        : "=r"(v)
        : "r"((bytes & 0x00800080) | 0x43004300), "r"(0xbf80bf80),
          "r"((bytes & 0x007f007f) | 0x43004300));
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
