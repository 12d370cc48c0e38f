// The idea: one token reads every weight once, so only the memory counts. Each multiprocessor has
// one block whose producer keeps a ring of whole rows full with bulk copies; and as weights wait
// for nobody, up to 192 KB of them are there before the kernel ahead is done (programmatic
// dependent launch): what lies between two products is hidden behind it. Until then only 64 KB are
// in flight at a time, for the kernel ahead loads too, and its loads wait behind them.
//
//   block: rows [b N / blocks, (b+1) N / blocks), a stage = R whole rows as they lie in memory
//
//     +-- stage 0: R rows --+-- stage 1 --+ ... +-- the sums of each stage: [K warp][row] --+
//
//   16 consumers: row groups x K warps. K warp w multiplies columns 256 w .. 256 w + 255, and every
//   256 (K warps) further on, of the rows of its group; its x stays in registers.
//   producer: when all have read a stage, adds up its sums, asks for the stage after the ring, and
//   stores y.
//
// Bytes: 2 N K once (evict first), 2 K of x for every block, from L2. A warp reads 512 bytes of a
// row with one instruction and spends 25 on them; the memory takes 26 cycles for 512 bytes of a
// multiprocessor, in which four warps issue 104.
//
// A decode step of Llama-3.1-8B's shapes (bench/lab/cuda_decode_step): rings of 96 KB, of which two
// blocks share a multiprocessor, cost 7 to 20 %, stages of 16 KB 2 to 12 %, everything in flight at
// once 2 %.
#include "lacuna/kernels/linear_dense/cuda_sm90_stream.h"

#include <cuda_runtime.h>

#include <algorithm>

#include "lacuna/kernels/cuda/halves.cuh"
#include "lacuna/kernels/cuda/sm90_async.h"
#include "lacuna/kernels/cuda/sm90_device.h"

