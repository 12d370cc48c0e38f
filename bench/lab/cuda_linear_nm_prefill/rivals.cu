// The study of 2:4 weights with many tokens in e4m3, int8 and bf16: the library's kernels, CUTLASS
// and cuSPARSELt against the best dense product of the same kind (README.md). Values are normal.
//   rivals --probe CUSPARSELT.so          prints its version: whether it can be used here
//   rivals OUT.csv LACUNA.so CUSPARSELT.so[,OLDER.so] SECONDS KIND:SHAPES:T,T ...
// KIND: fp8, int8, bf16. SHAPES are digits, indices into kShapes. After SECONDS no cell is begun.
// Nothing is timed before its result was compared with the float32 product of the same values.
#include <dlfcn.h>

#include <cusparseLt.h>

#include <chrono>
#include <map>
#include <memory>

#include "../cuda_linear_coded/codes.h"
#include "cutlass.h"
#include "lacuna/kernels/gpu_abi.h"

namespace kernels = lacuna::kernels;
using std::string;
enum Kind { kFp8, kInt8, kBf16 };
static const char* const kKinds[] = {"fp8", "int8", "bf16"};
static FILE* csv;
static FILE* log_file;  // every candidate of the screening
static double now() {
  using namespace std::chrono;
  return duration<double>(steady_clock::now().time_since_epoch()).count();
}
static cudaError_t as_error(bool ok) { return ok ? cudaSuccess : cudaErrorUnknown; }

// ---------- data ----------
__global__ void gen_weights(bf16* w, size_t groups, unsigned long long seed, bool sparse,
                            int kind) {
  const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pair = pairs[h % 6];
    bf16 v[4];
    for (int j = 0; j < 4; j++) {
      const bool kept = !sparse || j == (pair & 15) || j == pair >> 4;
      const float f = normal(mix(h ^ (0x1111 * (j + 1))));
      v[j] = __float2bfloat16(!kept ? 0.f : kind == kBf16 ? f / 64 : code_of(f, kind == kFp8));
    }
    *reinterpret_cast<uint2*>(w + 4 * i) = *reinterpret_cast<uint2*>(v);
  }
}
// x rounded by the rule of kernels/quantize_token, a block a token: codes as numbers.
__global__ void round_x(const bf16* x, bf16* codes, float* scales, int k, bool fp8) {
  __shared__ float most[256];
  const bf16* from = x + (size_t)blockIdx.x * k;
  float m = 0;
  for (int i = threadIdx.x; i < k; i += 256) m = fmaxf(m, fabsf(__bfloat162float(from[i])));
  most[threadIdx.x] = m;
  __syncthreads();
  for (int d = 128; d; d >>= 1) {
    if (threadIdx.x < d) most[threadIdx.x] = fmaxf(most[threadIdx.x], most[threadIdx.x + d]);
    __syncthreads();
  }
  const float scale = fmaxf(most[0] / (fp8 ? 448.f : 127.f), 0x1p-126f), inverse = 1.f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  for (int i = threadIdx.x; i < k; i += 256) {
    const float v = __bfloat162float(from[i]) * inverse;
    codes[(size_t)blockIdx.x * k + i] = __float2bfloat16(fp8 ? float(__nv_fp8_e4m3(v)) : rintf(v));
  }
}
__global__ void scale_both(const float* sums, float* y, const float* scales, int n, int t) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * t;
       i += (size_t)gridDim.x * blockDim.x)
    y[i] = sums[i] * scale_of(i % n) * scales[i / n];
}
__global__ void transposed(const bf16* from, bf16* to, int n, int t) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * t;
       i += (size_t)gridDim.x * blockDim.x)
    to[i] = from[(i % n) * t + i / n];
}
static void to_operand(Kind kind, const bf16* from, void* to, size_t count) {
  if (kind == kFp8)
    convert<<<2048, 256, 0, st>>>(from, (__nv_fp8_e4m3*)to, count);
  else if (kind == kInt8)
    convert<<<2048, 256, 0, st>>>(from, (signed char*)to, count);
  else
    CK(cudaMemcpyAsync(to, from, count * 2, cudaMemcpyDeviceToDevice, st));
}

// ---------- clocks and power ----------
struct Nvml {
  void* device = nullptr;
  int (*clock)(void*, int, unsigned*) = nullptr;
  struct Field {
    unsigned id, scope;
    long long stamp, latency;
    int type, status;
    union {
      double d;
      unsigned ui;
    } value;
  };
  int (*fields)(void*, int, Field*) = nullptr;
  int (*reasons)(void*, unsigned long long*) = nullptr;
  void open() {
    void* so = dlopen("libnvidia-ml.so.1", RTLD_NOW);
    if (!so) so = dlopen("/usr/local/nvidia/lib64/libnvidia-ml.so.1", RTLD_NOW);
    if (!so) return (void)printf("no NVML: %s\n", dlerror());
    auto init = (int (*)())dlsym(so, "nvmlInit_v2");
    auto get = (int (*)(unsigned, void**))dlsym(so, "nvmlDeviceGetHandleByIndex_v2");
    clock = (decltype(clock))dlsym(so, "nvmlDeviceGetClockInfo");
    fields = (decltype(fields))dlsym(so, "nvmlDeviceGetFieldValues");
    reasons = (decltype(reasons))dlsym(so, "nvmlDeviceGetCurrentClocksEventReasons");
    if (!init || !get || init() || get(0, &device)) device = nullptr;
    auto limit = (int (*)(void*, unsigned*))dlsym(so, "nvmlDeviceGetEnforcedPowerLimit");
    unsigned mw = 0;
    if (device && limit && !limit(device, &mw)) printf("power limit %.0f W\n", mw / 1e3);
  }
  double mhz() const {
    unsigned v = 0;
    return device && !clock(device, 1, &v) ? v : NAN;
  }
  double watt() const {  // at this instant
    Field f = {};
    f.id = 186;
    return device && fields && !fields(device, 1, &f) && !f.status ? f.value.ui / 1e3 : NAN;
  }
  unsigned long long why() const {
    unsigned long long v = 0;
    return device && reasons && !reasons(device, &v) ? v : 0;
  }
};
static Nvml nvml;

