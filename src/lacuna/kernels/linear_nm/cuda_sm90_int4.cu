// The idea: 2:4 codes of 4 bits are 3.25 bits a weight, a fifth of bf16. Each group of 64 columns
// has a scale of its own, so its sums stay apart until they have met it: eight multiply-adds a unit
// and eight tokens, against sixteen products if the weights met it instead, which would round them
// once more. Everything else is that of cuda_sm90_coded.
//
// Packed units (16 rows x 128 columns, 832 bytes):
//
//   0     256                          768      832
//   +------+----------------------------+--------+     metadata as in cuda_sm90_mma_sp
//   | meta | codes of steps 0, 1, 2, 3  | scales |     step: 32 columns
//   +------+----------------------------+--------+
//   lane 4g+t reads 16 bytes of codes, a word a step: the pair a_p (p = 0..3) of cuda_sm90_mma_sp
//   lies in bits 4p..4p+3 (low half) and 16+4p..16+4p+3 (high half), code + 8. It reads 8 bytes of
//   scales at 8g: for each half of the columns those of rows g (low) and g + 8, bf16.
//
// Bytes: 0.40625 N K of weights once (evict first); x and sums as there. Turning a pair into bf16
// takes two and three quarter instructions: 128 + code + 8 is a bf16 number whose fraction begins
// with the code, and 136 goes again.
#include "lacuna/kernels/linear_nm/cuda_sm90_int4.h"

#include "lacuna/kernels/cuda/sm90_coded.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_groups.cuh"

namespace lacuna::kernels::linear_nm {
namespace {

using cuda::kSteps;

constexpr int kGroupColumns = 64;
constexpr int kGroupsPerUnit = cuda::kUnitColumns / kGroupColumns;

__device__ __forceinline__ unsigned pair_of(unsigned word, int pair) {
  unsigned v;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;"
      : "=r"(v)
      : "r"((word >> (4 * pair) & 0x000f000f) | 0x43004300), "r"(0x3f803f80), "r"(0xc308c308));
  return v;
}

__device__ __forceinline__ uint4 operand(unsigned word) {
  return make_uint4(pair_of(word, 0), pair_of(word, 1), pair_of(word, 2), pair_of(word, 3));
}

__device__ __forceinline__ unsigned word_of(const uint4& words, int step) {
  return step == 0 ? words.x : step == 1 ? words.y : step == 2 ? words.z : words.w;
}

// Of rows g and g + 8, for the groups of a unit.
struct Scales {
  unsigned words[kGroupsPerUnit];

  __device__ __forceinline__ float row_g(int group) const {
    return __uint_as_float(words[group] << 16);
  }
  __device__ __forceinline__ float row_g8(int group) const {
    return __uint_as_float(words[group] & 0xffff0000u);
  }
};

struct Int4TwoOfFour {
  using Half = cuda::Bf16;
  static constexpr int kMetadataBytes = 256, kCodeBytes = 512;
  static constexpr int kScalesAt = kMetadataBytes + kCodeBytes;
  static constexpr int kBytes = kScalesAt + 8 * 4 * kGroupsPerUnit;  // 832
  static constexpr bool kScaled = false;
  static constexpr bool kSparse = true;
  // From two token tiles on, the sums of a group and both its operands want registers more than
  // warps (5 % at 16 tokens).
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    const int fragments = token_tiles * tiles_per_warp;
    return fragments > 8     ? 11
           : fragments > 4   ? 15
           : token_tiles > 1 ? (fragments > 2 ? 16 : 23)
                             : 30;
  }