namespace lacuna::kernels::linear_dense {
namespace {

using namespace cuda;

constexpr int kConsumers = 16;
constexpr int kThreads = (kConsumers + 1) * 32;
constexpr int kUnitColumns = 256;  // 16 bytes a lane
constexpr int kUnitBytes = 2 * kUnitColumns;
constexpr int kRingBytes = 192 * 1024;
constexpr int kStageBytes = 32 * 1024;  // wanted; a row may be longer
constexpr int kPieceBytes = 8 * 1024;   // of one copy
constexpr int kAheadBytes = 64 * 1024;  // in flight before the kernel ahead is done
constexpr int kMaxStages = 16;
constexpr int kMaxRows = 32;  // of a stage

struct Params {
  const unsigned char* w;
  const uint4* x;
  unsigned short* y;
  int n, row_bytes;
  int rows_log2, stages, at_once;  // rows of a stage; stages in flight before the wait
  int k_warps_log2;
  int sums_offset, barriers_offset;
};

// kUnits: most units of a warp.
template <class Half, int kUnits>
__global__ void __launch_bounds__(kThreads, 1) linear_stream_kernel(const Params p) {
  extern __shared__ __align__(128) unsigned char shared[];
  const unsigned base = shared_address(shared);
  const int warp = __shfl_sync(~0u, threadIdx.x >> 5, 0), lane = threadIdx.x & 31;
  const int first = static_cast<int>(static_cast<std::int64_t>(blockIdx.x) * p.n / gridDim.x);
  const int end = static_cast<int>((blockIdx.x + std::int64_t{1}) * p.n / gridDim.x);
  const int rows = 1 << p.rows_log2, k_warps = 1 << p.k_warps_log2;
  const int count = (end - first + rows - 1) >> p.rows_log2;  // stages of this block
  const unsigned stage_bytes = static_cast<unsigned>(p.row_bytes) << p.rows_log2;
  const unsigned full = base + p.barriers_offset, empty = full + 8 * kMaxStages;
  float* const sums = reinterpret_cast<float*>(shared + p.sums_offset);
  const int stage_sums = rows << p.k_warps_log2;

  if (warp == kConsumers) {  // the producer
    const std::uint64_t policy = evict_first();
    auto fill = [&](int i, int slot) {
      const int row = first + (i << p.rows_log2);
      const unsigned bytes = min(rows, end - row) * p.row_bytes;
      const unsigned char* from = p.w + static_cast<std::size_t>(row) * p.row_bytes;
      if (lane == 0) barrier_expect(full + 8 * slot, bytes);
      __syncwarp();
#pragma unroll 1
      for (unsigned at = lane * kPieceBytes; at < bytes; at += 32 * kPieceBytes) {
        bulk_copy_once(base + slot * stage_bytes + at, from + at,
                       min(bytes - at, static_cast<unsigned>(kPieceBytes)), full + 8 * slot,
                       policy);
      }
    };
    if (lane == 0) {
#pragma unroll 1
      for (int s = 0; s < p.stages; ++s) {
        barrier_init(full + 8 * s, 1);
        barrier_init(empty + 8 * s, kConsumers);
      }
      barrier_init_fence();
    }
    __syncwarp();
#pragma unroll 1
    for (int s = 0; s < min(p.at_once, count); ++s) fill(s, s);
    __syncthreads();
    launch_next();
#pragma unroll 1
    for (int s = p.at_once; s < min(p.stages, count); ++s) {
      barrier_wait(full + 8 * (s - p.at_once), 0);
      fill(s, s);
    }
    await_previous();
    // Lane `part` 2^rows_log2 + r adds up every so manieth K warp's sum of row r.
    const int r = lane & (rows - 1), part = lane >> p.rows_log2, parts = 32 >> p.rows_log2;
    unsigned phase = 0;
#pragma unroll 1
    for (int i = 0, slot = 0; i < count; ++i) {
      barrier_wait(empty + 8 * slot, phase);
      const float* own = sums + slot * stage_sums + r;
      float sum = 0;
#pragma unroll 1
      for (int w = part; w < k_warps; w += parts) sum += own[w << p.rows_log2];
      __syncwarp();
      if (i + p.stages < count) fill(i + p.stages, slot);
#pragma unroll 1
      for (int step = 16; step >= rows; step >>= 1) sum += __shfl_xor_sync(~0u, sum, step);
      const int row = first + (i << p.rows_log2) + r;
      if (part == 0 && row < end) p.y[row] = Half::round(sum);
      if (++slot == p.stages) {
        slot = 0;
        phase ^= 1;
      }
    }
    return;
  }

  const int k_warp = warp & (k_warps - 1), group = warp >> p.k_warps_log2;
  const int groups = kConsumers >> p.k_warps_log2;
  __syncthreads();
  launch_next();
  await_previous();
  // Lanes past the end of a row read neither x nor what stands in the ring there.
  const int column = k_warp * kUnitBytes + lane * 16, stride = k_warps * kUnitBytes;  // bytes
  uint4 x[kUnits];
#pragma unroll
  for (int u = 0; u < kUnits; ++u) {
    x[u] = column + u * stride < p.row_bytes ? p.x[(column + u * stride) / 16]
                                             : make_uint4(0, 0, 0, 0);
  }
  unsigned phase = 0;
#pragma unroll 1
  for (int i = 0, slot = 0; i < count; ++i) {
    barrier_wait(full + 8 * slot, phase);
    const int here = min(rows, end - first - (i << p.rows_log2));
    const unsigned from = base + slot * stage_bytes + column;
    float* const to = sums + slot * stage_sums + (k_warp << p.rows_log2);
#pragma unroll 4
    for (int r = group; r < here; r += groups) {
      float sum[4] = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
      for (int u = 0; u < kUnits; ++u) {
        if (column + u * stride >= p.row_bytes) continue;
        const uint4 w = load_shared4(from + r * p.row_bytes + u * stride);
        const unsigned ws[4] = {w.x, w.y, w.z, w.w}, xs[4] = {x[u].x, x[u].y, x[u].z, x[u].w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          sum[j] = fmaf(Half::low(ws[j]), Half::low(xs[j]), sum[j]);
          sum[j] = fmaf(Half::high(ws[j]), Half::high(xs[j]), sum[j]);
        }
      }
      float all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
#pragma unroll
      for (int step = 16; step > 0; step >>= 1) all += __shfl_xor_sync(~0u, all, step);
      if (lane == 0) to[r] = all;
    }
    __syncwarp();
    if (lane == 0) barrier_arrive(empty + 8 * slot);
    if (++slot == p.stages) {
      slot = 0;
      phase ^= 1;
    }
  }
}

// ---------- host ----------

int ceil_div(std::int64_t a, std::int64_t b) { return static_cast<int>((a + b - 1) / b); }

struct Shape {
  std::int64_t n, k;
};

// How a shape is cut.
struct Cut {
  int blocks, rows_log2, stages, at_once, k_warps_log2, units;  // most units of a warp
  int sums_offset, barriers_offset, shared_bytes;
};

Cut cut_of(const Shape& shape, int multiprocessors) {
  const int units = ceil_div(shape.k, kUnitColumns), row_bytes = static_cast<int>(shape.k * 2);
  Cut c = {};
  while ((1 << c.k_warps_log2) < std::min(units, kConsumers)) ++c.k_warps_log2;
  c.units = ceil_div(units, 1 << c.k_warps_log2);
  c.blocks = static_cast<int>(std::min<std::int64_t>(shape.n, multiprocessors));
  while ((2 << c.rows_log2) <= kMaxRows && (2 * row_bytes << c.rows_log2) <= kStageBytes)
    ++c.rows_log2;
  const int stage_bytes = row_bytes << c.rows_log2;
  c.stages = std::min(kRingBytes / stage_bytes, kMaxStages);
  c.at_once = std::clamp(kAheadBytes / stage_bytes, 1, c.stages);
  c.sums_offset = c.stages * stage_bytes;
  c.barriers_offset = c.sums_offset + c.stages * (4 << (c.rows_log2 + c.k_warps_log2));
  c.shared_bytes = c.barriers_offset + 2 * 8 * kMaxStages;
  return c;
}

using Kernel = void (*)(const Params);

template <class Half>
Kernel find_kernel(int units) {
  return units == 1   ? linear_stream_kernel<Half, 1>
         : units == 2 ? linear_stream_kernel<Half, 2>
         : units <= 4 ? linear_stream_kernel<Half, 4>
                      : linear_stream_kernel<Half, 8>;
}

template <class Half>
int make_plan(const GpuLayout* layout, std::int64_t tokens, GpuPlan* plan) {
  const Shape shape = held<Shape>(layout);
  if (stream_shape_refusal(shape.n, shape.k, tokens) != nullptr) return cudaErrorInvalidValue;
  int multiprocessors = 0;
  const cudaError_t error = cuda::multiprocessors(&multiprocessors);
  if (error != cudaSuccess) return error;
  const Cut cut = cut_of(shape, multiprocessors);
  hold(plan, cut);
  return cudaFuncSetAttribute(find_kernel<Half>(cut.units),
                              cudaFuncAttributeMaxDynamicSharedMemorySize, 227 * 1024);
}

template <class Half>
int run(const GpuLayout* layout, const GpuPlan* plan, const void* w, const void* x, void* y, void*,
        int overlap_previous, GpuStream stream) {
  const Shape shape = held<Shape>(layout);
  const Cut cut = held<Cut>(plan);
  if (w == nullptr || x == nullptr || y == nullptr ||
      (reinterpret_cast<std::uintptr_t>(w) | reinterpret_cast<std::uintptr_t>(x)) % 16 != 0)
    return cudaErrorInvalidValue;
  const Params p = {.w = static_cast<const unsigned char*>(w),
                    .x = static_cast<const uint4*>(x),
                    .y = static_cast<unsigned short*>(y),
                    .n = static_cast<int>(shape.n),
                    .row_bytes = static_cast<int>(shape.k * 2),
                    .rows_log2 = cut.rows_log2,
                    .stages = cut.stages,
                    .at_once = overlap_previous ? cut.at_once : cut.stages,
                    .k_warps_log2 = cut.k_warps_log2,
                    .sums_offset = cut.sums_offset,
                    .barriers_offset = cut.barriers_offset};
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cut.blocks);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = cut.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = overlap_previous ? 1 : 0;
  return cudaLaunchKernelEx(&config, find_kernel<Half>(cut.units), p);
}

template <class Half>
constexpr GpuLinearKernel kernel_of(const char* name) {
  return {
      .operation = "linear_dense",
      .name = name,
      .scratch_bytes = [](int64_t, int64_t) -> size_t { return 0; },
      .measure = [](const void*, int64_t n, int64_t k, void*, GpuLayout* layout, GpuStream) -> int {
        layout->packed_bytes = 0;
        hold(layout, Shape{n, k});
        return cudaSuccess;
      },
      .pack = [](const GpuLayout*, const void*, const void*, void*, GpuPackReport*,
                 GpuStream) -> int { return cudaSuccess; },
      .unpack = [](const GpuLayout* layout, const void* w, void* dense, GpuStream stream) -> int {
        const Shape shape = held<Shape>(layout);
        return cudaMemcpyAsync(dense, w, static_cast<size_t>(shape.n * shape.k * 2),
                               cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream));
      },
      .max_tokens = [](const GpuLayout*) -> int64_t { return 1; },
      .many_tokens = [](const GpuLayout*) -> int64_t { return 0; },
      .plan = make_plan<Half>,
      .workspace_bytes = [](const GpuLayout*, const GpuPlan*) -> size_t { return 0; },
      .run = run<Half>,
  };
}

}  // namespace

const GpuLinearKernel kStream = kernel_of<Bf16>("cuda_sm90_stream");
const GpuLinearKernel kStreamF16 = kernel_of<Fp16>("cuda_sm90_stream_f16");

}  // namespace lacuna::kernels::linear_dense
