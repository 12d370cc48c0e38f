// The study of 2:4 weights with many tokens: our kernel, CUTLASS and cuSPARSELt against the dense
// product, and the test program of the kernel (README.md).
#include <cusparseLt.h>

#include "../cuda_harness.h"
#include "cutlass.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_wgmma_sp.h"

namespace nm = lacuna::kernels::linear_nm;
static FILE* csv;
static const double kRounding = 2.5e-3;  // relative error of a right result: y is rounded to bf16

// Two of four at random places; `thin`: 0 to 2, and -0.0 at some of the others. Values are normal,
// or whole numbers up to 4 (`whole`), of which every sum is exact.
__global__ void gen_w(bf16* w, size_t groups, float scale, unsigned long long seed, int thin,
                      int whole) {
  static const unsigned char pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pair = pairs[h % 6], count = thin ? int((h >> 8) % 3) : 2;
    bf16 v[4];
    for (int j = 0; j < 4; j++) v[j] = __float2bfloat16(thin && (h >> (16 + j)) % 2 ? -0.f : 0.f);
    for (int j = 0; j < count; j++) {
      const unsigned long long g = mix(h ^ (0x1111 * (j + 1)));
      const float f =
          whole ? (float)(int)(g % 4 + 1) * (g >> 8 & 1 ? 1.f : -1.f) : normal(g) * scale;
      v[j ? pair >> 4 : pair & 15] = __float2bfloat16(f);
    }
    *reinterpret_cast<uint2*>(w + 4 * i) = *reinterpret_cast<uint2*>(v);
  }
}
__global__ void gen_whole_x(bf16* x, size_t n, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x)
    x[i] = __float2bfloat16((float)(int)(mix(i + seed * 0x1000003ull) % 9) - 4.f);
}

// ---------- correctness ----------
static std::string name_of(const nm::WgmmaSpPlan& p) {
  return std::to_string(p.tokens) + " tokens, band " + std::to_string(p.band);
}
static vector<nm::WgmmaSpPlan> all_plans() { return {{256, 8}, {128, 8}, {256, 1}, {128, 3}}; }

// Whole numbers: y is the exact sum, rounded once. x = 1 (identity) makes y the transpose of W.
static int exact(int n, int k, int t, bool thin, bool identity,
                 const vector<nm::WgmmaSpPlan>& plans, bool say) {
  const size_t guard = 128, ny = (size_t)n * t;
  Buffer<bf16> w((size_t)n * k), x((size_t)t * k), y(ny + guard);
  Buffer<unsigned char> packed(nm::mma_sp_packed_bytes(n, k));
  gen_w<<<512, 256, 0, st>>>(w.p, w.n / 4, 1.f, n * 31 + k, thin, 1);
  if (identity) {
    vector<bf16> one((size_t)t * k, __float2bfloat16(0.f));
    for (int i = 0; i < std::min(t, k); i++) one[(size_t)i * k + i] = __float2bfloat16(1.f);
    CK(cudaMemcpy(x.p, one.data(), one.size() * 2, cudaMemcpyHostToDevice));
  } else {
    gen_whole_x<<<64, 256, 0, st>>>(x.p, x.n, t * 7 + n);
  }
  CK(nm::mma_sp_pack(w.p, n, k, packed.p, nullptr, st));
  Buffer<double> ref(ny), magnitude(ny);
  reference64<<<dim3(n, t), 128, 0, st>>>(w.p, x.p, ref.p, magnitude.p, n, k, t);
  CK(cudaStreamSynchronize(st));
  const vector<double> want = ref.read();
  int bad = 0;
  for (const nm::WgmmaSpPlan& plan : plans) {
    CK(cudaMemset(y.p, 0xff, y.n * 2));
    const cudaError_t e = nm::wgmma_sp_run(packed.p, x.p, y.p, n, k, t, plan, st);
    if (e != cudaSuccess) {
      printf("refused %dx%d T=%d %s: %s\n", n, k, t, name_of(plan).c_str(), cudaGetErrorString(e));
      cudaGetLastError();
      bad++;
      continue;
    }
    CK(cudaStreamSynchronize(st));
    const vector<bf16> got = y.read();
    size_t wrong = 0;
    vector<int> in_row(n), of_token(t);
    for (size_t i = 0; i < got.size(); i++) {
      unsigned short u;
      memcpy(&u, &got[i], 2);
      const unsigned short expected = i < ny ? bits((float)want[i]) : 0xffff;
      if (u != expected && !(i < ny && want[i] == 0 && (u & 0x7fff) == 0)) {
        if (wrong++ < 3 && say)
          printf("  n=%zu t=%zu got %g want %g\n", i % n, i / n, value(u), i < ny ? want[i] : NAN);
        if (i < ny) in_row[i % n]++, of_token[i / n]++;
      }
    }
    if (wrong) {
      printf("WRONG %zu of %zu: %dx%d T=%d thin %d identity %d %s\n", wrong, ny, n, k, t, thin,
             identity, name_of(plan).c_str());
      auto runs = [](const char* name, const vector<int>& count) {
        printf("    %s", name);
        for (size_t i = 0, from = 0; i <= count.size(); i++) {
          const bool hit = i < count.size() && count[i] > 0;
          if (!hit && from < i) printf(" %zu..%zu", from, i - 1);
          if (!hit) from = i + 1;
        }
        printf("\n");
      };
      runs("outputs", in_row);
      runs("tokens", of_token);
      bad++;
    }
  }
  return bad;
}

