// How much of the expansion of unstructured weights can hide behind the dense products of a prompt.
//   bench PERCENT TOKENS...    e.g. bench 50 512 2048 8192
// Four layers of llama-3.1-8b's linears, all expanded weights compared before anything is timed;
// milliseconds a layer, medians of graph replays. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_expand_ahead/bench.cu src/lacuna/kernels/linear_bitmap/cuda_sm90_gap.cu
//     -lcublas -lcublasLt -o build/gpu/bench
#include "../cuda_harness.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"

namespace lb = lacuna::kernels::linear_bitmap;

constexpr int kLayers = 4;
constexpr int kOut[] = {6144, 4096, 28672, 4096}, kIn[] = {4096, 4096, 4096, 14336};

struct Weight {
  int n, k;
  bf16* dense;
  unsigned char* packed;
  lb::GapLayout layout;
};
static vector<Weight> weights;
static bf16 *x, *y, *buffers[2];
static cublasHandle_t blas;
static void* workspace;
static cudaStream_t side[2];
static cudaEvent_t expanded[2], freed[2], fork_event;

static void gemm(const Weight& w, const bf16* dense, int t) {
  const float one = 1, zero = 0;
  CB(cublasGemmEx(blas, CUBLAS_OP_T, CUBLAS_OP_N, w.n, t, w.k, &one, dense, CUDA_R_16BF, w.k, x,
                  CUDA_R_16BF, w.k, &zero, y, CUDA_R_16BF, w.n, CUBLAS_COMPUTE_32F,
                  CUBLAS_GEMM_DEFAULT));
}

static void unpack(const Weight& w, bf16* to, cudaStream_t on) {
  CK(lb::gap_unpack(w.packed, w.layout, to, on));
}

// All layers, each product after its expansion, or two expansions ahead of it on another stream.
static void sequence(cudaStream_t other, int t) {
  const int count = (int)weights.size();
  if (other == nullptr) {
    for (int i = 0; i < count; i++) {
      unpack(weights[i], buffers[0], st);
      gemm(weights[i], buffers[0], t);
    }
    return;
  }
  CK(cudaEventRecord(fork_event, st));
  CK(cudaStreamWaitEvent(other, fork_event));
  for (int i = 0; i < 2; i++) {
    unpack(weights[i], buffers[i], other);
    CK(cudaEventRecord(expanded[i], other));
  }
  for (int i = 0; i < count; i++) {
    CK(cudaStreamWaitEvent(st, expanded[i % 2]));
    gemm(weights[i], buffers[i % 2], t);
    if (i + 2 >= count) continue;
    CK(cudaEventRecord(freed[i % 2], st));
    CK(cudaStreamWaitEvent(other, freed[i % 2]));
    unpack(weights[i + 2], buffers[i % 2], other);
    CK(cudaEventRecord(expanded[i % 2], other));
  }
}

static double timed(const std::function<void()>& f) {
  cudaGraph_t graph;
  cudaGraphExec_t exec;
  CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeRelaxed));
  f();
  CK(cudaStreamEndCapture(st, &graph));
  CK(cudaGraphInstantiate(&exec, graph, 0));
  vector<float> ms;
  for (int i = 0; i < 8; i++) {
    float one;
    CK(cudaEventRecord(e0, st));
    CK(cudaGraphLaunch(exec, st));
    CK(cudaEventRecord(e1, st));
    CK(cudaEventSynchronize(e1));
    CK(cudaEventElapsedTime(&one, e0, e1));
    if (i > 0) ms.push_back(one / kLayers);
  }
  std::sort(ms.begin(), ms.end());
  cudaGraphExecDestroy(exec);
  cudaGraphDestroy(graph);
  return ms[ms.size() / 2];
}

