// CUTLASS's sparse GEMM in bf16, e4m3 and int8. One kind an object: -DPART_BF16, -DPART_FP8,
// -DPART_FP8_FAST or -DPART_INT8 (three to five minutes and up to 8 GB each).
#include "cutlass.h"

#include <cute/tensor.hpp>

#include "cutlass/cutlass.h"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/gemm/collective/collective_builder.hpp"
#include "cutlass/gemm/device/gemm_universal_adapter.h"
#include "cutlass/gemm/kernel/gemm_universal.hpp"
#include "cutlass/transform/device/transform_universal_adapter.hpp"
#include "cutlass/transform/kernel/sparse_gemm_compressor.hpp"
#include "cutlass/util/packed_stride.hpp"

namespace {

using namespace cute;
using Bf16 = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Problem = Shape<int, int, int, int>;
namespace gemm = cutlass::gemm;
namespace epilogue = cutlass::epilogue;

constexpr size_t kScratch = 16 << 20;

// W is the sparse operand A, x is B, and y comes out by columns: [N,T] column-major is [T,N].
template <class Element, class Sum, class Out, class Tile, class Cluster, class Schedule,
          class EpilogueSchedule>
struct Rival {
  static constexpr int kAligned = 16 / sizeof(Element);
  using Epilogue = typename epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      epilogue::collective::EpilogueTileAuto, Sum,
      std::conditional_t<std::is_same_v<Out, int>, int, float>, void, Column, 16 / sizeof(Out), Out,
      Column, 16 / sizeof(Out), EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, Row, kAligned, Element,
      Column, kAligned, Sum, Tile, Cluster,
      gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      Schedule>::CollectiveOp;
  using Kernel = gemm::kernel::GemmUniversal<Problem, Mainloop, Epilogue>;
  using Gemm = gemm::device::GemmUniversalAdapter<Kernel>;
  using Config = typename Mainloop::SparseConfig;
  using Utility =
      cutlass::transform::kernel::StructuredSparseCompressorUtility<Problem, Element, Row, Config>;
  using Compressor = cutlass::transform::device::TransformUniversalAdapter<
      cutlass::transform::kernel::StructuredSparseCompressor<Problem, Element, Row, Config,
                                                             cutlass::arch::Sm90>>;
  using StrideA = cutlass::gemm::TagToStrideA_t<Row>;

  static Problem problem(int n, int t, int k) { return make_tuple(n, t, k, 1); }
  static StrideA stride(int n, int k) {
    return cutlass::make_cute_packed_stride(StrideA{}, make_shape(n, k, 1));
  }
  static size_t values_bytes(int n, int k) {
    Utility u(problem(n, 128, k), stride(n, k));
    return size_t(u.get_tensorA_m_physical()) * u.get_tensorA_k_physical() * sizeof(Element);
  }
  static size_t metadata_bytes(int n, int k) {
    Utility u(problem(n, 128, k), stride(n, k));
    return size_t(u.get_metadata_m_physical()) * u.get_metadata_k_physical();
  }
  static bool compress(void* dense, int n, int k, void* values, void* metadata,
                       cudaStream_t stream) {
    cutlass::KernelHardwareInfo info;
    info.sm_count = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);
    typename Compressor::Arguments arguments{
        problem(n, 128, k),
        {static_cast<Element*>(dense), stride(n, k), static_cast<Element*>(values),
         static_cast<typename Mainloop::ElementE*>(metadata)},
        {info}};
    Compressor op;
    return op.can_implement(arguments) == cutlass::Status::kSuccess &&
           op.initialize(arguments, nullptr, stream) == cutlass::Status::kSuccess &&
           op.run(stream) == cutlass::Status::kSuccess;
  }
  static bool run(const void* values, const void* metadata, const void* x, void* y, int n, int k,
                  int t, float scale, CutlassOrder order, void* scratch, cudaStream_t stream) {
    static const int sms = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);
    const Problem shape = problem(n, t, k);
    typename Gemm::Arguments arguments{
        gemm::GemmUniversalMode::kGemm,
        shape,
        {static_cast<const Element*>(values), Config::fill_layoutA(shape),
         static_cast<const Element*>(x),
         cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(t, k, 1)),
         static_cast<const typename Mainloop::ElementE*>(metadata), Config::fill_layoutE(shape)},
        {{},
         nullptr,
         {},
         static_cast<Out*>(y),
         cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(n, t, 1))}};
    using Compute = std::conditional_t<std::is_same_v<Out, int>, int, float>;
    arguments.epilogue.thread.alpha = Compute(scale);
    arguments.epilogue.thread.beta = Compute(0);
    arguments.hw_info.sm_count = sms;
    using Raster = std::remove_reference_t<decltype(arguments.scheduler.raster_order)>;
    arguments.scheduler.max_swizzle_size = order.band;
    arguments.scheduler.raster_order = order.along == 'm'   ? Raster::AlongM
                                       : order.along == 'n' ? Raster::AlongN
                                                            : Raster::Heuristic;
    Gemm op;
    return Gemm::get_workspace_size(arguments) <= kScratch &&
           op.can_implement(arguments) == cutlass::Status::kSuccess &&
           op.initialize(arguments, scratch, stream) == cutlass::Status::kSuccess &&
           op.run(stream) == cutlass::Status::kSuccess;
  }
  static constexpr CutlassRival rival(const char* name) {
    return {name, values_bytes, metadata_bytes, compress, run};
  }
};