// ---------- timing ----------
struct Contender {
  string family, name;
  Launch run;
  double error = 0, quick = NAN, alone = NAN, mhz = NAN, watt = NAN, zero = NAN, zero_mhz = NAN;
  unsigned long long why = 0;
  std::shared_ptr<Graph> graph;
};
static std::shared_ptr<Graph> captured(const Launch& f, int copies, double us, double target_us) {
  auto g = std::make_shared<Graph>();
  g->nodes = std::max(copies, std::min(200, (int)(target_us / us) + 1));
  g->nodes = (g->nodes + copies - 1) / copies * copies;
  cudaGraph_t graph = nullptr;
  CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeRelaxed));
  cudaError_t bad = cudaSuccess;
  for (int i = 0; i < g->nodes && bad == cudaSuccess; i++) bad = f(i % copies);
  const cudaError_t e = cudaStreamEndCapture(st, &graph);
  if (bad != cudaSuccess || e != cudaSuccess || cudaGraphInstantiate(&g->exec, graph, 0)) {
    cudaGetLastError();
    g->exec = nullptr;
  }
  if (graph) cudaGraphDestroy(graph);
  return g;
}
static double timed_directly(const Launch& f, int copies, int runs) {
  float ms;
  CK(cudaEventRecord(e0, st));
  for (int i = 0; i < runs; i++)
    if (f(i % copies) != cudaSuccess) return NAN;
  CK(cudaEventRecord(e1, st));
  CK(cudaEventSynchronize(e1));
  CK(cudaEventElapsedTime(&ms, e0, e1));
  return ms * 1e3 / runs;
}
static double screened(const Launch& f, int copies, double guess) {
  auto g = captured(f, copies, guess, 400);
  if (!g->exec) return timed_directly(f, copies, copies);
  replay(*g);
  return replay(*g);
}
// One contender alone for `seconds`: the second half's time a product, clock and power.
struct Alone {
  double us = NAN, mhz = NAN, watt = NAN;
  unsigned long long why = 0;
};
static Alone alone(Graph& g, const Launch& f, int copies, double us, double seconds) {
  Alone r;
  static cudaEvent_t end[2] = {};
  if (!end[0])
    for (auto& e : end) CK(cudaEventCreate(&e));
  const double t0 = now();
  double mhz = 0, watt = 0;
  int launches = 0, samples = 0;
  const int batch = std::max(1, (int)(8e3 / (us * g.nodes)));
  bool second = false;
  for (int queued = 0; now() - t0 < seconds; queued++) {  // two batches in flight
    if (queued >= 2) CK(cudaEventSynchronize(end[queued % 2]));
    if (!second && now() - t0 > seconds / 2) {
      second = true;
      launches = 0;
      CK(cudaEventRecord(e0, st));
    }
    for (int i = 0; i < batch; i++)
      if (g.exec)
        CK(cudaGraphLaunch(g.exec, st));
      else
        for (int j = 0; j < g.nodes; j++) CK(f(j % copies));
    launches += batch;
    CK(cudaEventRecord(end[queued % 2], st));
    if (second) {
      mhz += nvml.mhz(), watt += nvml.watt(), samples++;
      r.why |= nvml.why();
    }
  }
  CK(cudaEventRecord(e1, st));
  CK(cudaEventSynchronize(e1));
  float ms;
  if (!samples) return r;
  CK(cudaEventElapsedTime(&ms, e0, e1));
  r.us = ms * 1e3 / launches / g.nodes;
  r.mhz = mhz / samples;
  r.watt = watt / samples;
  return r;
}

