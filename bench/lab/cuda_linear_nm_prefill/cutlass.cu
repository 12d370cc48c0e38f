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
using Element = cutlass::bfloat16_t;
using Row = cutlass::layout::RowMajor;
using Column = cutlass::layout::ColumnMajor;
using Problem = Shape<int, int, int, int>;
namespace gemm = cutlass::gemm;
namespace epilogue = cutlass::epilogue;

constexpr size_t kScratch = 16 << 20;

// W is the sparse operand A, x is B, and y comes out by columns: [N,T] column-major is [T,N].
template <class Tile, class Cluster, class Schedule, class EpilogueSchedule>
struct Rival {
  using Epilogue = typename epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Tile, Cluster,
      epilogue::collective::EpilogueTileAuto, float, float, void, Column, 8, Element, Column, 8,
      EpilogueSchedule>::CollectiveOp;
  using Mainloop = typename gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassSparseTensorOp, Element, Row, 8, Element, Column,
      8, float, Tile, Cluster,
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
    return size_t(u.get_tensorA_m_physical()) * u.get_tensorA_k_physical() * 2;
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
                  int t, void* scratch, cudaStream_t stream) {
    static const int sms = cutlass::KernelHardwareInfo::query_device_multiprocessor_count(0);
    const Problem shape = problem(n, t, k);
    typename Gemm::Arguments arguments{
        gemm::GemmUniversalMode::kGemm,
        shape,
        {static_cast<const Element*>(values), Config::fill_layoutA(shape),
         static_cast<const Element*>(x),
         cutlass::make_cute_packed_stride(typename Kernel::StrideB{}, make_shape(t, k, 1)),
         static_cast<const typename Mainloop::ElementE*>(metadata), Config::fill_layoutE(shape)},
        {{1.f, 0.f},
         nullptr,
         {},
         static_cast<Element*>(y),
         cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, make_shape(n, t, 1))}};
    arguments.hw_info.sm_count = sms;
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
using CooperativeEpilogue = epilogue::TmaWarpSpecializedCooperative;
using Pingpong = gemm::KernelTmaWarpSpecializedPingpong;
using PingpongEpilogue = epilogue::TmaWarpSpecialized;

}  // namespace

const CutlassRival kCutlass[] = {
    Rival<Shape<_128, _256, _128>, Shape<_2, _1, _1>, Cooperative, CooperativeEpilogue>::rival(
        "128x256x128 cooperative 2x1"),
    Rival<Shape<_128, _256, _64>, Shape<_2, _1, _1>, Cooperative, CooperativeEpilogue>::rival(
        "128x256x64 cooperative 2x1"),
    Rival<Shape<_256, _128, _128>, Shape<_2, _1, _1>, Cooperative, CooperativeEpilogue>::rival(
        "256x128x128 cooperative 2x1"),
    Rival<Shape<_128, _128, _128>, Shape<_1, _2, _1>, Cooperative, CooperativeEpilogue>::rival(
        "128x128x128 cooperative 1x2"),
    Rival<Shape<_64, _256, _128>, Shape<_2, _1, _1>, Pingpong, PingpongEpilogue>::rival(
        "64x256x128 pingpong 2x1"),
    Rival<Shape<_128, _128, _128>, Shape<_2, _1, _1>, Pingpong, PingpongEpilogue>::rival(
        "128x128x128 pingpong 2x1"),
};
const int kCutlassCount = sizeof(kCutlass) / sizeof(kCutlass[0]);
