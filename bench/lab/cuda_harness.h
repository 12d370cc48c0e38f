// What the GPU studies of bench/lab share: data and references, timing in CUDA graphs, the dense
// rivals (cuBLAS, cuBLASLt), helpers of exact tests. One translation unit a program includes it.
#pragma once

#include <cublasLt.h>
#include <cublas_v2.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

using bf16 = __nv_bfloat16;
using std::vector;

#define CK(x)                                                                \
  do {                                                                       \
    cudaError_t e_ = (x);                                                    \
    if (e_ != cudaSuccess) {                                                 \
      printf("CUDA error: %s, line %d\n", cudaGetErrorString(e_), __LINE__); \
      fflush(stdout);                                                        \
      exit(1);                                                               \
    }                                                                        \
  } while (0)
#define CB(x)                                                                \
  do {                                                                       \
    auto e_ = (x);                                                           \
    if (static_cast<int>(e_) != 0) {                                         \
      printf("library error %d, line %d\n", static_cast<int>(e_), __LINE__); \
      fflush(stdout);                                                        \
      exit(1);                                                               \
    }                                                                        \
  } while (0)

static cudaStream_t st;
static cudaEvent_t e0, e1;
static int g_sms = 132;

// ---------- data ----------
__device__ inline unsigned long long mix(unsigned long long z) {
  z += 0x9E3779B97F4A7C15ull;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ull;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBull;
  return z ^ (z >> 31);
}
__device__ inline float normal(unsigned long long h) {
  const float a = ((h >> 40) + 1) * (1.f / 16777217.f),
              b = (h & 0xffffff) * (6.2831853f / 16777216.f);
  return sqrtf(-2.f * logf(a)) * cosf(b);
}
__global__ void gen_x(bf16* x, size_t n, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    x[i] = __float2bfloat16(normal(mix(i + seed * 0x1000003ull)));
}
// Each weight is kept with probability 1 - percent / 100; 0.8 % of the dropped ones are -0.0.
// `uneven`: the probability varies from row to row and along K, and some rows hold nothing.
__global__ void gen_unstructured(bf16* w, int n, int k, float scale, unsigned long long seed,
                                 float percent, int uneven) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    float drop = percent * 0.01f;
    if (uneven) {
      const unsigned long long row = mix(i / k + seed);
      drop += 0.25f * sinf((float)(row & 1023)) + 0.1f * sinf((float)(i % k) * 0.01f);
      if ((row >> 20) % 7 == 0) drop = 2.f;
      if ((row >> 20) % 7 == 1) drop = -1.f;
    }
    const float u = (float)(h >> 40) * 0x1p-24f;
    bf16 v = __float2bfloat16(normal(mix(h ^ 0x1111)) * scale);
    if (u < drop) v = __float2bfloat16(h % 128 == 0 ? -0.f : 0.f);
    w[i] = v;
  }
}
// As the reference of an unpacked W: -0.0 becomes 0.0.
__global__ void count_unequal(const unsigned short* a, const unsigned short* w, size_t n,
                              unsigned* out) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    if (a[i] != (w[i] == 0x8000 ? 0 : w[i])) atomicAdd(out, 1u);
}