// ---------- cuBLASLt ----------
struct Lt {
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t w, x, y;
  cublasLtMatmulHeuristicResult_t found[32];
  int count = 0;
  bool whole;
  Lt(Kind kind, int n, int k, int t) : whole(kind == kInt8) {
    const cudaDataType in = kind == kFp8 ? CUDA_R_8F_E4M3 : kind == kInt8 ? CUDA_R_8I : CUDA_R_16BF;
    const cublasOperation_t tr = CUBLAS_OP_T;
    CB(cublasLtMatmulDescCreate(&op, whole ? CUBLAS_COMPUTE_32I : CUBLAS_COMPUTE_32F,
                                whole ? CUDA_R_32I : CUDA_R_32F));
    CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &tr, sizeof tr));
    if (kind == kFp8) {
      const int8_t fast = 1;
      CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
    }
    CB(cublasLtMatrixLayoutCreate(&w, in, k, n, k));
    CB(cublasLtMatrixLayoutCreate(&x, in, k, t, k));
    CB(cublasLtMatrixLayoutCreate(&y, whole ? CUDA_R_32I : CUDA_R_16BF, n, t, n));
    cublasLtMatmulPreference_t pref;
    CB(cublasLtMatmulPreferenceCreate(&pref));
    CB(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWs,
                                            sizeof kWs));
    cublasLtMatmulAlgoGetHeuristic(lt, op, w, x, y, y, pref, 32, found, &count);
    cublasLtMatmulPreferenceDestroy(pref);
  }
  Lt(const Lt&) = delete;
  ~Lt() {
    cublasLtMatrixLayoutDestroy(w);
    cublasLtMatrixLayoutDestroy(x);
    cublasLtMatrixLayoutDestroy(y);
    cublasLtMatmulDescDestroy(op);
  }
  cudaError_t run(int a, const void* wp, const void* xp, void* yp) {
    static const float onef = 1, zerof = 0;
    static const int onei = 1, zeroi = 0;
    return as_error(cublasLtMatmul(lt, op, whole ? (const void*)&onei : &onef, wp, w, xp, x,
                                   whole ? (const void*)&zeroi : &zerof, yp, y, yp, y,
                                   &found[a].algo, d_ws, kWs, st) == CUBLAS_STATUS_SUCCESS);
  }
};

// ---------- cuSPARSELt, a version of it ----------
#define SPARSELT_FUNCTIONS(API) \
  API(Init)                     \
  API(GetVersion)               \
  API(StructuredDescriptorInit) \
  API(DenseDescriptorInit)      \
  API(MatDescriptorDestroy)     \
  API(MatmulDescriptorInit)     \
  API(MatmulAlgSelectionInit)   \
  API(MatmulAlgSetAttribute)    \
  API(MatmulAlgGetAttribute)    \
  API(MatmulPlanInit)           \
  API(MatmulPlanDestroy)        \
  API(MatmulGetWorkspace)       \
  API(Matmul)                   \
  API(MatmulSearch)             \
  API(SpMMACompressedSize)      \
  API(SpMMACompress)