  template <int NT, int MT>
  static __device__ __forceinline__ void multiply(float (&sums)[MT][NT][4], unsigned w,
                                                  int tile_stage_bytes, unsigned x,
                                                  unsigned x_stride, int lane) {
    uint2 metadata[MT];
    uint4 words[MT];
    Scales scales[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      const unsigned unit = w + m * tile_stage_bytes;
      metadata[m] = cuda::load_shared2(unit + lane * 8);
      words[m] = cuda::load_shared4(unit + kMetadataBytes + lane * 16);
      const uint2 both = cuda::load_shared2(unit + kScalesAt + (lane >> 2) * 8);
      scales[m] = {both.x, both.y};
    }
#pragma unroll
    for (int group = 0; group < kGroupsPerUnit; ++group) {
      uint4 a[MT][2];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          a[m][half] = operand(word_of(words[m], 2 * group + half));
        }
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        const unsigned at = x + j * 8 * x_stride + group * (2 * kGroupColumns);
        const uint4 first = cuda::load_matrices(at), second = cuda::load_matrices(at + 64);
#pragma unroll
        for (int m = 0; m < MT; ++m) {
          const unsigned e = group == 0 ? metadata[m].x : metadata[m].y;
          float part[4] = {0.f, 0.f, 0.f, 0.f};
          Half::multiply_sparse<0>(part, a[m][0], first, e);
          Half::multiply_sparse<1>(part, a[m][1], second, e);
          const float scale_g = scales[m].row_g(group), scale_g8 = scales[m].row_g8(group);
          sums[m][j][0] = fmaf(part[0], scale_g, sums[m][j][0]);
          sums[m][j][1] = fmaf(part[1], scale_g, sums[m][j][1]);
          sums[m][j][2] = fmaf(part[2], scale_g8, sums[m][j][2]);
          sums[m][j][3] = fmaf(part[3], scale_g8, sums[m][j][3]);
        }
      }
    }
  }

  static __device__ __forceinline__ unsigned encode(unsigned short bf16) {
    return static_cast<unsigned>(
               static_cast<int>(__uint_as_float(static_cast<unsigned>(bf16) << 16)) + 8) &
           0xf;
  }

  static __device__ __forceinline__ void pack(const unsigned short* dense, int n, int k, int row,
                                              int column, unsigned char* unit,
                                              GpuPackReport* report, int lane) {
    const DenseGroups groups{dense, n, k};
    const int g = lane >> 2, t = lane & 3;
    unsigned words[kSteps] = {};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int pair = 0; pair < 4; ++pair) {
        const Group group = groups.read(row + g + 8 * (pair % 2),
                                        column + 32 * step + 4 * (t + 4 * (pair / 2)), report);
        words[step] |= encode(group.value[0]) << (4 * pair) | encode(group.value[1])
                                                                  << (16 + 4 * pair);
      }
    }
    *reinterpret_cast<uint4*>(unit + kMetadataBytes + lane * 16) =
        make_uint4(words[0], words[1], words[2], words[3]);
    *reinterpret_cast<uint2*>(unit + lane * 8) = groups.metadata(row, column, lane);
  }

  // @param scales  bf16 [n, k / 64]
  static __device__ __forceinline__ void pack_scales(const unsigned short* scales, int n, int k,
                                                     int row, int column, unsigned char* unit,
                                                     int lane) {
    const int g = lane >> 2, group = lane & 3;
    if (group >= kGroupsPerUnit) return;
    const auto of = [&](int r) -> unsigned {
      if (r >= n) return 0;
      return scales[static_cast<std::size_t>(r) * (k / kGroupColumns) + column / kGroupColumns +
                    group];
    };
    *reinterpret_cast<unsigned*>(unit + kScalesAt + 8 * g + 4 * group) =
        of(row + g) | of(row + g + 8) << 16;
  }

  static __device__ __forceinline__ void unpack(const unsigned char* unit, cuda::UnitRows& rows,
                                                int lane) {
    const int g = lane >> 2;
    const uint2 metadata = *reinterpret_cast<const uint2*>(unit + lane * 8);
    const uint4 words = *reinterpret_cast<const uint4*>(unit + kMetadataBytes + lane * 16);
    const uint2 both = *reinterpret_cast<const uint2*>(unit + kScalesAt + 8 * g);
    const Scales scales{both.x, both.y};
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      unpack_step(operand(word_of(words, step)), metadata, step, scales.row_g(step / 2),
                  scales.row_g8(step / 2), rows, lane);
    }
  }
};

}  // namespace

const GpuLinearKernel kInt4 =
    cuda::CodedKernel<Int4TwoOfFour>::shown_as("linear_nm", "cuda_sm90_int4");

}  // namespace lacuna::kernels::linear_nm