__global__ void reference64(const bf16* w, const bf16* x, double* y, double* mag, int n, int k,
                            int t) {
  const int row = blockIdx.x, token = blockIdx.y;
  __shared__ double s[128], m[128];
  double a = 0, b = 0;
  for (int i = threadIdx.x; i < k; i += 128) {
    const double q = (double)__bfloat162float(w[(size_t)row * k + i]) *
                     __bfloat162float(x[(size_t)token * k + i]);
    a += q;
    b += fabs(q);
  }
  s[threadIdx.x] = a;
  m[threadIdx.x] = b;
  __syncthreads();
  for (int d = 64; d; d >>= 1) {
    if (threadIdx.x < d) {
      s[threadIdx.x] += s[threadIdx.x + d];
      m[threadIdx.x] += m[threadIdx.x + d];
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) {
    y[(size_t)token * n + row] = s[0];
    mag[(size_t)token * n + row] = m[0];
  }
}
struct Err {
  double sd, sr;
  unsigned mxd, mxr;
};
__device__ inline float number(bf16 v) { return __bfloat162float(v); }
__device__ inline float number(int v) { return (float)v; }
template <class Y, class Ref>
__global__ void errors(const Y* y, const Ref* ref, size_t n, Err* e) {
  double sd = 0, sr = 0;
  float md = 0, mr = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    const float r = (float)ref[i];
    float d = fabsf(number(y[i]) - r);
    if (!(d == d)) d = 1e30f;
    md = fmaxf(md, d);
    mr = fmaxf(mr, fabsf(r));
    sd += (double)d * d;
    sr += (double)r * r;
  }
  atomicAdd(&e->sd, sd);
  atomicAdd(&e->sr, sr);
  atomicMax(&e->mxd, __float_as_uint(md));
  atomicMax(&e->mxr, __float_as_uint(mr));
}
__global__ void count_diff(const unsigned short* a, const unsigned short* b, size_t n,
                           unsigned* out) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    if (a[i] != b[i]) atomicAdd(out, 1u);
}
static Err* d_err;
static unsigned* d_count;
template <class Y, class Ref>
static double norm_error(const Y* y, const Ref* ref, size_t n) {
  CK(cudaMemsetAsync(d_err, 0, sizeof(Err), st));
  errors<<<256, 256, 0, st>>>(y, ref, n, d_err);
  Err h;
  CK(cudaMemcpyAsync(&h, d_err, sizeof h, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  return h.sr > 0 ? sqrt(h.sd / h.sr) : sqrt(h.sd);
}
static unsigned differing(const bf16* a, const bf16* b, size_t n) {
  CK(cudaMemsetAsync(d_count, 0, 4, st));
  count_diff<<<256, 256, 0, st>>>((const unsigned short*)a, (const unsigned short*)b, n, d_count);
  unsigned h;
  CK(cudaMemcpyAsync(&h, d_count, 4, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  return h;
}

// ---------- timing ----------
typedef std::function<cudaError_t(int)> Launch;  // on weight copy i
struct Time {
  double us = NAN, low = NAN, high = NAN;
};
// A captured graph of enough nodes to walk through all copies.
struct Graph {
  cudaGraphExec_t exec = nullptr;
  int nodes = 0, reps = 1;
  vector<double> times;
  Graph() = default;
  Graph(const Graph&) = delete;
  Graph(Graph&& o) : exec(o.exec), nodes(o.nodes), reps(o.reps), times(std::move(o.times)) {
    o.exec = nullptr;
  }
  ~Graph() {
    if (exec) cudaGraphExecDestroy(exec);
  }
};
static double replay(const Graph& g) {
  float ms;
  CK(cudaEventRecord(e0, st));
  for (int i = 0; i < g.reps; i++) CK(cudaGraphLaunch(g.exec, st));
  CK(cudaEventRecord(e1, st));
  CK(cudaEventSynchronize(e1));
  CK(cudaEventElapsedTime(&ms, e0, e1));
  return ms * 1e3 / g.reps / g.nodes;
}
// So many products, each on the next copy, run once; no graph where they can't be.
static Graph capture_products(const Launch& f, int copies, int products) {
  Graph r;
  r.nodes = products;
  cudaGraph_t g = nullptr;
  CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeRelaxed));
  cudaError_t bad = cudaSuccess;
  for (int i = 0; i < r.nodes && bad == cudaSuccess; i++) bad = f(i % copies);
  const cudaError_t e = cudaStreamEndCapture(st, &g);
  if (bad != cudaSuccess || e != cudaSuccess ||
      cudaGraphInstantiate(&r.exec, g, 0) != cudaSuccess) {
    cudaGetLastError();
    r.exec = nullptr;
  } else {
    CK(cudaGraphLaunch(r.exec, st));
  }
  if (g) cudaGraphDestroy(g);
  return r;
}
static Graph capture(const Launch& f, int copies, double guess_us, double target_us) {
  const int products = std::max(copies, std::min(160, std::max(16, (int)(target_us / guess_us))));
  Graph r = capture_products(f, copies, (products + copies - 1) / copies * copies);
  if (r.exec) r.reps = std::max(1, std::min(50, (int)(target_us / (replay(r) * r.nodes))));
  return r;
}
static Time median(Graph& g) {
  Time r;
  if (g.times.empty()) return r;
  std::sort(g.times.begin(), g.times.end());
  r.us = g.times[g.times.size() / 2];
  r.low = g.times[0];
  r.high = g.times.back();
  return r;
}
// Rivals take turns, so that clocks and neighbours meet all of them alike.
static void interleave(const vector<Graph*>& rivals, int measurements) {
  for (int q = 0; q < measurements; q++)
    for (Graph* g : rivals)
      if (g->exec) g->times.push_back(replay(*g));
}
static Time time_graph(const Launch& f, int copies, double guess_us, int measurements,
                       double target_us) {
  Graph g = capture(f, copies, guess_us, target_us);
  interleave({&g}, measurements);
  return median(g);
}

// ---------- dense ----------
static cublasHandle_t cb;
static cublasLtHandle_t lt;
static void* d_ws;
static const size_t kWs = 64 << 20;
static cublasStatus_t gemm_ex(const bf16* w, const bf16* x, void* y, cudaDataType ty, int n, int k,
                              int t) {
  const float one = 1, zero = 0;
  return cublasGemmEx(cb, CUBLAS_OP_T, CUBLAS_OP_N, n, t, k, &one, w, CUDA_R_16BF, k, x,
                      CUDA_R_16BF, k, &zero, y, ty, n, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT);
}
// The dense rivals worth an exact measurement: GemmEx and the three fastest of cuBLASLt's 24
// heuristic answers, each verified.
struct Rival {
  std::string name;
  Graph graph;
};
static vector<Rival> dense_rivals(const vector<bf16*>& w, const bf16* x, bf16* y, const float* ref,
                                  int n, int k, int t) {
  vector<Rival> rivals;
  const int copies = (int)w.size();
  const double guess = n * (double)k * 2 / 4e6 + 4;
  CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
  CB(gemm_ex(w[0], x, y, CUDA_R_16BF, n, k, t));
  if (norm_error(y, ref, (size_t)n * t) < 4e-3) {
    rivals.push_back({"GemmEx", capture(
                                    [&](int i) {
                                      return gemm_ex(w[i], x, y, CUDA_R_16BF, n, k, t) ==
                                                     CUBLAS_STATUS_SUCCESS
                                                 ? cudaSuccess
                                                 : cudaErrorUnknown;
                                    },
                                    copies, guess, 3000)});
  }
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t la, lb, lc;
  cublasLtMatmulPreference_t pref;
  const cublasOperation_t tr = CUBLAS_OP_T;
  CB(cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &tr, sizeof tr));
  CB(cublasLtMatrixLayoutCreate(&la, CUDA_R_16BF, k, n, k));
  CB(cublasLtMatrixLayoutCreate(&lb, CUDA_R_16BF, k, t, k));
  CB(cublasLtMatrixLayoutCreate(&lc, CUDA_R_16BF, n, t, n));
  CB(cublasLtMatmulPreferenceCreate(&pref));
  CB(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWs,
                                          sizeof kWs));
  cublasLtMatmulHeuristicResult_t h[24];
  int found = 0;
  cublasLtMatmulAlgoGetHeuristic(lt, op, la, lb, lc, lc, pref, 24, h, &found);
  const float one = 1, zero = 0;
  vector<std::pair<double, int>> quick;
  auto run = [&](int a, int i) {
    return cublasLtMatmul(lt, op, &one, w[i], la, x, lb, &zero, y, lc, y, lc, &h[a].algo, d_ws, kWs,
                          st) == CUBLAS_STATUS_SUCCESS
               ? cudaSuccess
               : cudaErrorUnknown;
  };
  for (int a = 0; a < found; a++) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    if (run(a, 0) != cudaSuccess || norm_error(y, ref, (size_t)n * t) > 4e-3) {
      cudaGetLastError();
      continue;
    }
    const Time q = time_graph([&](int i) { return run(a, i); }, copies, guess, 2, 600);
    if (q.us == q.us) quick.push_back({q.us, a});
  }
  std::sort(quick.begin(), quick.end());
  for (size_t i = 0; i < quick.size() && i < 3; i++)
    rivals.push_back(
        {"Lt" + std::to_string(quick[i].second),
         capture([&](int c) { return run(quick[i].second, c); }, copies, guess, 3000)});
  cublasLtMatmulPreferenceDestroy(pref);
  cublasLtMatrixLayoutDestroy(la);
  cublasLtMatrixLayoutDestroy(lb);
  cublasLtMatrixLayoutDestroy(lc);
  cublasLtMatmulDescDestroy(op);
  return rivals;
}