struct Sparselt {
#define DECLARED(name) decltype(&cusparseLt##name) name = nullptr;
  SPARSELT_FUNCTIONS(DECLARED)
#undef DECLARED
  cusparseLtHandle_t handle;
  string version;
  bool open(const char* path) {
    void* so = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!so) return printf("%s: %s\n", path, dlerror()), false;
    bool all = true;
#define FOUND(name) all &= (name = (decltype(name))dlsym(so, "cusparseLt" #name)) != nullptr;
    SPARSELT_FUNCTIONS(FOUND)
#undef FOUND
    int v = 0;
    if (!all || Init(&handle) != CUSPARSE_STATUS_SUCCESS || GetVersion(&handle, &v)) return false;
    version = std::to_string(v);
    return true;
  }
};
// How a problem is put to it. Memory is always W[N,K], x[T,K] and y[T,N] (`turned`: [N,T]).
struct Way {
  bool sparse_b;  // y = x W^T, else y^T = W x^T
  bool columns;   // operands told as column-major
  bool turned;
  bool whole;  // int32 out
  string name() const {
    return string(sparse_b ? "B" : "A") + (columns ? " col" : " row") + (turned ? " y^T" : "") +
           (whole ? " int32" : "");
  }
};
static void* sp_scratch;
static const size_t kSpScratch = 2ull << 30;
struct Sp {
  Sparselt& l;
  Way way;
  cusparseLtMatDescriptor_t w, x, y;
  cusparseLtMatmulDescriptor_t op;
  cusparseLtMatmulAlgSelection_t selection;
  cusparseLtMatmulPlan_t plan;
  size_t bytes = 0, buffer = 0, need = 0;
  vector<void*> packed;
  string refused;
  Sp(Sparselt& l_, Kind kind, Way how, int n, int k, int t) : l(l_), way(how) {
    const cudaDataType in = kind == kFp8 ? CUDA_R_8F_E4M3 : kind == kInt8 ? CUDA_R_8I : CUDA_R_16BF;
    const cudaDataType out = way.whole ? CUDA_R_32I : CUDA_R_16BF;
    const auto order = way.columns ? CUSPARSE_ORDER_COL : CUSPARSE_ORDER_ROW;
    const auto plain = CUSPARSE_OPERATION_NON_TRANSPOSE, tr = CUSPARSE_OPERATION_TRANSPOSE;
    const int rows = way.sparse_b ? t : n, cols = way.sparse_b ? n : t;
    const bool y_rows = way.sparse_b != way.turned;
    auto step = [&](const char* what, int status) {
      if (refused.empty() && status) refused = string(what) + " " + std::to_string(status);
      return refused.empty();
    };
    if (step("W",
             l.StructuredDescriptorInit(&l.handle, &w, way.columns ? k : n, way.columns ? n : k, k,
                                        16, in, order, CUSPARSELT_SPARSITY_50_PERCENT)) &&
        step("x", l.DenseDescriptorInit(&l.handle, &x, way.columns ? k : t, way.columns ? t : k, k,
                                        16, in, order)) &&
        step("y", l.DenseDescriptorInit(&l.handle, &y, rows, cols, y_rows ? cols : rows, 16, out,
                                        y_rows ? CUSPARSE_ORDER_ROW : CUSPARSE_ORDER_COL)) &&
        step("product", l.MatmulDescriptorInit(
                            &l.handle, &op, way.columns ? tr : plain, way.columns ? plain : tr,
                            way.sparse_b ? &x : &w, way.sparse_b ? &w : &x, &y, &y,
                            kind == kInt8 ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F)) &&
        step("selection",
             l.MatmulAlgSelectionInit(&l.handle, &selection, &op, CUSPARSELT_MATMUL_ALG_DEFAULT)) &&
        step("plan", l.MatmulPlanInit(&l.handle, &plan, &op, &selection)))
      step("size", l.SpMMACompressedSize(&l.handle, &plan, &bytes, &buffer));
    if (ok()) replanned();
  }
  Sp(const Sp&) = delete;
  ~Sp() {
    for (void* p : packed) cudaFree(p);
  }
  bool ok() const { return refused.empty(); }
  void pack(const vector<void*>& dense) {
    void* scratch = nullptr;
    CK(cudaMalloc(&scratch, buffer + 16));
    for (void* d : dense) {
      void* p;
      CK(cudaMalloc(&p, bytes));
      if (l.SpMMACompress(&l.handle, &plan, d, p, scratch, st)) refused = "compress";
      packed.push_back(p);
    }
    CK(cudaStreamSynchronize(st));
    CK(cudaFree(scratch));
  }
  void replanned() {
    if (l.MatmulGetWorkspace(&l.handle, &plan, &need)) need = ~size_t(0);
  }
  // What is set of: configuration, parts of K, how they meet, buffers.
  vector<int> chosen() {
    vector<int> v;
    for (auto a : {CUSPARSELT_MATMUL_ALG_CONFIG_ID, CUSPARSELT_MATMUL_SPLIT_K,
                   CUSPARSELT_MATMUL_SPLIT_K_MODE, CUSPARSELT_MATMUL_SPLIT_K_BUFFERS}) {
      int value = -1;
      l.MatmulAlgGetAttribute(&l.handle, &selection, a, &value, sizeof value);
      v.push_back(value);
    }
    return v;
  }
  int last_id() {
    int v = 0;
    l.MatmulAlgGetAttribute(&l.handle, &selection, CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID, &v,
                            sizeof v);
    return v;
  }
  // -1: as it is.
  bool choose(int id, int parts, int mode) {
    l.MatmulAlgSelectionInit(&l.handle, &selection, &op, CUSPARSELT_MATMUL_ALG_DEFAULT);
    auto set = [&](cusparseLtMatmulAlgAttribute_t a, int v) {
      return v < 0 || l.MatmulAlgSetAttribute(&l.handle, &selection, a, &v, sizeof v) == 0;
    };
    const bool done = set(CUSPARSELT_MATMUL_ALG_CONFIG_ID, id) &&
                      set(CUSPARSELT_MATMUL_SPLIT_K, parts) &&
                      set(CUSPARSELT_MATMUL_SPLIT_K_MODE, mode) &&
                      l.MatmulPlanInit(&l.handle, &plan, &op, &selection) == 0;
    if (done) replanned();
    return done;
  }
  bool search(const void* xp, void* yp, int iterations) {
    const float one = 1, zero = 0;
    if (iterations)
      l.MatmulAlgSetAttribute(&l.handle, &selection, CUSPARSELT_MATMUL_SEARCH_ITERATIONS,
                              &iterations, sizeof iterations);
    const void *a = way.sparse_b ? xp : packed[0], *b = way.sparse_b ? packed[0] : xp;
    const bool done = l.MatmulSearch(&l.handle, &plan, &one, a, b, &zero, yp, yp, sp_scratch, &st,
                                     1) == CUSPARSE_STATUS_SUCCESS;
    replanned();
    return done;
  }
  cudaError_t run(int i, const void* xp, void* yp) {
    const float one = 1, zero = 0;
    const void *a = way.sparse_b ? xp : packed[i], *b = way.sparse_b ? packed[i] : xp;
    return as_error(need <= kSpScratch &&
                    l.Matmul(&l.handle, &plan, &one, a, b, &zero, yp, yp, sp_scratch, &st, 1) == 0);
  }
};

