// The idea: dense codes of 8 bits, streamed as linear_nm's cuda_sm90_coded streams sparse ones, so
// that both differ in their bytes alone. A lane turns four codes into two operands of the tensor
// cores with seven instructions.
//
// Packed units (16 rows x 128 columns, 2,048 bytes; before them the scales, cuda/sm90_coded.cuh):
// four steps of 32 columns, 512 bytes each. Lane 4g+t reads 16 bytes of a step, for each 16 columns
// two words of four codes: a0 (odd) and a1 (even), a2 and a3 (cuda/sm90_codes.cuh), where a0 is
// row g, columns 2t and 2t+1, a1 row g+8, a2 row g, columns 2t+8 and 2t+9, a3 row g+8.
//
// Bytes: N K of weights once (evict first), 4 N of scales, 2 T K / cluster of x for every block.
#include "lacuna/kernels/linear_dense/cuda_sm90_coded.h"

#include "lacuna/kernels/cuda/sm90_coded.cuh"

namespace lacuna::kernels::linear_dense {
namespace {

using cuda::kSteps;
using cuda::kTileRows;

template <class CodeType>
struct CodedDense {
  using Code = CodeType;
  using Half = cuda::Bf16;
  static constexpr int kStepBytes = 512;
  static constexpr int kBytes = kSteps * kStepBytes;  // 2,048
  static constexpr bool kScaled = true;
  static constexpr bool kSparse = false;
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    return cuda::coded_max_warps(token_tiles, tiles_per_warp);
  }

  // Of a step: columns 0..15, or 16..31 (`second`).
  static __device__ __forceinline__ uint4 operand(const uint4& words, int second) {
    uint4 a;
    Code::decode(second ? words.z : words.x, &a.x, &a.y);
    Code::decode(second ? words.w : words.y, &a.z, &a.w);
    return a;
  }

  template <int NT, int MT>
  static __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], unsigned w,
                                                  int tile_stage_bytes, unsigned x,
                                                  unsigned x_stride, int lane) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      uint4 a[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        const uint4 words =
            cuda::load_shared4(w + m * tile_stage_bytes + step * kStepBytes + lane * 16);
        a[m][0] = operand(words, 0);
        a[m][1] = operand(words, 1);
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const uint4 fragment = cuda::load_matrices(x + j * 8 * x_stride + step * 64);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          Half::multiply(sums[m][j], a[m][0], fragment.x, fragment.y);
          Half::multiply(sums[m][j], a[m][1], fragment.z, fragment.w);
        }
      }
    }
  }

  static __device__ __forceinline__ void pack(const unsigned short* dense, int n, int k, int row,
                                              int column, unsigned char* unit, GpuPackReport*,
                                              int lane) {
    const int g = lane >> 2, t = lane & 3;
    // Two neighbours; rows past the end are zero.
    const auto read = [&](int r, int c) -> unsigned {
      return r < n ? *reinterpret_cast<const unsigned*>(dense + static_cast<std::size_t>(r) * k + c)
                   : 0;
    };
    const auto low = [](unsigned pair) {
      return Code::encode(static_cast<unsigned short>(pair & 0xffff));
    };
    const auto high = [](unsigned pair) {
      return Code::encode(static_cast<unsigned short>(pair >> 16));
    };
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int c = column + 32 * step + 8 * i + 2 * t;
        const unsigned odd = read(row + g, c), even = read(row + g + 8, c);
        words[i] = Code::word({low(odd), high(odd), low(even), high(even)});
      }
      *reinterpret_cast<uint4*>(unit + step * kStepBytes + lane * 16) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
  }

  static __device__ __forceinline__ void unpack(const unsigned char* unit, cuda::UnitRows& rows,
                                                float scale_g, float scale_g8, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 words = *reinterpret_cast<const uint4*>(unit + step * kStepBytes + lane * 16);
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        const uint4 a = operand(words, second);
        unsigned char* const to = rows + g * cuda::kUnpackStride + 64 * step + 32 * second + 4 * t;
        *reinterpret_cast<unsigned*>(to) = cuda::scaled_pair(a.x, scale_g);
        *reinterpret_cast<unsigned*>(to + 16) = cuda::scaled_pair(a.z, scale_g);
        *reinterpret_cast<unsigned*>(to + 8 * cuda::kUnpackStride) =
            cuda::scaled_pair(a.y, scale_g8);
        *reinterpret_cast<unsigned*>(to + 8 * cuda::kUnpackStride + 16) =
            cuda::scaled_pair(a.w, scale_g8);
      }
    }
  }

  static __device__ __forceinline__ void unpack_codes(const unsigned char* unit,
                                                      cuda::UnitRows& rows, int lane) {
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 words = *reinterpret_cast<const uint4*>(unit + step * kStepBytes + lane * 16);
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        unsigned odd, even;
        Code::rows(second ? words.z : words.x, second ? words.w : words.y, &odd, &even);
        unsigned char* const to =
            rows + g * cuda::kUnpackCodesStride + 32 * step + 16 * second + 2 * t;
        unsigned char* const below = to + 8 * cuda::kUnpackCodesStride;
        *reinterpret_cast<unsigned short*>(to) = static_cast<unsigned short>(odd);
        *reinterpret_cast<unsigned short*>(to + 8) = static_cast<unsigned short>(odd >> 16);
        *reinterpret_cast<unsigned short*>(below) = static_cast<unsigned short>(even);
        *reinterpret_cast<unsigned short*>(below + 8) = static_cast<unsigned short>(even >> 16);
      }
    }
  }
};

template <class Code>
constexpr GpuLinearKernel shown_as(const char* name) {
  using Kernel = cuda::CodedKernel<CodedDense<Code>>;
  GpuLinearKernel kernel = Kernel::shown_as("linear_dense", name);
  kernel.unpack_codes = Kernel::unpack_codes;
  return kernel;
}

}  // namespace

const GpuLinearKernel kFp8 = shown_as<cuda::Fp8>("cuda_sm90_fp8");
const GpuLinearKernel kInt8 = shown_as<cuda::Int8>("cuda_sm90_int8");

}  // namespace lacuna::kernels::linear_dense