static int check(bool small) {
  const vector<nm::WgmmaSpPlan> plans = all_plans();
  int bad = 0, tests = 0;
  auto test = [&](int n, int k, int t, bool thin, bool identity) {
    bad += exact(n, k, t, thin, identity, plans, bad < 4);
    tests += (int)plans.size();
  };
  test(264, 256, 256, false, true);
  test(264, 256, 256, true, true);
  for (int n : small ? vector<int>{8, 200} : vector<int>{8, 64, 72, 128, 200, 520, 1032})
    for (int k : small ? vector<int>{128, 384} : vector<int>{128, 256, 384, 1152})
      for (int t : small ? vector<int>{1, 130} : vector<int>{1, 65, 128, 130, 255, 257, 600})
        test(n, k, t, (n + t) % 2, false);
  if (!small)
    for (int t : {257, 2048}) test(4104, 512, t, false, false);
  printf("%d tests, %d wrong\n", tests, bad);
  return bad;
}

// ---------- timing ----------
struct Contender {
  std::string name;
  Launch run;
  double error = 0;
  vector<double> times;
  double us() {
    if (times.empty()) return NAN;
    std::sort(times.begin(), times.end());
    return times[times.size() / 2];
  }
};
static double measure(const Launch& f, int copies, int runs) {
  float ms;
  CK(cudaEventRecord(e0, st));
  for (int i = 0; i < runs; i++)
    if (f(i % copies) != cudaSuccess) return NAN;
  CK(cudaEventRecord(e1, st));
  CK(cudaEventSynchronize(e1));
  CK(cudaEventElapsedTime(&ms, e0, e1));
  return ms * 1e3 / runs;
}
static cudaError_t as_error(bool ok) { return ok ? cudaSuccess : cudaErrorUnknown; }

// cuBLASLt, one problem: its heuristic answers.
struct Lt {
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t w, x, y;
  cublasLtMatmulHeuristicResult_t found[16];
  int count = 0;
  Lt(int n, int k, int t) {
    const cublasOperation_t tr = CUBLAS_OP_T;
    cublasLtMatmulPreference_t pref;
    CB(cublasLtMatmulDescCreate(&op, CUBLAS_COMPUTE_32F, CUDA_R_32F));
    CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &tr, sizeof tr));
    CB(cublasLtMatrixLayoutCreate(&w, CUDA_R_16BF, k, n, k));
    CB(cublasLtMatrixLayoutCreate(&x, CUDA_R_16BF, k, t, k));
    CB(cublasLtMatrixLayoutCreate(&y, CUDA_R_16BF, n, t, n));
    CB(cublasLtMatmulPreferenceCreate(&pref));
    CB(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWs,
                                            sizeof kWs));
    cublasLtMatmulAlgoGetHeuristic(lt, op, w, x, y, y, pref, 16, found, &count);
    cublasLtMatmulPreferenceDestroy(pref);
  }
  cudaError_t run(int a, const bf16* wp, const bf16* xp, bf16* yp) {
    const float one = 1, zero = 0;
    return as_error(cublasLtMatmul(lt, op, &one, wp, w, xp, x, &zero, yp, y, yp, y, &found[a].algo,
                                   d_ws, kWs, st) == CUBLAS_STATUS_SUCCESS);
  }
};