// ---------- one shape ----------
static const kernels::GpuTable* library;
static const kernels::GpuLinearKernel& ours_of(Kind kind) {
  const char* name[] = {"cuda_sm90_fp8", "cuda_sm90_int8", "cuda_sm90_mma_sp"};
  for (int i = 0; i < library->linear_count; i++)
    if (!strcmp(library->linear[i]->operation, "linear_nm") &&
        !strcmp(library->linear[i]->name, name[kind]))
      return *library->linear[i];
  printf("the library has no %s\n", name[kind]);
  exit(1);
}
struct Problem {
  const Kind kind;
  const int n, k, most;
  int copies;
  const kernels::GpuLinearKernel& ours;
  kernels::GpuLayout layout;
  vector<void*> dense, sparse, packed, values, metadata;
  bf16 *codes, *first, *x, *x_codes, *turned;
  float *x_scales, *want, *plain, *scaled;
  void *x8, *zeros, *y, *workspace = nullptr;
  vector<void*> held;
  template <class T>
  void room(T** p, size_t bytes) {
    CK(cudaMalloc((void**)p, bytes));
    held.push_back(*p);
  }
  Problem(Kind kind_, int n_, int k_, int most_)
      : kind(kind_), n(n_), k(k_), most(most_), ours(ours_of(kind_)) {
    const size_t count = (size_t)n * k, nx = (size_t)most * k, ny = (size_t)most * n;
    const size_t each = kind == kBf16 ? 2 : 1;
    bf16* scales;
    void* scratch = nullptr;
    room(&codes, count * 2);
    room(&first, count * 2);
    room(&scales, n * 2);
    room(&x, nx * 2);
    room(&x_codes, nx * 2);
    room(&x_scales, most * 4);
    room(&x8, nx * each);
    room(&zeros, nx * 2);
    room(&y, ny * 4);
    room(&turned, ny * 2);
    room(&want, ny * 4);
    room(&plain, ny * 4);
    room(&scaled, ny * 4);
    room(&workspace, nx + 4 * most + 4096);
    room(&scratch, ours.scratch_bytes ? ours.scratch_bytes(n, k) + 16 : 16);
    CK(cudaMemsetAsync(zeros, 0, nx * 2, st));
    gen_scales<<<64, 256, 0, st>>>(scales, n);
    gen_x<<<2048, 256, 0, st>>>(x, nx, 5);
    if (kind == kBf16) {
      CK(cudaMemcpyAsync(x_codes, x, nx * 2, cudaMemcpyDeviceToDevice, st));
    } else {
      round_x<<<most, 256, 0, st>>>(x, x_codes, x_scales, k, kind == kFp8);
    }
    to_operand(kind, x_codes, x8, nx);
    copies = std::max<int>(3, 300000000 / (count * each * 9 / 16) + 1);
    const CutlassRival& packer = (kind == kFp8    ? cutlass_fp8_fast()
                                  : kind == kInt8 ? cutlass_int8()
                                                  : cutlass_bf16())
                                     .first[0];
    for (int i = 0; i < copies; i++) {
      void *p, *d;
      gen_weights<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i, true, kind);
      if (i == 0) {
        CK(cudaMemcpyAsync(first, codes, count * 2, cudaMemcpyDeviceToDevice, st));
        CK((cudaError_t)ours.measure(codes, n, k, scratch, &layout, st));
      }
      room(&p, layout.packed_bytes);
      CK((cudaError_t)ours.pack(&layout, codes, scratch, p, nullptr, st));
      if (ours.pack_scales) CK((cudaError_t)ours.pack_scales(&layout, scales, p, st));
      packed.push_back(p);
      room(&p, count * each);
      to_operand(kind, codes, p, count);
      sparse.push_back(p);
      room(&d, packer.values_bytes(n, k));
      values.push_back(d);
      room(&d, packer.metadata_bytes(n, k));
      metadata.push_back(d);
      if (!packer.compress(p, n, k, values.back(), metadata.back(), st))
        printf("CUTLASS can't compress\n");
      gen_weights<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i, false, kind);
      room(&p, count * each);
      to_operand(kind, codes, p, count);
      dense.push_back(p);
    }
    gen_weights<<<2048, 256, 0, st>>>(codes, count / 4, 77, false, kind);
    CK(cudaStreamSynchronize(st));
  }
  Problem(const Problem&) = delete;
  ~Problem() {
    for (void* p : held) cudaFree(p);
  }
  void references(int t) {
    CB(gemm_ex(first, x_codes, want, CUDA_R_32F, n, k, t));
    CB(gemm_ex(codes, x_codes, plain, CUDA_R_32F, n, k, t));
    if (kind != kBf16) scale_both<<<2048, 256, 0, st>>>(want, scaled, x_scales, n, t);
  }
};
// e4m3's sums keep some 14 bits; the rest is the rounding of y.
static double bound(Kind kind) { return kind == kFp8 ? 5e-3 : 2.5e-3; }