struct Shape {
  int n, k;
};
static const Shape kShapes[6] = {{4096, 4096},  {6144, 4096},  {14336, 4096},
                                 {28672, 4096}, {4096, 14336}, {28672, 8192}};
// ---------- exact tests ----------
// Device memory of exactly the size asked for, so that memcheck sees the first byte past it.
template <class T>
struct Buffer {
  T* p = nullptr;
  size_t n;
  explicit Buffer(size_t n_) : n(n_) { CK(cudaMalloc(&p, n * sizeof(T))); }
  explicit Buffer(const vector<T>& v) : Buffer(v.size()) {
    CK(cudaMemcpy(p, v.data(), n * sizeof(T), cudaMemcpyHostToDevice));
  }
  Buffer(const Buffer&) = delete;
  ~Buffer() { cudaFree(p); }
  vector<T> read() const {
    vector<T> v(n);
    CK(cudaMemcpy(v.data(), p, n * sizeof(T), cudaMemcpyDeviceToHost));
    return v;
  }
};
static unsigned short bits(float f) {
  const bf16 b = __float2bfloat16(f);
  unsigned short u;
  memcpy(&u, &b, 2);
  return u;
}
static float value(unsigned short u) {
  const unsigned w = (unsigned)u << 16;
  float f;
  memcpy(&f, &w, 4);
  return f;
}
static unsigned long long g_state = 1;
static unsigned rnd() {
  g_state = g_state * 6364136223846793005ull + 1442695040888963407ull;
  return (unsigned)(g_state >> 33);
}
static vector<int> numbers(const char* s) {
  vector<int> v;
  for (const char* p = s; *p;) {
    v.push_back(atoi(p));
    while (*p && *p != ',') p++;
    if (*p) p++;
  }
  return v;
}
// Device 0, one stream, events, scratch of the comparisons.
static void setup_device() {
  CK(cudaSetDevice(0));
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  g_sms = prop.multiProcessorCount;
  CK(cudaStreamCreate(&st));
  CK(cudaEventCreate(&e0));
  CK(cudaEventCreate(&e1));
  CK(cudaMalloc(&d_err, sizeof(Err)));
  CK(cudaMalloc(&d_count, 4));
}
static void setup_dense() {
  CK(cudaMalloc(&d_ws, kWs));
  CB(cublasCreate(&cb));
  CB(cublasSetStream(cb, st));
  CB(cublasSetWorkspace(cb, d_ws, kWs));
  CB(cublasLtCreate(&lt));
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  int driver = 0, version = 0;
  cudaDriverGetVersion(&driver);
  cublasGetVersion(cb, &version);
  printf("%s, %d SMs, driver API %d, runtime %d, cuBLAS %d\n", prop.name, g_sms, driver,
         CUDART_VERSION, version);
}