using Cooperative = gemm::KernelTmaWarpSpecializedCooperative;
using Pingpong = gemm::KernelTmaWarpSpecializedPingpong;
using CooperativeFast = gemm::KernelTmaWarpSpecializedCooperativeFP8FastAccum;
using PingpongFast = gemm::KernelTmaWarpSpecializedPingpongFP8FastAccum;

template <class Element, class Sum, class Out, class Schedule, int M, int N, int K, int CM, int CN>
constexpr CutlassRival cut(const char* name) {
  using EpilogueSchedule =
      std::conditional_t<std::is_same_v<Schedule, Cooperative> ||
                             std::is_same_v<Schedule, CooperativeFast>,
                         epilogue::TmaWarpSpecializedCooperative, epilogue::TmaWarpSpecialized>;
  return Rival<Element, Sum, Out, Shape<Int<M>, Int<N>, Int<K>>, Shape<Int<CM>, Int<CN>, _1>,
               Schedule, EpilogueSchedule>::rival(name);
}

}  // namespace

#define LIST(function, ...)                           \
  CutlassCuts function() {                            \
    static const CutlassRival list[] = {__VA_ARGS__}; \
    return {list, sizeof(list) / sizeof(list[0])};    \
  }

#if defined(PART_BF16)
LIST(cutlass_bf16,
     cut<Bf16, float, Bf16, Cooperative, 256, 128, 128, 2, 1>("256x128x128 cooperative 2x1"),
     cut<Bf16, float, Bf16, Cooperative, 128, 256, 128, 2, 1>("128x256x128 cooperative 2x1"),
     cut<Bf16, float, Bf16, Cooperative, 128, 128, 128, 1, 2>("128x128x128 cooperative 1x2"),
     cut<Bf16, float, Bf16, Pingpong, 128, 128, 128, 2, 1>("128x128x128 pingpong 2x1"))
#elif defined(PART_FP8)
using Fp8 = cutlass::float_e4m3_t;
LIST(cutlass_fp8,
     cut<Fp8, float, Bf16, Cooperative, 128, 128, 128, 1, 2>("128x128x128 cooperative 1x2"),
     cut<Fp8, float, Bf16, Cooperative, 128, 256, 128, 2, 1>("128x256x128 cooperative 2x1"),
     cut<Fp8, float, Bf16, Cooperative, 256, 128, 128, 2, 1>("256x128x128 cooperative 2x1"),
     cut<Fp8, float, Bf16, Pingpong, 64, 128, 256, 2, 1>("64x128x256 pingpong 2x1"))
#elif defined(PART_FP8_FAST)
using Fp8 = cutlass::float_e4m3_t;
LIST(cutlass_fp8_fast,
     cut<Fp8, float, Bf16, CooperativeFast, 256, 128, 128, 2, 1>("256x128x128 cooperative 2x1"),
     cut<Fp8, float, Bf16, CooperativeFast, 128, 256, 128, 2, 1>("128x256x128 cooperative 2x1"),
     cut<Fp8, float, Bf16, CooperativeFast, 128, 256, 128, 1, 1>("128x256x128 cooperative 1x1"),
     cut<Fp8, float, Bf16, CooperativeFast, 128, 256, 256, 2, 1>("128x256x256 cooperative 2x1"),
     cut<Fp8, float, Bf16, CooperativeFast, 256, 128, 256, 2, 1>("256x128x256 cooperative 2x1"),
     cut<Fp8, float, Bf16, CooperativeFast, 128, 128, 256, 1, 2>("128x128x256 cooperative 1x2"),
     cut<Fp8, float, Bf16, PingpongFast, 128, 128, 256, 2, 1>("128x128x256 pingpong 2x1"),
     cut<Fp8, float, Bf16, PingpongFast, 64, 256, 256, 2, 1>("64x256x256 pingpong 2x1"),
     cut<Fp8, float, Bf16, PingpongFast, 64, 128, 256, 2, 1>("64x128x256 pingpong 2x1"))
#elif defined(PART_INT8)
using std::int8_t;
LIST(cutlass_int8,
     cut<int8_t, int, Bf16, Cooperative, 256, 128, 128, 2, 1>("256x128x128 cooperative 2x1"),
     cut<int8_t, int, Bf16, Cooperative, 128, 256, 128, 2, 1>("128x256x128 cooperative 2x1"),
     cut<int8_t, int, int, Cooperative, 128, 256, 128, 2, 1>("128x256x128 cooperative 2x1 int32"),
     cut<int8_t, int, Bf16, Cooperative, 128, 128, 256, 1, 2>("128x128x256 cooperative 1x2"),
     cut<int8_t, int, Bf16, Pingpong, 128, 128, 256, 2, 1>("128x128x256 pingpong 2x1"),
     cut<int8_t, int, Bf16, Pingpong, 64, 256, 128, 2, 1>("64x256x128 pingpong 2x1"))
#endif