static void cell(Problem& p, int t, vector<std::unique_ptr<Sparselt>>& libraries) {
  const Kind kind = p.kind;
  const int n = p.n, k = p.k, copies = p.copies;
  const size_t ny = (size_t)n * t;
  const double guess = 2.0 * n * k * t / (kind == kBf16 ? 8e8 : 1.4e9) + n * (double)k / 4e6 + 4;
  const double begun = now();
  p.references(t);
  vector<Contender> all;
  const void* x = p.x8;  // what the launches read: set to zeros for the last measurement
  const bf16* x16 = p.x;
  void* y = p.y;
  auto tried = [&](const Contender& c) {
    fprintf(log_file, "%s,%d,%d,%d,%s,%s,%.2f,%.3g\n", kKinds[kind], n, k, t, c.family.c_str(),
            c.name.c_str(), c.quick, c.error);
  };
  // Checked on poisoned output, then timed in short.
  auto try_out = [&](Contender& c, const float* reference, bool whole, bool turned,
                     double limit = INFINITY) {
    CK(cudaMemsetAsync(y, 0xff, ny * (whole ? 4 : 2), st));
    cudaGetLastError();
    if (c.run(0) != cudaSuccess || cudaStreamSynchronize(st) != cudaSuccess) {
      cudaGetLastError();
      fprintf(log_file, "%s,%d,%d,%d,%s,%s,refused,\n", kKinds[kind], n, k, t, c.family.c_str(),
              c.name.c_str());
      return false;
    }
    if (turned) transposed<<<2048, 256, 0, st>>>((const bf16*)y, p.turned, n, t);
    c.error = whole ? norm_error((const int*)y, reference, ny)
                    : norm_error(turned ? p.turned : (const bf16*)y, reference, ny);
    if (!(c.error < bound(kind))) {
      printf("  WRONG %s %s: %g\n", c.family.c_str(), c.name.c_str(), c.error);
      tried(c);
      return false;
    }
    if (limit < INFINITY) c.quick = timed_directly(c.run, copies, 1);
    if (!(c.quick > 1.5 * limit)) c.quick = screened(c.run, copies, guess);
    tried(c);
    return c.quick == c.quick;
  };
  auto keep_best = [&](vector<Contender>& from, size_t count) {
    std::sort(from.begin(), from.end(),
              [](const Contender& a, const Contender& b) { return a.quick < b.quick; });
    for (size_t i = 0; i < from.size() && i < count; i++) all.push_back(from[i]);
  };
  // Dense.
  Lt dense(kind, n, k, t);
  {
    vector<Contender> list;
    for (int a = 0; a < dense.count; a++) {
      Contender c{"dense", "Lt" + std::to_string(a),
                  [&, a](int i) { return dense.run(a, p.dense[i], x, y); }};
      if (try_out(c, p.plain, kind == kInt8, false)) list.push_back(c);
    }
    if (kind == kBf16) {
      Contender c{"dense", "GemmEx", [&](int i) {
                    return as_error(gemm_ex((bf16*)p.dense[i], (const bf16*)x, y, CUDA_R_16BF, n, k,
                                            t) == CUBLAS_STATUS_SUCCESS);
                  }};
      if (try_out(c, p.plain, false, false)) list.push_back(c);
    }
    keep_best(list, 2);
  }
  // Ours.
  kernels::GpuPlan plan;
  {
    const int refused =
        kind == kBf16 ? p.ours.plan(&p.layout, t, &plan) : p.ours.plan_rounded(&p.layout, t, &plan);
    const size_t ws = refused ? 0 : p.ours.workspace_bytes(&p.layout, &plan);
    if (refused || ws > (size_t)p.most * (k + 4) + 4096) {
      printf("no plan of ours\n");
    } else {
      Contender c{"ours", "planned", [&](int i) {
                    return (cudaError_t)p.ours.run(&p.layout, &plan, p.packed[i],
                                                   kind == kBf16 ? x : x16, y, p.workspace, false,
                                                   st);
                  }};
      if (try_out(c, kind == kBf16 ? p.want : p.scaled, false, false)) all.push_back(c);
    }
    if (kind != kBf16) {
      Contender c{"rounding alone", "", [&](int) {
                    const kernels::GpuRounding r{
                        t,   k,           kind == kFp8,
                        x16, p.workspace, (float*)((char*)p.workspace + (size_t)t * k)};
                    return (cudaError_t)library->round_tokens(&r, st);
                  }};
      c.quick = screened(c.run, 1, 4);
      all.push_back(c);
    }
  }
  // CUTLASS: all cuts, then the best two in other orders.
  struct List {
    const char* family;
    CutlassCuts cuts;
    size_t kept;
  };
  vector<List> lists;
  if (kind == kFp8)
    lists = {{"CUTLASS", cutlass_fp8_fast(), 2}, {"CUTLASS exact sums", cutlass_fp8(), 1}};
  if (kind == kInt8) lists = {{"CUTLASS", cutlass_int8(), 2}};
  if (kind == kBf16) lists = {{"CUTLASS", cutlass_bf16(), 2}};
  for (const List& l : lists) {
    vector<Contender> list;
    vector<std::pair<double, int>> ranks;
    auto with = [&](int c, CutlassOrder order) {
      const CutlassRival* r = &l.cuts.first[c];
      string name = r->name;
      if (order.along) name += string(" band ") + std::to_string(order.band) + order.along;
      Contender one{l.family, name, [&, r, order](int i) {
                      return as_error(
                          r->run(p.values[i], p.metadata[i], x, y, n, k, t, 1.f, order, d_ws, st));
                    }};
      if (!try_out(one, p.want, strstr(r->name, "int32") != nullptr, false)) return;
      list.push_back(one);
      if (!order.along) ranks.push_back({one.quick, c});
    };
    for (int c = 0; c < l.cuts.count; c++) with(c, {});
    std::sort(ranks.begin(), ranks.end());
    for (size_t i = 0; i < ranks.size() && i < 2; i++)
      for (char along : {'m', 'n'})
        for (int band : {2, 8}) with(ranks[i].second, {band, along});
    keep_best(list, l.kept);
  }
  // cuSPARSELt: every way that gives y as we want it (and at 2,048 tokens the others too), as it
  // comes, searched, every configuration by itself, and parts of K.
  vector<std::unique_ptr<Sp>> sps;
  for (auto& l : libraries) {
    vector<Contender> list;
    const bool newest = l == libraries[0], probe = newest && t == 2048 && n > k;
    vector<Way> ways;
    for (bool sparse_b : {false, true})
      for (bool columns : {false, true})
        for (bool turned : {false, true})
          for (bool whole : {false, true})
            if (whole ? kind == kInt8 && probe && !turned && !columns
                      : probe || (!turned && !columns))
              ways.push_back({sparse_b, columns, turned, whole});
    for (const Way& way : ways) {
      auto sp = std::make_unique<Sp>(*l, kind, way, n, k, t);
      if (sp->ok()) sp->pack(p.sparse);
      if (!sp->ok()) {
        printf("  cuSPARSELt %s refuses %s: %s\n", l->version.c_str(), way.name().c_str(),
               sp->refused.c_str());
        continue;
      }
      Sp* s = sp.get();
      sps.push_back(std::move(sp));
      auto contender = [&](const string& how) {
        return Contender{"cuSPARSELt " + l->version, way.name() + " " + how,
                         [&, s](int i) { return s->run(i, x, y); }};
      };
      Contender c = contender("default");
      // Each change of the plan is another contender: what is kept is put together again below.
      double best = try_out(c, p.want, way.whole, way.turned) ? c.quick : INFINITY;
      vector<int> best_set = {-1, -1, -1};
      bool searched_is_best = false;
      const double s0 = now();
      const bool found = s->search(x, y, t > 2048 ? 2 : 0);
      const double took = now() - s0;
      if (found) {
        const vector<int> got = s->chosen();
        c = contender("searched " + std::to_string(got[0]) + "/" + std::to_string(got[1]) + "/" +
                      std::to_string(got[2]));
        if (try_out(c, p.want, way.whole, way.turned) && c.quick < best)
          best = c.quick, searched_is_best = true;
      }
      const cusparseLtMatmulPlan_t searched = s->plan;
      const size_t searched_need = s->need;
      // All of them at up to 2,048 tokens, the six best of those above.
      const int last = s->last_id();
      static std::map<string, vector<std::pair<double, int>>> ranks;
      auto& rank = ranks[string(kKinds[kind]) + std::to_string(n) + l->version + way.name()];
      vector<int> ids;
      if (t <= 2048 || rank.empty()) {
        rank.clear();
        for (int id = 0; id <= last && id < 200; id++) ids.push_back(id);
      } else {
        for (size_t i = 0; i < rank.size() && i < 6; i++) ids.push_back(rank[i].second);
      }
      for (int id : ids) {
        if (!s->choose(id, -1, -1)) continue;
        c = contender("id " + std::to_string(id));
        if (!try_out(c, p.want, way.whole, way.turned, best)) continue;
        if (t <= 2048) rank.push_back({c.quick, id});
        if (c.quick < best * 0.995)
          best = c.quick, best_set = {id, -1, -1}, searched_is_best = false;
      }
      std::sort(rank.begin(), rank.end());
      if (probe || t <= 512) {
        const int id = best_set[0];
        for (int parts : {2, 4})
          for (int mode : {1, 2}) {
            if (!s->choose(id, parts, mode)) continue;
            c = contender("id " + std::to_string(id) + " split " + std::to_string(parts) +
                          " mode " + std::to_string(mode));
            if (try_out(c, p.want, way.whole, way.turned) && c.quick < best * 0.995)
              best = c.quick, best_set = {id, parts, mode}, searched_is_best = false;
          }
        for (int mode : {4, 5, 6}) {
          if (!s->choose(id, -1, mode)) continue;
          c = contender("id " + std::to_string(id) + " mode " + std::to_string(mode));
          if (try_out(c, p.want, way.whole, way.turned) && c.quick < best * 0.995)
            best = c.quick, best_set = {id, -1, mode}, searched_is_best = false;
        }
      }
      string how = "searched";
      if (searched_is_best) {
        s->plan = searched, s->need = searched_need;
      } else {
        s->choose(best_set[0], best_set[1], best_set[2]);
        how = "id " + std::to_string(best_set[0]) + "/" + std::to_string(best_set[1]) + "/" +
              std::to_string(best_set[2]);
      }
      printf("  cuSPARSELt %s %s: best %s %.1f us (search %.2f s, ids to %d)\n", l->version.c_str(),
             way.name().c_str(), how.c_str(), best, took, last);
      c = contender(how);
      if (!way.turned && try_out(c, p.want, way.whole, false)) list.push_back(c);
    }
    keep_best(list, newest ? 2 : 1);
  }
  fflush(log_file);
  const double screened_at = now();
  for (Contender& c : all) c.graph = captured(c.run, copies, c.quick, 10000);
  // In another order each time: the clock is still what the one before made it.
  vector<size_t> order;
  for (size_t i = 0; i < all.size(); i++) order.push_back(i);
  for (int q = 0; q < 7; q++) {
    for (size_t i = order.size(); i > 1; i--) std::swap(order[i - 1], order[rnd() % i]);
    for (size_t i : order) {
      Contender& c = all[i];
      const double us =
          c.graph->exec ? replay(*c.graph) : timed_directly(c.run, copies, c.graph->nodes);
      if (q > 0) c.graph->times.push_back(us);
    }
  }
  // Alone: the best of each family; then the same on zeros, which need little power.
  std::map<string, Contender*> bests;
  for (Contender& c : all) {
    Contender*& b = bests[c.family];
    if (!b || median(*c.graph).us < median(*b->graph).us) b = &c;
  }
  for (auto& [family, c] : bests) {
    if (family == "rounding alone") continue;
    const Alone a = alone(*c->graph, c->run, copies, median(*c->graph).us, 0.3);
    c->alone = a.us, c->mhz = a.mhz, c->watt = a.watt, c->why = a.why;
  }
  if (t >= 2048) {
    x = p.zeros, x16 = (const bf16*)p.zeros;
    for (auto& [family, c] : bests) {
      if (family == "rounding alone") continue;
      auto g = captured(c->run, copies, c->quick, 10000);
      const Alone a = alone(*g, c->run, copies, median(*c->graph).us, 0.1);
      c->zero = a.us, c->zero_mhz = a.mhz;
    }
  }
  const double best = median(*bests["dense"]->graph).us, best_alone = bests["dense"]->alone,
               best_zero = bests["dense"]->zero;
  printf("## %s %dx%d T=%d: dense %.1f us, %.0f TFLOP/s (screening %.1f s, rest %.1f s)\n",
         kKinds[kind], n, k, t, best, 2.0 * n * k * t / best / 1e6, screened_at - begun,
         now() - screened_at);
  for (Contender& c : all) {
    const Time q = median(*c.graph);
    printf("  %-18s %-34s %8.1f us %.3f", c.family.c_str(), c.name.c_str(), q.us, best / q.us);
    if (c.alone == c.alone)
      printf(" | alone %8.1f us %.3f, %4.0f MHz %3.0f W %llx", c.alone, best_alone / c.alone, c.mhz,
             c.watt, c.why);
    if (c.zero == c.zero)
      printf(" | zeros %8.1f us %.3f, %4.0f MHz", c.zero, best_zero / c.zero, c.zero_mhz);
    printf("\n");
    fprintf(csv, "%s,%d,%d,%d,%s,%s,%.2f,%.2f,%.2f,%.3f,%.5f,%.2f,%.3f,%.0f,%.0f,%.2f,%.3f,%.0f\n",
            kKinds[kind], n, k, t, c.family.c_str(), c.name.c_str(), q.us, q.low, q.high,
            best / q.us, c.error, c.alone, best_alone / c.alone, c.mhz, c.watt, c.zero,
            best_zero / c.zero, c.zero_mhz);
  }
  fflush(stdout);
  fflush(csv);
}