int main(int argc, char** argv) {
  setup_device();
  const float percent = atof(argv[1]);
  CB(cublasCreate(&blas));
  CB(cublasSetStream(blas, st));
  CK(cudaMalloc(&workspace, 64 << 20));
  CB(cublasSetWorkspace(blas, workspace, 64 << 20));
  int low, high;
  CK(cudaDeviceGetStreamPriorityRange(&low, &high));
  CK(cudaStreamCreateWithPriority(&side[0], cudaStreamNonBlocking, low));
  CK(cudaStreamCreateWithPriority(&side[1], cudaStreamNonBlocking, high));
  for (int i = 0; i < 2; i++) {
    CK(cudaEventCreateWithFlags(&expanded[i], cudaEventDisableTiming));
    CK(cudaEventCreateWithFlags(&freed[i], cudaEventDisableTiming));
    CK(cudaMalloc(&buffers[i], (size_t)28672 * 4096 * 2));
  }
  CK(cudaEventCreateWithFlags(&fork_event, cudaEventDisableTiming));
  CK(cudaMalloc(&x, (size_t)8192 * 14336 * 2));
  CK(cudaMalloc(&y, (size_t)8192 * 28672 * 2));
  gen_x<<<256, 256, 0, st>>>(x, (size_t)8192 * 14336, 5);
  void* scratch;
  CK(cudaMalloc(&scratch, lb::gap_scratch_bytes(28672)));
  unsigned bad = 0;
  for (int i = 0; i < 4 * kLayers; i++) {
    Weight w{kOut[i % 4], kIn[i % 4], nullptr, nullptr, {}};
    const size_t size = (size_t)w.n * w.k;
    CK(cudaMalloc(&w.dense, size * 2));
    gen_unstructured<<<512, 256, 0, st>>>(w.dense, w.n, w.k, 0.02f, i, percent, 0);
    CK(lb::gap_measure(w.dense, w.n, w.k, scratch, &w.layout, st));
    CK(cudaMalloc(&w.packed, w.layout.packed_bytes));
    CK(lb::gap_pack(w.dense, scratch, w.layout, w.packed, st));
    CK(cudaMemsetAsync(buffers[0], 0xff, size * 2, st));
    unpack(w, buffers[0], st);
    CK(cudaMemsetAsync(d_count, 0, 4, st));
    count_unequal<<<256, 256, 0, st>>>((const unsigned short*)buffers[0],
                                       (const unsigned short*)w.dense, size, d_count);
    unsigned h;
    CK(cudaMemcpyAsync(&h, d_count, 4, cudaMemcpyDeviceToHost, st));
    CK(cudaStreamSynchronize(st));
    bad += h;
    weights.push_back(w);
  }
  printf("%u elements of %d weights differ\n", bad, 4 * kLayers);
  if (bad != 0) return 1;
  double bytes = 0;
  for (const Weight& w : weights) bytes += w.layout.packed_bytes + 2. * w.n * w.k;
  const double all = timed([&] {
    for (const Weight& w : weights) unpack(w, buffers[0], st);
  });
  printf("expanding a layer: %.3f ms (%.0f GB/s), limit %.3f\n", all, bytes / kLayers / all / 1e6,
         bytes / kLayers / 4.28e9);
  for (int i = 0; i < 4; i++) {
    const double ms = timed([&] {
      for (int l = 0; l < kLayers; l++) unpack(weights[4 * l + i], buffers[0], st);
    });
    printf("  %dx%d: %.1f us, limit %.1f\n", kOut[i], kIn[i], ms * 1e3,
           (weights[i].layout.packed_bytes + 2. * kOut[i] * kIn[i]) / 4.28e6);
  }
  for (int a = 2; a < argc; a++) {
    const int t = atoi(argv[a]);
    const double dense = timed([&] {
      for (const Weight& w : weights) gemm(w, w.dense, t);
    });
    printf(
        "%d tokens: dense products %.3f ms a layer, after expanding %.3f, beside it %.3f (low "
        "priority), %.3f (high)\n",
        t, dense, timed([&] { sequence(nullptr, t); }), timed([&] { sequence(side[0], t); }),
        timed([&] { sequence(side[1], t); }));
  }
  return 0;
}
