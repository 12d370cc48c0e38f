// One product of a decode step on a GPU: our kernels beside cuBLAS, cuBLASLt, cuSPARSELt, cuSPARSE
// and the public kernels for unstructured weights (peers.h), in one process, taking turns.
//   bench LIBRARY OUT.csv SHAPES TS WHO
// LIBRARY: our liblacuna_cuda.so. SHAPES: digits, indices into kShapes. TS: e.g. 1,4,8,16,32,64.
// WHO: any of dense,ours,cusparselt,cusparse,macko,spinfer,flash_llm. From 128 tokens on only 2:4
// takes part.
//
// Times are medians of CUDA graph replays (cuSPARSE: of launches in a stream), the weights of each
// contender rotated over more than 1 GB, plain nodes without overlap. The output of everyone is
// compared with the float32 product of the same weight before it is timed; who is wrong isn't
// timed. build.sh says how to build it, tables.py makes docs/results/h200.md's tables of OUT.csv.
#include <cusparse.h>
#include <cusparseLt.h>
#include <dlfcn.h>

#include <memory>

#include "cuda_linear_coded/codes.h"
#include "lacuna/kernels/gpu_abi.h"
#include "peers.h"

namespace lk = lacuna::kernels;

static const lk::GpuTable* library;
static cusparseHandle_t cs;
static cusparseLtHandle_t cslt;
static FILE* csv;
static std::string g_who;
static bool with(const char* who) {
  return ("," + g_who + ",").find(std::string(",") + who + ",") != std::string::npos;
}
static cudaError_t as_error(bool fine) { return fine ? cudaSuccess : cudaErrorUnknown; }

// ---------- weights ----------
// Each weight is kept with probability 1 - percent / 100; what is dropped is +0, whole blocks where
// `block` is more than 1.
__global__ void gen_weight(bf16* w, int n, int k, float scale, unsigned long long seed,
                           float percent, int block) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k;
       i += (size_t)gridDim.x * blockDim.x) {
    const size_t unit = block > 1 ? (i / k / block) * (k / block) + i % k / block : i;
    const float u = (float)(mix(mix(unit + 17) + seed * 0x1000003ull) >> 40) * 0x1p-24f;
    float v = normal(mix(i + seed * 0x5000011ull)) * scale;
    if (fabsf(v) < 1e-3f * scale) v = 1e-3f * scale;  // nothing that fp16 would lose
    w[i] = __float2bfloat16(u < percent * 0.01f ? 0.f : v);
  }
}
// Two random places of each group of four.
__global__ void gen_two_of_four(bf16* w, size_t groups, float scale, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
    const int pair = pairs[h % 6];
    for (int j = 0; j < 4; ++j) w[4 * i + j] = __float2bfloat16(0.f);
    w[4 * i + (pair & 15)] = __float2bfloat16(normal(mix(h ^ 0x1111)) * scale);
    w[4 * i + (pair >> 4)] = __float2bfloat16(normal(mix(h ^ 0x2222)) * scale);
  }
}
__global__ void drop(bf16* w, size_t count, float percent) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    if ((float)(mix(mix(i + 17) + 7) >> 40) * 0x1p-24f < percent * 0.01f)
      w[i] = __float2bfloat16(0.f);
}
__global__ void tenths(bf16* x, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    x[i] = __float2bfloat16(rintf(__bfloat162float(x[i]) * 0.1f));
}
__global__ void transpose(const bf16* x, bf16* out, int t, int k) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)t * k;
       i += (size_t)gridDim.x * blockDim.x)
    out[(i % k) * t + i / k] = x[i];
}
__global__ void scale_float_rows(const float* from, float* to, int n, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    to[i] = from[i] * scale_of(i % n);
}
// y [t,n], or [n,t] where `by_row`.
template <class Y>
__global__ void differences(const Y* y, const float* ref, int n, int t, bool by_row, double* sums) {
  double d = 0, r = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * t;
       i += (size_t)gridDim.x * blockDim.x) {
    const double want = ref[i], got = (float)y[by_row ? (i % n) * t + i / n : i];
    d += got == got ? (got - want) * (got - want) : 1e30;
    r += want * want;
  }
  atomicAdd(sums, d);
  atomicAdd(sums + 1, r);
}

// ---------- what is timed ----------
// Enough copies of one packed weight that no cache serves them.
struct Copies {
  char* base = nullptr;
  size_t stride = 0;
  int count = 0;
  Copies() = default;
  Copies(size_t bytes) : stride((bytes + 255) / 256 * 256) {
    count = (int)std::max<size_t>(3, (size_t)(1.05e9 / bytes) + 1);
    CK(cudaMalloc(&base, stride * count));
  }
  Copies(const Copies&) = delete;
  ~Copies() { cudaFree(base); }
  char* at(int i) const { return base + (size_t)i * stride; }
  void repeat_first() const {
    for (int i = 1; i < count; i++)
      CK(cudaMemcpyAsync(at(i), base, stride, cudaMemcpyDeviceToDevice, st));
  }
};
using CopiesPtr = std::shared_ptr<Copies>;