int main(int argc, char** argv) {
  if (argc > 2 && string(argv[1]) == "--probe") {
    setup_device();
    Sparselt l;
    if (!l.open(argv[2])) return 1;
    printf("%s: version %s\n", argv[2], l.version.c_str());
    return 0;
  }
  if (argc < 6) {
    printf("rivals OUT.csv LACUNA.so CUSPARSELT.so[,OLDER.so] SECONDS KIND:SHAPES:T,T ...\n");
    return 2;
  }
  const double begun = now(), seconds = atof(argv[4]);
  setup_device();
  setup_dense();
  nvml.open();
  CK(cudaMalloc(&sp_scratch, kSpScratch));
  void* so = dlopen(argv[2], RTLD_NOW | RTLD_LOCAL);
  if (!so) return printf("%s\n", dlerror()), 1;
  library = ((kernels::GpuTableFunction)dlsym(so, kernels::kGpuTableSymbol))();
  if (library->version != kernels::kGpuAbiVersion) return printf("another version of it\n"), 1;
  vector<std::unique_ptr<Sparselt>> libraries;
  for (string paths = argv[3]; !paths.empty();) {
    const size_t comma = paths.find(',');
    auto l = std::make_unique<Sparselt>();
    if (l->open(paths.substr(0, comma).c_str())) libraries.push_back(std::move(l));
    paths = comma == string::npos ? "" : paths.substr(comma + 1);
  }
  csv = fopen(argv[1], "w");
  log_file = fopen((string(argv[1]) + ".tried").c_str(), "w");
  fprintf(csv,
          "kind,n,k,t,family,contender,us,low,high,ratio,error,alone_us,alone_ratio,alone_mhz,"
          "alone_watt,zeros_us,zeros_ratio,zeros_mhz\n");
  fprintf(log_file, "kind,n,k,t,family,contender,us,error\n");
  for (int a = 5; a < argc; a++) {
    const string job = argv[a];
    const size_t c1 = job.find(':'), c2 = job.find(':', c1 + 1);
    const string kind = job.substr(0, c1), shapes = job.substr(c1 + 1, c2 - c1 - 1);
    const vector<int> ts = numbers(job.c_str() + c2 + 1);
    for (char s : shapes) {
      if (now() - begun > seconds) break;
      const Shape sh = kShapes[s - '0'];
      Problem p(kind == "fp8"    ? kFp8
                : kind == "int8" ? kInt8
                                 : kBf16,
                sh.n, sh.k, *std::max_element(ts.begin(), ts.end()));
      for (int t : ts)
        if (now() - begun < seconds)
          cell(p, t, libraries);
        else
          printf("no time left: %s %dx%d T=%d\n", kind.c_str(), sh.n, sh.k, t);
    }
  }
  printf("%.1f s\n", now() - begun);
  return 0;
}
