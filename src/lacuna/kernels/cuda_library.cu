// liblacuna_cuda.so's only export: the table of its kernels. A new kernel is one more line here,
// and a candidate of the same name in its folder's list.cc.
#include <cuda_runtime_api.h>

#include "lacuna/kernels/code_product/cuda_sm90_code_product.h"
#include "lacuna/kernels/column_loop/cuda_sm80_column_loop.h"
#include "lacuna/kernels/decode/cuda_sm80_decode.h"
#include "lacuna/kernels/expand/cuda_sm80_expand.h"
#include "lacuna/kernels/gpu_abi.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_coded.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_scatter.h"
#include "lacuna/kernels/linear_bsr/cuda_sm80_block.h"
#include "lacuna/kernels/linear_csr/cuda_sm80_cusparse.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_coded.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_stream.h"
#include "lacuna/kernels/linear_nm/cuda_sm80_cusparselt.h"
#include "lacuna/kernels/linear_nm/cuda_sm80_mma_sp.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_coded.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_int4.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp.h"

namespace lacuna::kernels {
namespace {

constexpr const GpuLinearKernel* kLinear[] = {
    &linear_bitmap::kGap,      &linear_bitmap::kWindow,     &linear_bitmap::kGapFp8,
    &linear_bitmap::kGapInt8,  &linear_bitmap::kFp8,        &linear_bitmap::kInt8,
    &linear_bitmap::kScatter,  &linear_bitmap::kScatterF16, &linear_bsr::kBlock,
    &linear_bsr::kBlockF16,    &linear_csr::kCusparse,      &linear_dense::kStream,
    &linear_dense::kStreamF16, &linear_dense::kFp8,         &linear_dense::kInt8,
    &linear_nm::kCusparselt,   &linear_nm::kMmaSp,          &linear_nm::kMmaSpF16,
    &linear_nm::kMmaSp80,      &linear_nm::kMmaSp80F16,     &linear_nm::kFp8,
    &linear_nm::kInt8,         &linear_nm::kInt4,
};

cudaStream_t stream_of(GpuStream stream) { return static_cast<cudaStream_t>(stream); }

int record_end(GpuStream stream, GpuRecording* recording) {
  cudaGraph_t graph = nullptr;
  if (const cudaError_t error = cudaStreamEndCapture(stream_of(stream), &graph)) return error;
  cudaGraphExec_t made = nullptr;
  const cudaError_t error = cudaGraphInstantiate(&made, graph, 0);
  cudaGraphDestroy(graph);
  *recording = made;
  return error;
}

const GpuTable kTable = {
    .version = kGpuAbiVersion,
    .error_text = [](int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); },
    .expand = [](const GpuBitmapMatrix* matrix, void* dense, GpuStream stream) -> int {
      return expand::expand(*matrix, dense, stream_of(stream));
    },
    .linear = kLinear,
    .linear_count = sizeof(kLinear) / sizeof(kLinear[0]),
    .decode = &decode::kCuda,
    .copy = [](void* to, const void* from, size_t bytes, GpuStream stream) -> int {
      return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream_of(stream));
    },
    .last_error = []() -> int { return cudaGetLastError(); },
    .wait = [](GpuStream stream) -> int { return cudaStreamSynchronize(stream_of(stream)); },
    .record_begin = [](GpuStream stream) -> int {
      return cudaStreamBeginCapture(stream_of(stream), cudaStreamCaptureModeThreadLocal);
    },
    .record_end = record_end,
    .replay = [](GpuRecording recording, GpuStream stream) -> int {
      return cudaGraphLaunch(static_cast<cudaGraphExec_t>(recording), stream_of(stream));
    },
    .forget =
        [](GpuRecording recording) {
          cudaGraphExecDestroy(static_cast<cudaGraphExec_t>(recording));
        },
    .column_loop = [](const GpuColumnLoop* stripe, GpuStream stream) -> int {
      return column_loop::column_loop(*stripe, stream_of(stream));
    },
    .round_tokens = [](const GpuRounding* rounding, GpuStream stream) -> int {
      return code_product::round_tokens(*rounding, stream_of(stream));
    },
    .scale_sums = [](const GpuScaling* scaling, GpuStream stream) -> int {
      return code_product::scale_sums(*scaling, stream_of(stream));
    },
    .has_cusparse = []() -> int { return linear_csr::cusparse_is_there(); },
    .has_cusparselt = []() -> int { return linear_nm::cusparselt_is_there(); },
};

}  // namespace
}  // namespace lacuna::kernels

extern "C" __attribute__((visibility("default"))) const lacuna::kernels::GpuTable*
lacuna_gpu_table() {
  return &lacuna::kernels::kTable;
}