enum class Out { kBf16, kHalf, kInt, kFloat };
struct Contender {
  std::string who, pattern, values;
  double sparsity, bytes;  // that one product reads of the weight
  Launch run;
  int copies;
  Out out = Out::kBf16;
  bool by_row = false, in_stream = false;
  std::string note;
  double error = -1;
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();
};

static bf16 *d_x, *d_xt;
static half* d_xh;
static void *d_x8[2], *d_y, *d_split;
static float *d_ref, *d_scaled;
static double* d_sums;
static int g_max_t;

static double error_of(const Contender& c, const float* ref, int n, int t) {
  CK(cudaMemsetAsync(d_sums, 0, 16, st));
  if (c.out == Out::kBf16)
    differences<<<512, 256, 0, st>>>((bf16*)d_y, ref, n, t, c.by_row, d_sums);
  if (c.out == Out::kHalf)
    differences<<<512, 256, 0, st>>>((half*)d_y, ref, n, t, c.by_row, d_sums);
  if (c.out == Out::kFloat)
    differences<<<512, 256, 0, st>>>((float*)d_y, ref, n, t, c.by_row, d_sums);
  if (c.out == Out::kInt) differences<<<512, 256, 0, st>>>((int*)d_y, ref, n, t, c.by_row, d_sums);
  double sums[2];
  CK(cudaMemcpyAsync(sums, d_sums, 16, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  return sqrt(sums[0] / sums[1]);
}
// Runs it on a poisoned output and on another copy than the first.
static bool right(Contender& c, const float* ref, int n, int t) {
  CK(cudaMemsetAsync(d_y, 0xff, (size_t)n * std::max(t, 16) * 4, st));
  if (c.run(c.copies - 1) != cudaSuccess) {
    cudaGetLastError();
    return false;
  }
  c.error = error_of(c, ref, n, t);
  return c.error < 1e-2;
}
static double in_stream_us(const Contender& c) {
  float ms;
  CK(cudaEventRecord(e0, st));
  for (int i = 0; i < c.copies; i++) c.run(i);
  CK(cudaEventRecord(e1, st));
  CK(cudaEventSynchronize(e1));
  CK(cudaEventElapsedTime(&ms, e0, e1));
  return ms * 1e3 / c.copies;
}

// ---------- one weight ----------
enum class Kind { kBf16, kFp8, kInt8 };
static const char* kKindNames[] = {"bf16", "fp8", "int8"};

struct Weight {
  std::string pattern;  // dense, 2:4, unstructured, block64x64
  Kind kind;
  int percent, n, k;
  bf16* dense;  // codes as numbers
  bf16* scales = nullptr;
  struct Ours {
    const lk::GpuLinearKernel* kernel;
    lk::GpuLayout layout;
    CopiesPtr copies;
  };
  vector<Ours> ours;
  struct Foreign {
    const rivals::Peer* peer;
    vector<size_t> offsets;
    size_t bytes;
    CopiesPtr copies;
  };
  vector<Foreign> peers;
  CopiesPtr plain;       // W as it is, or its codes in bytes
  CopiesPtr structured;  // cuSPARSELt's
  vector<cusparseSpMatDescr_t> csr;
  CopiesPtr csr_copies;
  size_t csr_bytes = 0;

  Weight(const std::string& p, Kind kd, int pc, Shape s)
      : pattern(p), kind(kd), percent(pc), n(s.n), k(s.k) {
    const size_t count = (size_t)n * k;
    CK(cudaMalloc(&dense, count * 2));
    const float scale = 1.f / sqrtf(k * (1 - percent * 0.01f));
    if (kind != Kind::kBf16) {
      gen_codes<<<2048, 256, 0, st>>>(dense, count / 4, 77, pattern == "2:4", kind == Kind::kFp8);
      if (pattern == "unstructured") drop<<<2048, 256, 0, st>>>(dense, count, percent);
      CK(cudaMalloc(&scales, n * 2));
      gen_scales<<<64, 256, 0, st>>>(scales, n);
    } else if (pattern == "2:4") {
      gen_two_of_four<<<2048, 256, 0, st>>>(dense, count / 4, scale, 77);
    } else {
      gen_weight<<<2048, 256, 0, st>>>(dense, n, k, scale, 77, percent,
                                       pattern == "block64x64" ? 64 : 1);
    }
    if (with("ours")) pack_ours();
    if (pattern == "dense" && with("dense")) pack_plain();
    if (kind == Kind::kBf16 && pattern == "unstructured") {
      pack_peers();
      if (with("cusparse") && (percent == 50 || percent == 80)) pack_csr();
    }
  }
  Weight(const Weight&) = delete;
  ~Weight() {
    for (auto& m : csr) cusparseDestroySpMat(m);
    cudaFree(dense);
    cudaFree(scales);
  }

  void pack_ours() {
    const char* operation = pattern == "dense"          ? "linear_dense"
                            : pattern == "2:4"          ? "linear_nm"
                            : pattern == "unstructured" ? "linear_bitmap"
                                                        : "linear_bsr";
    for (int i = 0; i < library->linear_count; i++) {
      const lk::GpuLinearKernel* kernel = library->linear[i];
      const std::string name = kernel->name;
      const Kind takes = name == "cuda_sm90_fp8"    ? Kind::kFp8
                         : name == "cuda_sm90_int8" ? Kind::kInt8
                                                    : Kind::kBf16;
      if (std::string(kernel->operation) != operation || takes != kind) continue;
      Ours o{kernel, {}, nullptr};
      void *scratch, *report;
      CK(cudaMalloc(&scratch, kernel->scratch_bytes(n, k) + 16));
      CK(cudaMalloc(&report, sizeof(lk::GpuPackReport)));
      CK((cudaError_t)kernel->measure(dense, n, k, scratch, &o.layout, st));
      o.copies = std::make_shared<Copies>(o.layout.packed_bytes > 0 ? o.layout.packed_bytes
                                                                    : (size_t)n * k * 2);
      if (o.layout.packed_bytes > 0) {
        CK(cudaMemsetAsync(report, 0, sizeof(lk::GpuPackReport), st));
        CK((cudaError_t)kernel->pack(&o.layout, dense, scratch, o.copies->base,
                                     (lk::GpuPackReport*)report, st));
        if (scales) CK((cudaError_t)kernel->pack_scales(&o.layout, scales, o.copies->base, st));
      } else {
        CK(cudaMemcpyAsync(o.copies->base, dense, (size_t)n * k * 2, cudaMemcpyDeviceToDevice, st));
      }
      o.copies->repeat_first();
      CK(cudaStreamSynchronize(st));
      cudaFree(scratch);
      cudaFree(report);
      ours.push_back(std::move(o));
    }
  }
  void to_bytes(void* to) const {
    const size_t count = (size_t)n * k;
    if (kind == Kind::kFp8) convert<<<2048, 256, 0, st>>>(dense, (__nv_fp8_e4m3*)to, count);
    if (kind == Kind::kInt8) convert<<<2048, 256, 0, st>>>(dense, (signed char*)to, count);
    if (kind == Kind::kBf16)
      CK(cudaMemcpyAsync(to, dense, count * 2, cudaMemcpyDeviceToDevice, st));
  }
  size_t plain_bytes() const { return (size_t)n * k * (kind == Kind::kBf16 ? 2 : 1); }
  void pack_plain() {
    plain = std::make_shared<Copies>(plain_bytes());
    to_bytes(plain->base);
    plain->repeat_first();
  }
  void pack_peers() {
    const rivals::Peer* all[] = {&rivals::kMacko, &rivals::kSpInfer, &rivals::kFlashLlm};
    vector<half> host;
    for (const rivals::Peer* peer : all) {
      if (!with(peer->name)) continue;
      if (host.empty()) {
        half* on_device;
        CK(cudaMalloc(&on_device, (size_t)n * k * 2));
        convert<<<2048, 256, 0, st>>>(dense, on_device, (size_t)n * k);
        host.resize((size_t)n * k);
        CK(cudaStreamSynchronize(st));
        CK(cudaMemcpy(host.data(), on_device, host.size() * 2, cudaMemcpyDeviceToHost));
        cudaFree(on_device);
      }
      const rivals::Form form = peer->pack(host.data(), n, k);
      Foreign f{peer, {}, form.bytes, nullptr};
      size_t all_bytes = 0;
      for (const auto& part : form.parts) {
        f.offsets.push_back(all_bytes);
        all_bytes += (part.size() + 255) / 256 * 256;
      }
      f.copies = std::make_shared<Copies>(all_bytes);
      for (size_t i = 0; i < form.parts.size(); i++)
        CK(cudaMemcpy(f.copies->base + f.offsets[i], form.parts[i].data(), form.parts[i].size(),
                      cudaMemcpyHostToDevice));
      f.copies->repeat_first();
      peers.push_back(std::move(f));
    }
    CK(cudaStreamSynchronize(st));
  }
  void pack_csr() {
    cusparseDnMatDescr_t from;
    cusparseSpMatDescr_t to;
    void *rows, *buffer;
    size_t need = 0;
    int64_t r, c, count;
    CK(cudaMalloc(&rows, (size_t)(n + 1) * 4));
    CB(cusparseCreateDnMat(&from, n, k, k, dense, CUDA_R_16BF, CUSPARSE_ORDER_ROW));
    CB(cusparseCreateCsr(&to, n, k, 0, rows, nullptr, nullptr, CUSPARSE_INDEX_32I,
                         CUSPARSE_INDEX_32I, CUSPARSE_INDEX_BASE_ZERO, CUDA_R_16BF));
    CB(cusparseDenseToSparse_bufferSize(cs, from, to, CUSPARSE_DENSETOSPARSE_ALG_DEFAULT, &need));
    CK(cudaMalloc(&buffer, need + 16));
    CB(cusparseDenseToSparse_analysis(cs, from, to, CUSPARSE_DENSETOSPARSE_ALG_DEFAULT, buffer));
    CB(cusparseSpMatGetSize(to, &r, &c, &count));
    const size_t row_bytes = ((size_t)(n + 1) * 4 + 255) / 256 * 256,
                 column_bytes = ((size_t)count * 4 + 255) / 256 * 256;
    csr_bytes = (size_t)(n + 1) * 4 + (size_t)count * 6;
    csr_copies = std::make_shared<Copies>(row_bytes + column_bytes + (size_t)count * 2);
    char* base = csr_copies->base;
    CB(cusparseCsrSetPointers(to, rows, base + row_bytes, base + row_bytes + column_bytes));
    CB(cusparseDenseToSparse_convert(cs, from, to, CUSPARSE_DENSETOSPARSE_ALG_DEFAULT, buffer));
    CK(cudaMemcpyAsync(base, rows, (size_t)(n + 1) * 4, cudaMemcpyDeviceToDevice, st));
    csr_copies->repeat_first();
    CK(cudaStreamSynchronize(st));
    for (int i = 0; i < csr_copies->count; i++) {
      char* p = csr_copies->at(i);
      cusparseSpMatDescr_t m;
      CB(cusparseCreateCsr(&m, n, k, count, p, p + row_bytes, p + row_bytes + column_bytes,
                           CUSPARSE_INDEX_32I, CUSPARSE_INDEX_32I, CUSPARSE_INDEX_BASE_ZERO,
                           CUDA_R_16BF));
      csr.push_back(m);
    }
    cusparseDestroySpMat(to);
    cusparseDestroyDnMat(from);
    cudaFree(rows);
    cudaFree(buffer);
  }
  Contender contender(const std::string& who, double bytes, Launch run, int copies,
                      const std::string& note = "") const {
    Contender c;
    c.who = who;
    c.pattern = pattern;
    c.values = kKindNames[(int)kind];
    c.sparsity = percent * 0.01;
    c.bytes = bytes;
    c.run = std::move(run);
    c.copies = copies;
    c.note = note;
    return c;
  }
};
using WeightPtr = std::unique_ptr<Weight>;

// ---------- cuSPARSELt ----------
struct Structured {
  cusparseLtMatDescriptor_t w, x, y;
  cusparseLtMatmulDescriptor_t op;
  cusparseLtMatmulAlgSelection_t selection;
  cusparseLtMatmulPlan_t plan;
  size_t bytes = 0, buffer = 0, need = 0;
  bool ok = false;
  Structured(Kind kind, int n, int k, int t) {
    const cudaDataType in = kind == Kind::kBf16  ? CUDA_R_16BF
                            : kind == Kind::kFp8 ? CUDA_R_8F_E4M3
                                                 : CUDA_R_8I,
                       out = kind == Kind::kInt8 ? CUDA_R_32I : CUDA_R_16BF;
    const auto sums = kind == Kind::kInt8 ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F;
    ok = cusparseLtStructuredDescriptorInit(&cslt, &w, n, k, k, 16, in, CUSPARSE_ORDER_ROW,
                                            CUSPARSELT_SPARSITY_50_PERCENT) == 0 &&
         cusparseLtDenseDescriptorInit(&cslt, &x, t, k, k, 16, in, CUSPARSE_ORDER_ROW) == 0 &&
         cusparseLtDenseDescriptorInit(&cslt, &y, n, t, n, 16, out, CUSPARSE_ORDER_COL) == 0 &&
         cusparseLtMatmulDescriptorInit(&cslt, &op, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                        CUSPARSE_OPERATION_TRANSPOSE, &w, &x, &y, &y, sums) == 0 &&
         cusparseLtMatmulAlgSelectionInit(&cslt, &selection, &op, CUSPARSELT_MATMUL_ALG_DEFAULT) ==
             0 &&
         cusparseLtMatmulPlanInit(&cslt, &plan, &op, &selection) == 0 &&
         cusparseLtSpMMACompressedSize(&cslt, &plan, &bytes, &buffer) == 0;
  }
  bool search(const void* packed, const void* from) {
    const float one = 1, zero = 0;
    const bool found = cusparseLtMatmulSearch(&cslt, &plan, &one, packed, from, &zero, d_y, d_y,
                                              d_ws, &st, 1) == 0;
    return found && cusparseLtMatmulGetWorkspace(&cslt, &plan, &need) == 0 && need <= kWs;
  }
  cudaError_t run(const void* packed, const void* from) {
    const float one = 1, zero = 0;
    return as_error(
        cusparseLtMatmul(&cslt, &plan, &one, packed, from, &zero, d_y, d_y, d_ws, &st, 1) == 0);
  }
};

// ---------- who takes part in one number of tokens ----------
using All = vector<Contender>;
static void add(All& all, Contender c, const float* ref, int n, int k, int t) {
  if (right(c, ref, n, t)) {
    all.push_back(std::move(c));
    return;
  }
  printf("  not timed: %s %s %s %d%% T=%d, relative error %g\n", c.who.c_str(), c.values.c_str(),
         c.pattern.c_str(), int(c.sparsity * 100 + 0.5), t, c.error);
  fprintf(csv, "%d,%d,%d,%s,%s,%.2f,%s,,,,%.0f,%.3g,wrong or refused\n", n, k, t, c.values.c_str(),
          c.pattern.c_str(), c.sparsity, c.who.c_str(), c.bytes, c.error);
}

static void add_ours(All& all, const Weight& w, int t) {
  const float* ref = w.scales ? d_scaled : d_ref;
  for (const Weight::Ours& o : w.ours) {
    const lk::GpuLayout& layout = o.layout;
    const int64_t few = o.kernel->max_tokens(&layout), many = o.kernel->many_tokens(&layout);
    const bool takes = t <= few || (many > 0 && t >= many);
    const double bytes = layout.packed_bytes > 0 ? layout.packed_bytes : (double)w.n * w.k * 2;
    const std::string name = std::string(o.kernel->operation) + ":" + o.kernel->name;
    if (takes) {
      auto plan = std::make_shared<lk::GpuPlan>();
      if (o.kernel->plan(&layout, t, plan.get()) != 0) continue;
      auto workspace =
          std::make_shared<Buffer<char>>(o.kernel->workspace_bytes(&layout, plan.get()) + 16);
      add(all,
          w.contender(
              name, bytes,
              [&w, &o, plan, workspace](int i) {
                return (cudaError_t)o.kernel->run(&o.layout, plan.get(), o.copies->at(i), d_x, d_y,
                                                  workspace->p, 0, st);
              },
              o.copies->count),
          ref, w.n, w.k, t);
    } else if (o.kernel->name != std::string("cuda_sm90_gap") && w.pattern != "dense") {
      // As a model runs it: expanded into a scratch, then the dense product.
      static std::shared_ptr<Buffer<bf16>> scratch;
      if (!scratch || scratch->n < (size_t)w.n * w.k)
        scratch = std::make_shared<Buffer<bf16>>((size_t)w.n * w.k);
      auto held = scratch;
      add(all,
          w.contender(
              name + " expanded", bytes,
              [&w, &o, held, t](int i) {
                const int e = o.kernel->unpack(&o.layout, o.copies->at(i), held->p, st);
                return e != 0 ? (cudaError_t)e
                              : as_error(gemm_ex(held->p, d_x, d_y, CUDA_R_16BF, w.n, w.k, t) == 0);
              },
              o.copies->count),
          ref, w.n, w.k, t);
    }
  }
}
static void add_dense(All& all, const Weight& w, int t) {
  vector<Rival> rivals;
  if (w.kind == Kind::kBf16) {
    vector<bf16*> copies;
    for (int i = 0; i < w.plain->count; i++) copies.push_back((bf16*)w.plain->at(i));
    rivals = dense_rivals(copies, d_x, (bf16*)d_y, d_ref, w.n, w.k, t);
  } else {
    vector<void*> copies;
    for (int i = 0; i < w.plain->count; i++) copies.push_back(w.plain->at(i));
    rivals = lt_rivals(w.kind == Kind::kFp8, copies, d_x8[w.kind == Kind::kInt8], d_y, d_ref, w.n,
                       w.k, t);
  }
  for (Rival& r : rivals) {  // those were compared there
    Contender c = w.contender(r.name == "GemmEx" ? "cublas" : "cublaslt", w.plain_bytes(), {},
                              w.plain->count, r.name);
    c.graph = std::make_unique<Graph>(std::move(r.graph));
    all.push_back(std::move(c));
  }
}
static void add_structured(All& all, Weight& w, int t) {
  const int step = w.kind == Kind::kBf16 ? 8 : 16, padded = (t + step - 1) / step * step;
  auto s = std::make_shared<Structured>(w.kind, w.n, w.k, padded);
  const void* x = w.kind == Kind::kBf16 ? (void*)d_x : d_x8[w.kind == Kind::kInt8];
  if (s->ok && !w.structured) {
    Buffer<char> bytes(w.plain_bytes()), scratch(s->buffer + 16);
    w.to_bytes(bytes.p);
    w.structured = std::make_shared<Copies>(s->bytes);
    s->ok =
        cusparseLtSpMMACompress(&cslt, &s->plan, bytes.p, w.structured->base, scratch.p, st) == 0;
    w.structured->repeat_first();
    CK(cudaStreamSynchronize(st));
  }
  if (!s->ok || !s->search(w.structured->base, x)) {
    printf("  cuSPARSELt refuses %s T=%d\n", kKindNames[(int)w.kind], t);
    return;
  }
  Contender c = w.contender(
      "cusparselt", s->bytes, [&w, s, x](int i) { return s->run(w.structured->at(i), x); },
      w.structured->count, "searched; padded to " + std::to_string(padded));
  if (w.kind == Kind::kInt8) c.out = Out::kInt;
  add(all, std::move(c), d_ref, w.n, w.k, t);
}
static void add_peers(All& all, const Weight& w, int t) {
  for (const Weight::Foreign& f : w.peers) {
    if (f.peer->tokens == 1 && t > 1) continue;
    const int padded = (t + f.peer->tokens - 1) / f.peer->tokens * f.peer->tokens;
    const auto launch = [&w, &f, padded](const rivals::Peer* peer, int split) -> Launch {
      return [&w, &f, padded, peer, split](int i) {
        char* parts[8];
        for (size_t p = 0; p < f.offsets.size(); p++) parts[p] = f.copies->at(i) + f.offsets[p];
        return peer->run(st, parts, d_xh, (half*)d_y, w.n, w.k, padded, split, d_split);
      };
    };
    const auto made = [&](const rivals::Peer* peer, int split, const std::string& note) {
      Contender c = w.contender(peer->name, f.bytes, launch(peer, split), f.copies->count, note);
      c.out = Out::kHalf;
      return c;
    };
    if (!f.peer->splits) {
      add(all, made(f.peer, 1, "as published"), d_ref, w.n, w.k, t);
      for (const rivals::Peer* p :
           {&rivals::kMackoRows4, &rivals::kMackoRows8, &rivals::kMackoRows16})
        add(all, made(p, 1, "fewer rows a block"), d_ref, w.n, w.k, t);
      continue;
    }
    double least = 1e30;
    int best = 0, wrong = 0, tried = 0;
    for (int split : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16}) {
      const int tiles = w.k / 64, each = (tiles - 1) / split + 1;
      if (each * split - tiles >= each) continue;
      Contender c = made(f.peer, split, "");
      tried++;
      if (!right(c, d_ref, w.n, t)) {
        wrong++;
        continue;
      }
      const double us = time_graph(c.run, c.copies, f.bytes / 2.5e6 + 5, 1, 300).us;
      if (us < least) least = us, best = split;
    }
    add(all,
        made(f.peer, best ? best : 1,
             "split " + std::to_string(best) + "; wrong with " + std::to_string(wrong) + " of " +
                 std::to_string(tried) + " splits; padded to " + std::to_string(padded)),
        d_ref, w.n, w.k, t);
  }
}
// y in float32: cuSPARSE's own bf16 outputs are sums of rounded parts, 1 to 2 % off in norm.
static void add_csr(All& all, const Weight& w, int t) {
  if (w.csr.empty()) return;
  static void* buffer = nullptr;
  constexpr size_t kBuffer = 256u << 20;
  if (!buffer) CK(cudaMalloc(&buffer, kBuffer));
  transpose<<<512, 256, 0, st>>>(d_x, d_xt, t, w.k);
  static const float one = 1, zero = 0;
  const auto keep = [&](const std::string& name, Launch run, bool by_row) {
    Contender c = w.contender("cusparse", w.csr_bytes, std::move(run), (int)w.csr.size(), name);
    c.by_row = by_row;
    c.in_stream = true;
    c.out = Out::kFloat;
    add(all, std::move(c), d_ref, w.n, w.k, t);
  };
  size_t need = 0;
  if (t == 1) {
    cusparseDnVecDescr_t x, y;
    CB(cusparseCreateDnVec(&x, w.k, d_x, CUDA_R_16BF));
    CB(cusparseCreateDnVec(&y, w.n, d_y, CUDA_R_32F));
    for (auto a : {CUSPARSE_SPMV_CSR_ALG1, CUSPARSE_SPMV_CSR_ALG2}) {
      if (cusparseSpMV_bufferSize(cs, CUSPARSE_OPERATION_NON_TRANSPOSE, &one, w.csr[0], x, &zero, y,
                                  CUDA_R_32F, a, &need) != 0 ||
          need > kBuffer)
        continue;
      keep(
          a == CUSPARSE_SPMV_CSR_ALG1 ? "SpMV CSR 1" : "SpMV CSR 2",
          [&w, x, y, a](int i) {
            return as_error(cusparseSpMV(cs, CUSPARSE_OPERATION_NON_TRANSPOSE, &one, w.csr[i], x,
                                         &zero, y, CUDA_R_32F, a, buffer) == 0);
          },
          false);
    }
    return;
  }
  struct Way {
    cusparseSpMMAlg_t algorithm;
    bool by_row;
    const char* name;
  };
  for (const Way& v : {Way{CUSPARSE_SPMM_CSR_ALG1, false, "SpMM CSR 1"},
                       Way{CUSPARSE_SPMM_CSR_ALG2, true, "SpMM CSR 2, by row"},
                       Way{CUSPARSE_SPMM_CSR_ALG3, true, "SpMM CSR 3, by row"}}) {
    cusparseDnMatDescr_t x, y;
    const auto order = v.by_row ? CUSPARSE_ORDER_ROW : CUSPARSE_ORDER_COL;
    CB(cusparseCreateDnMat(&x, w.k, t, v.by_row ? t : w.k, v.by_row ? d_xt : d_x, CUDA_R_16BF,
                           order));
    CB(cusparseCreateDnMat(&y, w.n, t, v.by_row ? t : w.n, d_y, CUDA_R_32F, order));
    const auto plain = CUSPARSE_OPERATION_NON_TRANSPOSE;
    const auto a = v.algorithm;
    if (cusparseSpMM_bufferSize(cs, plain, plain, &one, w.csr[0], x, &zero, y, CUDA_R_32F, a,
                                &need) != 0 ||
        need > kBuffer) {
      printf("  cuSPARSE refuses %s T=%d (%zu bytes)\n", v.name, t, need);
      continue;
    }
    keep(
        v.name,
        [&w, x, y, a, plain](int i) {
          return as_error(cusparseSpMM(cs, plain, plain, &one, w.csr[i], x, &zero, y, CUDA_R_32F, a,
                                       buffer) == 0);
        },
        v.by_row);
  }
}

static void report(All& all, Shape s, int t) {
  double best[3] = {1e30, 1e30, 1e30};
  vector<Time> times;
  for (Contender& c : all) {
    const Time m = median(*c.graph);
    times.push_back(m);
    if (c.pattern == "dense" && m.us == m.us)
      for (int v = 0; v < 3; v++)
        if (c.values == kKindNames[v]) best[v] = std::min(best[v], m.us);
  }
  printf("## %dx%d T=%d\n", s.n, s.k, t);
  for (size_t i = 0; i < all.size(); i++) {
    const Contender& c = all[i];
    const Time& m = times[i];
    const double dense = best[c.values == "bf16" ? 0 : c.values == "fp8" ? 1 : 2];
    printf("  %-4s %-12s %3.0f%% %-34s %9.2f us  %.3f\n", c.values.c_str(), c.pattern.c_str(),
           c.sparsity * 100, c.who.c_str(), m.us, dense / m.us);
    fprintf(csv, "%d,%d,%d,%s,%s,%.2f,%s,%.3f,%.3f,%.3f,%.0f,%.3g,%s\n", s.n, s.k, t,
            c.values.c_str(), c.pattern.c_str(), c.sparsity, c.who.c_str(), m.us, m.low, m.high,
            c.bytes, c.error, c.note.c_str());
  }
  fflush(stdout);
  fflush(csv);
}

static void reference(const Weight& w, int t) {
  CB(gemm_ex(w.dense, d_x, d_ref, CUDA_R_32F, w.n, w.k, t));
  if (w.scales) scale_float_rows<<<512, 256, 0, st>>>(d_ref, d_scaled, w.n, (size_t)w.n * t);
}
// Numbers for bf16 weights; for codes small whole numbers, the same in every type.
static void make_x(bool codes, int k) {
  const size_t count = (size_t)g_max_t * k;
  if (codes) {
    gen_codes<<<512, 256, 0, st>>>(d_x, count / 4, 5, false, false);
    tenths<<<512, 256, 0, st>>>(d_x, count);
    convert<<<512, 256, 0, st>>>(d_x, (__nv_fp8_e4m3*)d_x8[0], count);
    convert<<<512, 256, 0, st>>>(d_x, (signed char*)d_x8[1], count);
  } else {
    gen_x<<<512, 256, 0, st>>>(d_x, count, 5);
    convert<<<512, 256, 0, st>>>(d_x, d_xh, count);
  }
}

// All of one shape and one type of x: weights stay, tokens change.
static void compare(Shape s, const vector<int>& ts, bool codes) {
  vector<WeightPtr> weights;
  const auto make = [&](const char* pattern, Kind kind, int percent) {
    weights.push_back(std::make_unique<Weight>(pattern, kind, percent, s));
  };
  const bool few = *std::min_element(ts.begin(), ts.end()) < 128;
  for (Kind kind : codes ? vector<Kind>{Kind::kFp8, Kind::kInt8} : vector<Kind>{Kind::kBf16}) {
    make("dense", kind, 0);
    make("2:4", kind, 50);
    if (!few) continue;
    for (int percent : codes ? vector<int>{50} : vector<int>{50, 60, 70, 80})
      make("unstructured", kind, percent);
    if (!codes && with("ours"))
      for (int percent : {80, 90}) make("block64x64", kind, percent);
  }
  make_x(codes, s.k);
  CK(cudaStreamSynchronize(st));
  for (int t : ts) {
    All all;
    for (WeightPtr& w : weights) {
      if (t >= 128 && w->pattern != "dense" && w->pattern != "2:4") continue;
      reference(*w, t);
      if (w->pattern == "dense" && with("dense")) add_dense(all, *w, t);
      if (w->pattern == "2:4" && with("cusparselt")) add_structured(all, *w, t);
      add_ours(all, *w, t);
      add_peers(all, *w, t);
      add_csr(all, *w, t);
    }
    vector<Graph*> graphs;
    for (Contender& c : all) {
      const double guess = c.bytes / 3.5e6 + 3 + 2.0 * t * s.n * s.k / 6e8;
      if (c.in_stream)
        for (int q = 0; q < 3; q++) c.graph->times.push_back(in_stream_us(c));
      else if (!c.graph->exec)
        c.graph = std::make_unique<Graph>(capture(c.run, c.copies, guess, 3000));
      graphs.push_back(c.graph.get());
    }
    interleave(graphs, 5);
    report(all, s, t);
  }
}

int main(int argc, char** argv) {
  if (argc < 6) {
    printf("bench LIBRARY OUT.csv SHAPES TS WHO\n");
    return 2;
  }
  setup_device();
  void* opened = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!opened) return printf("%s\n", dlerror()), 2;
  library = ((lk::GpuTableFunction)dlsym(opened, lk::kGpuTableSymbol))();
  if (library->version != lk::kGpuAbiVersion) return printf("another interface\n"), 2;
  g_who = argv[5];
  setup_dense();
  CB(cusparseCreate(&cs));
  CB(cusparseSetStream(cs, st));
  CB(cusparseLtInit(&cslt));
  int version = 0, lt_version = 0;
  cusparseGetVersion(cs, &version);
  cusparseLtGetVersion(&cslt, &lt_version);
  printf("cuSPARSE %d, cuSPARSELt %d\n", version, lt_version);
  const vector<int> ts = numbers(argv[4]);
  g_max_t = std::max(64, *std::max_element(ts.begin(), ts.end()));
  const size_t x = (size_t)g_max_t * 14336, y = (size_t)g_max_t * 28672;
  CK(cudaMalloc(&d_x, x * 2));
  CK(cudaMalloc(&d_xt, x * 2));
  CK(cudaMalloc(&d_xh, x * 2));
  CK(cudaMalloc(&d_x8[0], x));
  CK(cudaMalloc(&d_x8[1], x));
  CK(cudaMalloc(&d_y, y * 4));
  CK(cudaMalloc(&d_ref, y * 4));
  CK(cudaMalloc(&d_scaled, y * 4));
  CK(cudaMalloc(&d_sums, 16));
  CK(cudaMalloc(&d_split, (size_t)16 * 64 * 28672 * 4));
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  fprintf(csv, "n,k,t,values,pattern,sparsity,who,us,low,high,weight_bytes,error,note\n");
  for (const char* q = argv[3]; *q; q++)
    for (bool codes : {false, true}) compare(kShapes[*q - '0'], ts, codes);
  fclose(csv);
  CK(cudaDeviceSynchronize());
  printf("done\n");
  return 0;
}