// cuSPARSELt, one problem: W is the structured operand, x row-major is the transpose of [K,T].
static cusparseLtHandle_t sp;
struct Cslt {
  cusparseLtMatDescriptor_t w, x, y;
  cusparseLtMatmulDescriptor_t op;
  cusparseLtMatmulAlgSelection_t selection;
  cusparseLtMatmulPlan_t plan;
  size_t bytes = 0, buffer = 0;
  bool ok = false;
  Cslt(int n, int k, int t) {
    ok =
        cusparseLtStructuredDescriptorInit(&sp, &w, n, k, k, 16, CUDA_R_16BF, CUSPARSE_ORDER_ROW,
                                           CUSPARSELT_SPARSITY_50_PERCENT) == 0 &&
        cusparseLtDenseDescriptorInit(&sp, &x, t, k, k, 16, CUDA_R_16BF, CUSPARSE_ORDER_ROW) == 0 &&
        cusparseLtDenseDescriptorInit(&sp, &y, n, t, n, 16, CUDA_R_16BF, CUSPARSE_ORDER_COL) == 0 &&
        cusparseLtMatmulDescriptorInit(&sp, &op, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                       CUSPARSE_OPERATION_TRANSPOSE, &w, &x, &y, &y,
                                       CUSPARSE_COMPUTE_32F) == 0 &&
        cusparseLtMatmulAlgSelectionInit(&sp, &selection, &op, CUSPARSELT_MATMUL_ALG_DEFAULT) ==
            0 &&
        cusparseLtMatmulPlanInit(&sp, &plan, &op, &selection) == 0 &&
        cusparseLtSpMMACompressedSize(&sp, &plan, &bytes, &buffer) == 0;
  }
  bool compress(const bf16* dense, void* to) {
    void* scratch = nullptr;
    CK(cudaMalloc(&scratch, buffer + 16));
    const bool done = cusparseLtSpMMACompress(&sp, &plan, dense, to, scratch, st) == 0;
    CK(cudaStreamSynchronize(st));
    CK(cudaFree(scratch));
    return done;
  }
  bool search(const void* packed, const bf16* xp, bf16* yp) {
    const float one = 1, zero = 0;
    return cusparseLtMatmulSearch(&sp, &plan, &one, packed, xp, &zero, yp, yp, d_ws, &st, 1) == 0;
  }
  bool run(const void* packed, const bf16* xp, bf16* yp) {
    const float one = 1, zero = 0;
    size_t need = 0;
    return cusparseLtMatmulGetWorkspace(&sp, &plan, &need) == 0 && need <= kWs &&
           cusparseLtMatmul(&sp, &plan, &one, packed, xp, &zero, yp, yp, d_ws, &st, 1) == 0;
  }
};

struct Problem {
  int n, k, copies;
  vector<bf16*> dense;
  vector<unsigned char*> packed, cslt, values, metadata;
  bf16 *x, *y, *scratch;
  float* ref;
  Problem(int n_, int k_, int tmax) : n(n_), k(k_) {
    const size_t bytes = (size_t)n * k * 2;
    copies = (int)std::max<size_t>(3, 400000000 / bytes);
    for (int i = 0; i < copies; i++) {
      bf16* d;
      CK(cudaMalloc(&d, bytes));
      gen_w<<<2048, 256, 0, st>>>(d, bytes / 8, 1.f / sqrtf(k), 77 + i, 0, 0);
      dense.push_back(d);
      unsigned char* p;
      CK(cudaMalloc(&p, nm::mma_sp_packed_bytes(n, k)));
      CK(nm::mma_sp_pack(d, n, k, p, nullptr, st));
      packed.push_back(p);
    }
    CK(cudaMalloc(&x, (size_t)tmax * k * 2));
    CK(cudaMalloc(&y, (size_t)tmax * n * 2));
    CK(cudaMalloc(&ref, (size_t)tmax * n * 4));
    CK(cudaMalloc(&scratch, bytes));
    gen_x<<<256, 256, 0, st>>>(x, (size_t)tmax * k, 5);
  }
  ~Problem() {
    for (auto* p : dense) cudaFree(p);
    for (auto* list : {&packed, &cslt, &values, &metadata})
      for (auto* p : *list) cudaFree(p);
    cudaFree(x);
    cudaFree(y);
    cudaFree(ref);
    cudaFree(scratch);
  }
};

