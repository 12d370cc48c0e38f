// The idea: 2:4 codes of 8 bits are 5 bits a weight, and turning them into bf16 costs three and a
// half instructions a pair of kept values: a fifth of what may be issued while they are read. So
// for few tokens x stays bf16 (nothing is quantised on the way, and no kernel has to), and
// everything else is that of cuda_sm90_mma_sp. For many, where the caller lets x be rounded,
// cuda_sm90_rounded multiplies codes with codes, on the same packed weight.
//
// Packed units (16 rows x 128 columns, 1,280 bytes; before them the scales, cuda/sm90_coded.cuh):
//
//   0     256              768              1280
//   +------+----------------+----------------+     step: 32 columns
//   | meta | steps 0 and 1  | steps 2 and 3  |     metadata as in cuda_sm90_mma_sp
//   +------+----------------+----------------+
//   lane 4g+t reads 16 bytes of two steps, for each of them two words of four codes: a0 (odd) and
//   a1 (even), a2 and a3 (cuda/sm90_codes.cuh), the pairs that cuda_sm90_mma_sp has in four words.
//
// Bytes: 0.625 N K of weights once (evict first), 4 N of scales; x and sums as there.
#include "lacuna/kernels/linear_nm/cuda_sm90_coded.h"

#include "lacuna/kernels/cuda/sm90_coded.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_coded_unit.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_groups.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_rounded.h"

namespace lacuna::kernels::linear_nm {
namespace {

using cuda::kSteps;

template <class CodeType>
struct CodedTwoOfFour {
  using Code = CodeType;
  using Half = cuda::Bf16;
  static constexpr int kBytes = kCodedUnitBytes;
  static constexpr bool kScaled = true;
  static constexpr bool kSparse = true;
  static constexpr int max_warps(int token_tiles, int tiles_per_warp) {
    return cuda::coded_max_warps(token_tiles, tiles_per_warp);
  }

  // Of two steps: the operand of step 2 `pair` + `second`.
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
    uint2 metadata[MT];
#pragma unroll
    for (int m = 0; m < MT; ++m) {
      metadata[m] = cuda::load_shared2(w + m * tile_stage_bytes + lane * 8);
    }
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      uint4 words[MT];
#pragma unroll
      for (int m = 0; m < MT; ++m) {
        words[m] = cuda::load_shared4(w + m * tile_stage_bytes + kCodedMetadataBytes +
                                      pair * kCodedPairBytes + lane * 16);
      }
#pragma unroll
      for (int second = 0; second < 2; ++second) {
        uint4 a[MT];
#pragma unroll
        for (int m = 0; m < MT; ++m) a[m] = operand(words[m], second);
#pragma unroll
        for (int j = 0; j < NT; ++j) {
          const uint4 fragment =
              cuda::load_matrices(x + j * 8 * x_stride + (2 * pair + second) * 64);
#pragma unroll
          for (int m = 0; m < MT; ++m) {
            const unsigned e = pair == 0 ? metadata[m].x : metadata[m].y;
            if (second == 0) {
              Half::multiply_sparse<0>(sums[m][j], a[m], fragment, e);
            } else {
              Half::multiply_sparse<1>(sums[m][j], a[m], fragment, e);
            }
          }
        }
      }
    }
  }

  static __device__ __forceinline__ void pack(const unsigned short* dense, int n, int k, int row,
                                              int column, unsigned char* unit,
                                              GpuPackReport* report, int lane) {
    const DenseGroups groups{dense, n, k};
    const int g = lane >> 2, t = lane & 3;
#pragma unroll
    for (int pair = 0; pair < kSteps / 2; ++pair) {
      unsigned words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // halves of the two steps
        const int group = column + 32 * (2 * pair + i / 2) + 4 * (t + 4 * (i % 2));
        const Group odd = groups.read(row + g, group, report);
        const Group even = groups.read(row + g + 8, group, report);
        words[i] = Code::word({Code::encode(odd.value[0]), Code::encode(odd.value[1]),
                               Code::encode(even.value[0]), Code::encode(even.value[1])});
      }
      *reinterpret_cast<uint4*>(unit + kCodedMetadataBytes + pair * kCodedPairBytes + lane * 16) =
          make_uint4(words[0], words[1], words[2], words[3]);
    }
    *reinterpret_cast<uint2*>(unit + lane * 8) = groups.metadata(row, column, lane);
  }

  static __device__ __forceinline__ void unpack(const unsigned char* unit, cuda::UnitRows& rows,
                                                float scale_g, float scale_g8, int lane) {
    const uint2 metadata = *reinterpret_cast<const uint2*>(unit + lane * 8);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint4 words = *reinterpret_cast<const uint4*>(unit + kCodedMetadataBytes +
                                                          step / 2 * kCodedPairBytes + lane * 16);
      unpack_step(operand(words, step % 2), metadata, step, scale_g, scale_g8, rows, lane);
    }
  }
};