// Right on poisoned output: the candidate, else nothing.
static bool right(Problem& p, int t, Contender& c) {
  CK(cudaMemsetAsync(p.y, 0xff, (size_t)p.n * t * 2, st));
  if (c.run(0) != cudaSuccess || cudaStreamSynchronize(st) != cudaSuccess) {
    cudaGetLastError();
    printf("  refused: %s\n", c.name.c_str());
    return false;
  }
  c.error = norm_error(p.y, p.ref, (size_t)p.n * t);
  if (!(c.error < kRounding)) printf("  WRONG: %s error %g\n", c.name.c_str(), c.error);
  return c.error < kRounding;
}

static void compare(const char* shapes, const vector<int>& ts, const std::string& who) {
  auto with = [&](const char* name) { return who.find(name) != std::string::npos; };
  const int tmax = *std::max_element(ts.begin(), ts.end());
  for (const char* s = shapes; *s; s++) {
    const Shape sh = kShapes[*s - '0'];
    Problem p(sh.n, sh.k, tmax);
    const int n = p.n, k = p.k;
    bool cutlass_ready = false;
    for (int t : ts) {
      CB(gemm_ex(p.dense[0], p.x, p.ref, CUDA_R_32F, n, k, t));
      const int runs = std::max(p.copies, std::min(30, (int)(4e9 / (2.0 * n * k * t / 7e5)) + 1));
      vector<Contender> all;
      auto add = [&](Contender c) {
        if (right(p, t, c)) all.push_back(std::move(c));
      };
      add({"cublas GemmEx", [&](int i) {
             return as_error(gemm_ex(p.dense[i], p.x, p.y, CUDA_R_16BF, n, k, t) ==
                             CUBLAS_STATUS_SUCCESS);
           }});
      Lt dense(n, k, t);
      {
        vector<std::pair<double, int>> quick;
        for (int a = 0; a < dense.count; a++) {
          Contender c{"cublas Lt" + std::to_string(a),
                      [&, a](int i) { return dense.run(a, p.dense[i], p.x, p.y); }};
          if (right(p, t, c)) quick.push_back({measure(c.run, p.copies, p.copies), a});
        }
        std::sort(quick.begin(), quick.end());
        for (size_t i = 0; i < quick.size() && i < 2; i++) {
          const int a = quick[i].second;
          all.push_back({"cublas Lt" + std::to_string(a),
                         [&, a](int c) { return dense.run(a, p.dense[c], p.x, p.y); }});
        }
      }
      if (with("unpack"))
        add({"unpack + GemmEx", [&](int i) {
               const cudaError_t e = nm::mma_sp_unpack(p.packed[i], n, k, p.scratch, st);
               return e != cudaSuccess ? e
                                       : as_error(gemm_ex(p.scratch, p.x, p.y, CUDA_R_16BF, n, k,
                                                          t) == CUBLAS_STATUS_SUCCESS);
             }});
      if (with("ours"))
        for (const nm::WgmmaSpPlan& plan : {nm::WgmmaSpPlan{256, 8}, nm::WgmmaSpPlan{128, 8}})
          add({"ours " + name_of(plan), [&, plan](int i) {
                 return nm::wgmma_sp_run(p.packed[i], p.x, p.y, n, k, t, plan, st);
               }});
      if (with("band"))
        for (int band : {2, 4, 8, 16}) {
          const nm::WgmmaSpPlan plan = {256, band};
          add({"ours " + name_of(plan), [&, plan](int i) {
                 return nm::wgmma_sp_run(p.packed[i], p.x, p.y, n, k, t, plan, st);
               }});
        }
      if (with("planned"))
        add({"ours planned", [&](int i) {
               nm::WgmmaSpPlan plan;
               const cudaError_t e = nm::wgmma_sp_plan(n, k, t, &plan);
               return e != cudaSuccess ? e
                                       : nm::wgmma_sp_run(p.packed[i], p.x, p.y, n, k, t, plan, st);
             }});
      nm::MmaSpPlan few[65];
      if (with("few") && t <= 256) {
        for (int i = 1; i <= 64; i++) CK(nm::mma_sp_plan(n, k, i, &few[i]));
        add({"few, 64 at a time", [&](int i) {
               cudaError_t e = cudaSuccess;
               for (int j = 0; j < t && e == cudaSuccess; j += 64) {
                 const int part = std::min(64, t - j);
                 e = nm::mma_sp_run(p.packed[i], p.x + (size_t)j * k, p.y + (size_t)j * n, n, k,
                                    part, few[part], false, st);
               }
               return e;
             }});
      }
      Cslt cslt(n, k, t);
      if (with("cusparselt")) {
        if (p.cslt.empty() && cslt.ok) {
          p.cslt.resize(p.copies);
          for (int i = 0; i < p.copies; i++) {
            CK(cudaMalloc(&p.cslt[i], cslt.bytes));
            if (!cslt.compress(p.dense[i], p.cslt[i])) printf("  cuSPARSELt can't compress\n");
          }
        }
        if (cslt.ok) {
          add({"cuSPARSELt default",
               [&](int i) { return as_error(cslt.run(p.cslt[i], p.x, p.y)); }});
          if (!all.empty() && all.back().name == "cuSPARSELt default") {
            all.back().times.push_back(measure(all.back().run, p.copies, runs));
            printf("  cuSPARSELt before the search %.1f us\n", all.back().times[0]);
            all.pop_back();
          }
          if (cslt.search(p.cslt[0], p.x, p.y))
            add({"cuSPARSELt searched",
                 [&](int i) { return as_error(cslt.run(p.cslt[i], p.x, p.y)); }});
        } else {
          printf("  cuSPARSELt refuses the problem\n");
        }
      }
      if (with("cutlass")) {
        const CutlassCuts cuts = cutlass_bf16();
        if (!cutlass_ready) {  // one layout for all tiles of 128 rows and more: checked by right()
          p.values.resize(p.copies);
          p.metadata.resize(p.copies);
          for (int i = 0; i < p.copies; i++) {
            CK(cudaMalloc(&p.values[i], cuts.first[0].values_bytes(n, k)));
            CK(cudaMalloc(&p.metadata[i], cuts.first[0].metadata_bytes(n, k)));
            if (!cuts.first[0].compress(p.dense[i], n, k, p.values[i], p.metadata[i], st))
              printf("  CUTLASS can't compress\n");
          }
          cutlass_ready = true;
        }
        for (int c = 0; c < cuts.count; c++)
          add({std::string("CUTLASS ") + cuts.first[c].name, [&, cuts, c](int i) {
                 return as_error(cuts.first[c].run(p.values[i], p.metadata[i], p.x, p.y, n, k, t,
                                                   1.f, {}, d_ws, st));
               }});
      }
      for (int q = 0; q < 6; q++)
        for (Contender& c : all) {
          const double us = measure(c.run, p.copies, runs);
          if (q > 0 && us == us) c.times.push_back(us);
        }
      double best = INFINITY;
      for (Contender& c : all)
        if (c.name.rfind("cublas", 0) == 0) best = std::min(best, c.us());
      printf("## %dx%d T=%d: dense %.1f us, %.0f TFLOP/s\n", n, k, t, best,
             2.0 * n * k * t / best / 1e6);
      for (Contender& c : all) {
        printf("  %-40s %9.1f us  %.3f\n", c.name.c_str(), c.us(), best / c.us());
        fprintf(csv, "%d,%d,%d,%s,%.2f,%.2f,%.2f,%.3f,%.5f\n", n, k, t, c.name.c_str(), c.us(),
                c.times.front(), c.times.back(), best / c.us(), c.error);
      }
      fflush(stdout);
      fflush(csv);
    }
  }
}

int main(int argc, char** argv) {
  setup_device();
  if (argc > 1 && std::string(argv[1]) == "--check")
    return check(argc > 2 && std::string(argv[2]) == "small") != 0;
  if (argc < 5) {
    printf(
        "bench --check [small] | bench CSV SHAPES TOKENS,... WHO,... (ours planned band few "
        "unpack cutlass cusparselt)\n");
    return 2;
  }
  setup_dense();
  CB(cusparseLtInit(&sp));
  csv = fopen(argv[1], "w");
  fprintf(csv, "n,k,t,contender,us,low,high,ratio,error\n");
  compare(argv[2], numbers(argv[3]), argv[4]);
  return 0;
}