// The kernel of few tokens, and that of many with rounded x.
template <class Code, const Rounded& kRounded>
struct Shown {
  using Stream = cuda::CodedKernel<CodedTwoOfFour<Code>>;

  static int plan(const GpuLayout* layout, int64_t tokens, GpuPlan* plan) {
    GpuPlan made;
    const int error = Stream::plan(layout, tokens, &made);
    if (error == cudaSuccess) {
      hold(plan, CodedCall{tokens, held<typename Stream::Call>(&made).plan});
    }
    return error;
  }

  static int plan_rounded(const GpuLayout* layout, int64_t tokens, GpuPlan* plan) {
    const auto [n, k] = held<cuda::CodedShape>(layout);
    RoundedPlan made;
    const cudaError_t error = kRounded.plan(n, k, tokens, &made);
    if (error == cudaSuccess) {
      CodedCall call{tokens, {}};
      std::visit([&](const auto& cut) { call.plan = cut; }, made);
      hold(plan, call);
    }
    return error;
  }

  static int run(const GpuLayout* layout, const GpuPlan* plan, const void* packed, const void* x,
                 void* y, void* workspace, int overlap_previous, GpuStream stream) {
    const auto call = held<CodedCall>(plan);
    if (const auto* cut = std::get_if<cuda::StreamPlan>(&call.plan)) {
      GpuPlan few;
      hold(&few, typename Stream::Call{call.t, *cut});
      return Stream::run(layout, &few, packed, x, y, nullptr, overlap_previous, stream);
    }
    const auto shape = held<cuda::CodedShape>(layout);
    const auto* cut = std::get_if<ResidentPlan>(&call.plan);
    const RoundedOperands operands = {
        static_cast<const unsigned char*>(packed) + shape.scale_bytes(),
        static_cast<const float*>(packed), x, y, workspace};
    return kRounded.run(
        operands, shape.n, shape.k, call.t,
        cut != nullptr ? RoundedPlan(*cut) : RoundedPlan(std::get<WgmmaSpPlan>(call.plan)),
        overlap_previous != 0, static_cast<cudaStream_t>(stream));
  }

  static constexpr GpuLinearKernel as(const char* name) {
    GpuLinearKernel kernel = Stream::shown_as("linear_nm", name);
    kernel.plan = plan;
    kernel.workspace_bytes = [](const GpuLayout* layout, const GpuPlan* plan) -> size_t {
      const auto call = held<CodedCall>(plan);
      return std::holds_alternative<cuda::StreamPlan>(call.plan)
                 ? 0
                 : rounded_workspace_bytes(held<cuda::CodedShape>(layout).k, call.t);
    };
    kernel.run = run;
    kernel.rounded_from = [](const GpuLayout* layout) -> int64_t {
      const auto [n, k] = held<cuda::CodedShape>(layout);
      return rounded_from_tokens(n, k);
    };
    kernel.plan_rounded = plan_rounded;
    return kernel;
  }
};

}  // namespace

const GpuLinearKernel kFp8 = Shown<cuda::Fp8, kRoundedFp8>::as("cuda_sm90_fp8");
const GpuLinearKernel kInt8 = Shown<cuda::Int8, kRoundedInt8>::as("cuda_sm90_int8");

}  // namespace lacuna::kernels::linear_nm
