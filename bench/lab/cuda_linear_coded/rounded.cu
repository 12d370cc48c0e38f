// Study of 2:4 codes of 8 bits times x rounded to codes (linear_nm/cuda_sm90_rounded) against
// cuBLASLt's products of dense codes on one GPU.
//   rounded --check [small|all [KINDS]]     exact tests; small for sanitizers
//   rounded time OUT.csv SHAPES TS [KINDS]   planned cuts beside the rivals; KINDS: 0 fp8, 1 int8
//   rounded sweep OUT.csv SHAPES TS [KINDS]  cuts of x resident in shared memory, and of tiles
//   rounded tiles OUT.csv SHAPES TS [KINDS]  those of tiles alone
//   rounded one SHAPE T KIND            runs one a few times, for a profiler
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; nothing is timed
// before its result was compared with the product of the rounded operands. Rounding x is in our
// time, not in the rivals'. SHAPES are digits, indices into kShapes. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_coded/rounded.cu src/lacuna/kernels/linear_nm/cuda_sm90_coded.cu
//     src/lacuna/kernels/linear_nm/cuda_sm90_rounded.cu -lcublas -lcublasLt -o build/gpu/rounded
#include <memory>

#include "codes.h"
#include "lacuna/kernels/cuda/sm90_round_tokens.cuh"
#include "lacuna/kernels/linear_nm/cuda_sm90_coded.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_rounded.h"

namespace k = lacuna::kernels;
namespace nm = k::linear_nm;
static FILE* csv;

static const k::GpuLinearKernel& kernel_of(bool fp8) { return fp8 ? nm::kFp8 : nm::kInt8; }
static std::string name_of(const k::GpuPlan& held) {
  const auto call = k::held<nm::CodedCall>(&held);
  char b[96] = "x as it is";
  if (auto* p = std::get_if<nm::ResidentPlan>(&call.plan))
    snprintf(b, sizeof b, "resident N%d C%d G%d S%d A%d", p->tokens, p->cluster, p->groups,
             p->stages, p->ahead);
  if (auto* p = std::get_if<nm::WgmmaSpPlan>(&call.plan))
    snprintf(b, sizeof b, p->split ? "tiles R%d N%d pair %d parts %d" : "tiles R%d N%d", p->rows,
             p->tokens, p->pair, p->parts);
  return b;
}
struct Packed {
  const k::GpuLinearKernel& kernel;
  const int n, k;
  k::GpuLayout layout;
  vector<unsigned char*> copies;
  Packed(bool fp8, int n_, int k_) : kernel(kernel_of(fp8)), n(n_), k(k_) {
    CK((cudaError_t)kernel.measure(nullptr, n, k, nullptr, &layout, st));
  }
  Packed(const Packed&) = delete;
  ~Packed() {
    for (auto p : copies) cudaFree(p);
  }
  void add(const bf16* codes, const bf16* scales) {
    unsigned char* p;
    CK(cudaMalloc(&p, layout.packed_bytes));
    CK((cudaError_t)kernel.pack(&layout, codes, nullptr, p, nullptr, st));
    CK((cudaError_t)kernel.pack_scales(&layout, scales, p, st));
    copies.push_back(p);
  }
  bool plan(int t, k::GpuPlan* p) const {
    return kernel.plan_rounded(&layout, t, p) == cudaSuccess;
  }
  cudaError_t run(int i, const k::GpuPlan& plan, const bf16* x, bf16* y, void* ws, bool pdl) const {
    return (cudaError_t)kernel.run(&layout, &plan, copies[i % copies.size()], x, y, ws, pdl, st);
  }
};
template <class Cut>
static k::GpuPlan held_plan(int t, const Cut& cut) {
  k::GpuPlan p;
  k::hold(&p, nm::CodedCall{t, cut});
  return p;
}
// Cuts worth a try, some of which don't fit.
static vector<k::GpuPlan> cuts(int n, int k, int t, bool all) {
  vector<k::GpuPlan> v;
  const int tokens = t <= 32 ? 32 : 64;
  if (t <= 64)
    for (int c : {1, 2, 4, 8})
      for (int g : {1, 2, 3, 4})
        for (int s : {1, 2, 3, 4, 6, 8})
          for (int ahead : {1, s}) {
            if (!all && (s + g + c + ahead) % 3) continue;
            v.push_back(held_plan(t, nm::ResidentPlan{tokens, c, g, s, ahead}));
          }
  if (n % 8 == 0) {
    for (int tile : {128, 256}) v.push_back(held_plan(t, nm::WgmmaSpPlan{tile, 8}));
    for (int tile : {64, 128}) v.push_back(held_plan(t, nm::WgmmaSpPlan{tile, 8, 256}));
    for (int pair : {1, 2})
      for (int parts = 2; parts <= 4 && parts <= k / 128; parts++) {
        // More than one wave of blocks is not worth a try.
        const int tiles = (n + 128 * pair - 1) / (128 * pair) * ((t + 127) / 128);
        if (all && tiles * pair * parts > 140) continue;
        v.push_back(held_plan(t, nm::WgmmaSpPlan{128, 8, 128, true, pair, parts}));
      }
  }
  return v;
}

// x rounded on one thread a token, by the rule of kernels/quantize_token: codes as numbers.
__global__ void round_reference(const bf16* x, bf16* codes, float* scales, int k, int t, bool fp8) {
  const int token = blockIdx.x * blockDim.x + threadIdx.x;
  if (token >= t) return;
  float largest = 0;
  for (int i = 0; i < k; i++)
    largest = fmaxf(largest, fabsf(__bfloat162float(x[(size_t)token * k + i])));
  const float scale = fmaxf(largest / (fp8 ? 448.f : 127.f), 0x1p-126f), inverse = 1.f / scale;
  scales[token] = largest > 0 ? scale : 0;
  for (int i = 0; i < k; i++) {
    const float v = __bfloat162float(x[(size_t)token * k + i]) * inverse;
    codes[(size_t)token * k + i] = __float2bfloat16(fp8 ? float(__nv_fp8_e4m3(v)) : rintf(v));
  }
}
template <class T>
__global__ void scale_both(T* y, const float* scales, int n, int t) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * t;
       i += (size_t)gridDim.x * blockDim.x)
    y[i] = y[i] * (T)scale_of(i % n) * (T)scales[i / n];
}

// ---------- one shape ----------
struct Problem {
  int n, k, most;
  bool fp8;
  Packed packed;
  vector<void*> dense;  // codes for cuBLASLt
  bf16 *codes, *scales, *first, *x, *x_codes, *y;
  float *x_scales, *want, *plain;
  void *x8, *yi, *workspace;
  Problem(int n_, int k_, int most_, bool fp8_, bool rivals)
      : n(n_), k(k_), most(most_), fp8(fp8_), packed(fp8_, n_, k_) {
    const size_t count = (size_t)n * k, nx = (size_t)most * k, ny = (size_t)most * n;
    for (bf16** p : {&codes, &first}) CK(cudaMalloc(p, count * 2));
    CK(cudaMalloc(&scales, n * 2));
    CK(cudaMalloc(&x, nx * 2));
    CK(cudaMalloc(&x_codes, nx * 2));
    CK(cudaMalloc(&x8, nx));
    CK(cudaMalloc(&x_scales, most * 4));
    CK(cudaMalloc(&y, ny * 2));
    CK(cudaMalloc(&yi, ny * 4));
    CK(cudaMalloc(&want, ny * 4));
    CK(cudaMalloc(&plain, ny * 4));
    CK(cudaMalloc(&workspace, nm::rounded_workspace_bytes(k, most)));
    gen_scales<<<64, 256, 0, st>>>(scales, n);
    const int copies = std::max<int>(3, 1100000000 / packed.layout.packed_bytes + 1);
    for (int i = 0; i < copies; i++) {
      gen_codes<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i, true, fp8);
      packed.add(codes, scales);
      if (i == 0) CK(cudaMemcpyAsync(first, codes, count * 2, cudaMemcpyDeviceToDevice, st));
    }
    if (rivals)
      for (int i = 0; i < std::max<int>(3, 1100000000 / count + 1); i++) {
        void* p;
        CK(cudaMalloc(&p, count));
        gen_codes<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i, false, fp8);
        if (fp8)
          convert<<<2048, 256, 0, st>>>(codes, (__nv_fp8_e4m3*)p, count);
        else
          convert<<<2048, 256, 0, st>>>(codes, (signed char*)p, count);
        dense.push_back(p);
      }
    gen_x<<<2048, 256, 0, st>>>(x, nx, 5);
    round_reference<<<(most + 31) / 32, 32, 0, st>>>(x, x_codes, x_scales, k, most, fp8);
    if (fp8)
      convert<<<2048, 256, 0, st>>>(x_codes, (__nv_fp8_e4m3*)x8, nx);
    else
      convert<<<2048, 256, 0, st>>>(x_codes, (signed char*)x8, nx);
    CK(cudaStreamSynchronize(st));
  }
  ~Problem() {
    for (auto p : dense) cudaFree(p);
    for (void* p : {(void*)codes, (void*)first, (void*)scales, (void*)x, (void*)x_codes, (void*)y,
                    (void*)x_scales, (void*)want, (void*)plain, x8, yi, workspace})
      cudaFree(p);
  }
  void reference(int t, bool rivals) {
    CB(gemm_ex(first, x_codes, want, CUDA_R_32F, n, k, t));
    scale_both<<<2048, 256, 0, st>>>(want, x_scales, n, t);
    if (!rivals) return;
    gen_codes<<<2048, 256, 0, st>>>(codes, (size_t)n * k / 4, 77, false, fp8);
    CB(gemm_ex(codes, x_codes, plain, CUDA_R_32F, n, k, t));
  }
  // Relative error on poisoned output, or a negative number if the launch was refused.
  double check(int t, const k::GpuPlan& plan, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    const size_t ws = packed.kernel.workspace_bytes(&packed.layout, &plan);
    if (ws) CK(cudaMemsetAsync(workspace, 0xff, ws, st));
    if (packed.run(0, plan, x, y, workspace, pdl) != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, want, (size_t)n * t);
  }
  double bytes() const { return (double)packed.layout.packed_bytes; }
  double guess(int t) const { return bytes() / 3.5e6 + 2.0 * n * k * t / 1.5e9 + 4; }
};
// What the sums of e4m3 lose, on top of the rounding of y: 4e-3 says that nothing is wrong.
static bool right(bool fp8, double e) { return e >= 0 && e < (fp8 ? 4e-3 : 2.5e-3); }

static void time_run(const char* shapes, const vector<int>& ts, const vector<int>& kinds) {
  fprintf(csv, "kind,n,k,t,what,us,low,high,error,plan\n");
  for (const char* s = shapes; *s; s++)
    for (int kind : kinds) {
      const Shape sh = kShapes[*s - '0'];
      const bool fp8 = kind == 0;
      Problem p(sh.n, sh.k, (*std::max_element(ts.begin(), ts.end()) + 15) / 16 * 16, fp8, true);
      for (int t : ts) {
        p.reference(t, true);
        vector<Rival> all =
            lt_rivals(fp8, p.dense, p.x8, fp8 ? (void*)p.y : p.yi, p.plain, sh.n, sh.k, t);
        const size_t rivals = all.size();
        const double target = t > 512 ? 6000 : 3000;
        k::GpuPlan plan;
        if (!p.packed.plan(t, &plan)) {
          printf("no plan for %dx%d T=%d\n", sh.n, sh.k, t);
          continue;
        }
        const double e = p.check(t, plan, false), e2 = p.check(t, plan, true);
        if (!right(fp8, e) || fabs(e - e2) > 1e-9) {
          printf("WRONG %s %dx%d T=%d %s error %g %g\n", fp8 ? "fp8" : "int8", sh.n, sh.k, t,
                 name_of(plan).c_str(), e, e2);
          continue;
        }
        for (bool pdl : {false, true})
          all.push_back(
              {pdl ? "ours overlap" : "ours",
               capture(
                   [&, pdl](int i) { return p.packed.run(i, plan, p.x, p.y, p.workspace, pdl); },
                   (int)p.packed.copies.size(), p.guess(t), target)});
        all.push_back(
            {"rounding alone",
             capture(
                 [&](int) {
                   auto* c = (unsigned char*)p.workspace;
                   return fp8 ? k::cuda::round_tokens<k::cuda::Fp8, k::cuda::ColumnOrder::kWgmmaSp>(
                                    p.x, t, sh.k, c, (float*)(c + (size_t)t * sh.k), false, st)
                              : k::cuda::round_tokens<k::cuda::Int8,
                                                      k::cuda::ColumnOrder::kWgmmaSp>(
                                    p.x, t, sh.k, c, (float*)(c + (size_t)t * sh.k), false, st);
                 },
                 1, 3, target)});
        k::GpuPlan few;
        if (t <= 64 && p.packed.kernel.plan(&p.packed.layout, t, &few) == cudaSuccess)
          for (bool pdl : {false, true})
            all.push_back(
                {pdl ? "x as it is overlap" : "x as it is",
                 capture([&, pdl,
                          few](int i) { return p.packed.run(i, few, p.x, p.y, p.workspace, pdl); },
                         (int)p.packed.copies.size(), p.guess(t), target)});
        vector<Graph*> graphs;
        for (Rival& r : all) graphs.push_back(&r.graph);
        interleave(graphs, 7);
        double best = 1e30;
        vector<double> us;
        for (size_t i = 0; i < all.size(); i++) {
          const Time q = median(all[i].graph);
          us.push_back(q.us);
          if (i < rivals) best = std::min(best, q.us);
          fprintf(csv, "%s,%d,%d,%d,%s,%.3f,%.3f,%.3f,%.3g,%s\n", fp8 ? "fp8" : "int8", sh.n, sh.k,
                  t, all[i].name.c_str(), q.us, q.low, q.high, i == rivals ? e : 0.0,
                  i >= rivals && i < rivals + 2 ? name_of(plan).c_str() : "");
        }
        const double* o = us.data() + rivals;
        printf("%s %dx%d T=%d dense %.2f | ours %.2f (%.2fx) overlap %.2f (%.2fx) rounding %.2f",
               fp8 ? "fp8" : "int8", sh.n, sh.k, t, best, o[0], best / o[0], o[1], best / o[1],
               o[2]);
        if (us.size() > rivals + 3) printf(" x as it is %.2f %.2f", o[3], o[4]);
        printf(" | error %.2e %s\n", e, name_of(plan).c_str());
        fflush(stdout);
        fflush(csv);
      }
    }
}

static void sweep(const char* shapes, const vector<int>& ts, const vector<int>& kinds,
                  bool tiles_alone) {
  fprintf(csv, "kind,n,k,t,plan,us,overlap_us\n");
  for (const char* s = shapes; *s; s++)
    for (int kind : kinds) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, *std::max_element(ts.begin(), ts.end()), kind == 0, false);
      for (int t : ts) {
        p.reference(t, false);
        const auto time = [&](const k::GpuPlan& plan, bool pdl) {
          return time_graph(
                     [&](int i) { return p.packed.run(i, plan, p.x, p.y, p.workspace, pdl); },
                     (int)p.packed.copies.size(), p.guess(t), 2, 700)
              .low;
        };
        struct Row {
          double plain, overlap;
          k::GpuPlan plan;
        };
        vector<Row> rows;
        int wrong = 0, refused = 0;
        for (const auto& c : cuts(sh.n, sh.k, t, true)) {
          if (tiles_alone && name_of(c)[0] != 't') continue;
          const double e = p.check(t, c, false);
          if (e < 0) {
            refused++;
            continue;
          }
          if (!right(kind == 0, e)) {
            if (wrong++ < 3) printf("WRONG %s %g\n", name_of(c).c_str(), e);
            continue;
          }
          rows.push_back({time(c, false), time(c, true), c});
        }
        k::GpuPlan planned;
        if (!p.packed.plan(t, &planned)) continue;
        printf("## %s %dx%d T=%d: %zu cuts, %d wrong, %d refused; planned %s %.2f overlap %.2f\n",
               kind ? "int8" : "fp8", sh.n, sh.k, t, rows.size(), wrong, refused,
               name_of(planned).c_str(), time(planned, false), time(planned, true));
        std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
          return a.plain + a.overlap < b.plain + b.overlap;
        });
        for (size_t i = 0; i < rows.size() && i < 5; i++)
          printf("  %-34s %7.2f  overlap %7.2f\n", name_of(rows[i].plan).c_str(), rows[i].plain,
                 rows[i].overlap);
        for (const Row& r : rows)
          fprintf(csv, "%s,%d,%d,%d,%s,%.3f,%.3f\n", kind ? "int8" : "fp8", sh.n, sh.k, t,
                  name_of(r.plan).c_str(), r.plain, r.overlap);
        fflush(stdout);
        fflush(csv);
      }
    }
}

// ---------- correctness ----------
// Whole numbers, and x such that its codes are exact: y must be exact to the bit. `identity`: token
// i is the largest code at column i, so that y shows W, of every code.
static int exact(bool fp8, int n, int k, int t, bool identity, const vector<k::GpuPlan>& plans,
                 bool pdl) {
  const float largest = fp8 ? 448 : 127;
  vector<unsigned short> w((size_t)n * k, 0), s(n), x((size_t)t * k, 0);
  vector<float> wf(w.size(), 0), xf(x.size(), 0);
  for (int r = 0; r < n; r++)
    for (int g = 0; g < k / 4; g++) {
      const int a = rnd() % 4, b = (a + 1 + rnd() % 3) % 4, count = rnd() % 8 ? 2 : rnd() % 2;
      for (int j = 0; j < 4; j++) {
        const bool kept = (j == a && count > 0) || (j == b && count > 1);
        float v = !kept ? 0 : identity ? code_number(rnd() % 256, fp8) : int(rnd() % 7) - 3;
        if (!std::isfinite(v)) v = 1;
        wf[(size_t)r * k + 4 * g + j] = v;
        w[(size_t)r * k + 4 * g + j] = v == 0 && rnd() % 2 ? 0x8000 : bits(v);
      }
    }
  for (int r = 0; r < n; r++) s[r] = bits(ldexpf(1, r % 5 - 2));
  for (int q = 0; q < t; q++) {
    const float unit = ldexpf(1, q % 7 - 3);
    const int special = identity ? q % k : rnd() % k;
    for (int c = 0; c < k; c++) {
      float v = identity ? 0 : fp8 ? 64.f * (int(rnd() % 15) - 7) : int(rnd() % 255) - 127;
      if (c == special) v = q % 2 && !identity ? -largest : largest;
      x[(size_t)q * k + c] = bits(v * unit);
      xf[(size_t)q * k + c] = v * unit;
    }
  }
  Buffer<unsigned short> dw(w), ds(s), dx(x);
  Packed packed(fp8, n, k);
  packed.add((const bf16*)dw.p, (const bf16*)ds.p);
  vector<float> want((size_t)t * n);
  for (int q = 0; q < t; q++)
    for (int r = 0; r < n; r++) {
      double sum = 0;
      if (identity) {
        sum = (double)wf[(size_t)r * k + q % k] * xf[(size_t)q * k + q % k];
      } else {
        float all = 0;  // exact: whole numbers of one unit below 2^24
        const float *a = &wf[(size_t)r * k], *b = &xf[(size_t)q * k];
        for (int c = 0; c < k; c++) all += a[c] * b[c];
        sum = all;
      }
      want[(size_t)q * n + r] = value(bits((float)(sum * ldexp(1, r % 5 - 2))));
    }
  int bad = 0;
  const size_t count = (size_t)t * n;
  for (const auto& plan : plans) {
    Buffer<unsigned short> y(count + 64);
    Buffer<unsigned char> ws(nm::rounded_workspace_bytes(k, t));
    CK(cudaMemsetAsync(y.p, 0xff, (count + 64) * 2, st));
    CK(cudaMemsetAsync(ws.p, 0xff, ws.n, st));
    const cudaError_t e = packed.run(0, plan, (const bf16*)dx.p, (bf16*)y.p, ws.p, pdl);
    if (e != cudaSuccess) {
      cudaGetLastError();
      if (name_of(plan)[0] == 't') printf("refused %s\n", name_of(plan).c_str()), bad++;
      continue;  // cuts() gives some that don't fit
    }
    CK(cudaStreamSynchronize(st));
    const auto got = y.read();
    int wrong = 0;
    for (size_t i = 0; i < count; i++)
      if (value(got[i]) != want[i] && wrong++ < 2)
        printf("  row %zu token %zu got %g want %g\n", i % n, i / n, value(got[i]), want[i]);
    for (size_t i = count; i < count + 64; i++) wrong += got[i] != 0xffff;
    if (wrong)
      printf("BAD %d of %zu: %s %dx%d T=%d identity %d %s\n", wrong, count, fp8 ? "fp8" : "int8", n,
             k, t, identity, name_of(plan).c_str());
    bad += wrong != 0;
  }
  return bad;
}
// NaN, Inf and zeros stay with their token, and change no bit of the others.
static int check_nonfinite(bool fp8, int n, int k, int t) {
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)t * k), y((size_t)t * n), y2((size_t)t * n);
  Buffer<unsigned char> ws(nm::rounded_workspace_bytes(k, t));
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, n + k, true, fp8);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, t * 7 + n);
  Packed packed(fp8, n, k);
  packed.add(w.p, s.p);
  k::GpuPlan plan;
  if (!packed.plan(t, &plan)) return 1;
  CK(packed.run(0, plan, x.p, y.p, ws.p, false));
  CK(cudaStreamSynchronize(st));
  auto hx = x.read();
  const auto before = y.read();
  const auto put = [&](int token, int column, unsigned short v) {
    memcpy(&hx[(size_t)token * k + column], &v, 2);
  };
  put(1, 5, 0x7f80);
  put(3, k - 1, 0xff80);
  put(t - 1, 17, 0x7fc0);
  for (int c = 0; c < k; c++) put(2, c, c % 2 ? 0x8000 : 0);
  CK(cudaMemcpy(x.p, hx.data(), hx.size() * 2, cudaMemcpyHostToDevice));
  CK(packed.run(0, plan, x.p, y2.p, ws.p, true));
  CK(cudaStreamSynchronize(st));
  const auto after = y2.read();
  int bad = 0;
  for (size_t i = 0; i < after.size(); i++) {
    const int token = i / n;
    const float v = __bfloat162float(after[i]);
    if (token == 1 || token == 3 || token == t - 1)
      bad += v == v;
    else if (token == 2)
      bad += v != 0;
    else
      bad += memcmp(&after[i], &before[i], 2) != 0;
  }
  if (bad) printf("BAD nonfinite %s %dx%d T=%d: %d\n", fp8 ? "fp8" : "int8", n, k, t, bad);
  return bad != 0;
}
// Against float64 of the rounded operands: says the error.
static int check_random(bool fp8, int n, int k, int t, float x_scale) {
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)t * k), xc((size_t)t * k), y((size_t)t * n);
  Buffer<float> xs(t);
  Buffer<double> want((size_t)t * n), mag((size_t)t * n);
  Buffer<unsigned char> ws(nm::rounded_workspace_bytes(k, t));
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, n + k, true, fp8);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, t * 7 + n);
  CK(cudaStreamSynchronize(st));
  auto hx = x.read();
  for (bf16& v : hx) v = __float2bfloat16(__bfloat162float(v) * x_scale);
  CK(cudaMemcpy(x.p, hx.data(), hx.size() * 2, cudaMemcpyHostToDevice));
  round_reference<<<(t + 31) / 32, 32, 0, st>>>(x.p, xc.p, xs.p, k, t, fp8);
  Packed packed(fp8, n, k);
  packed.add(w.p, s.p);
  reference64<<<dim3(n, t), 128, 0, st>>>(w.p, xc.p, want.p, mag.p, n, k, t);
  scale_both<<<256, 256, 0, st>>>(want.p, xs.p, n, t);
  scale_both<<<256, 256, 0, st>>>(mag.p, xs.p, n, t);
  k::GpuPlan plan;
  if (!packed.plan(t, &plan)) return 1;
  CK(packed.run(0, plan, x.p, y.p, ws.p, false));
  CK(cudaStreamSynchronize(st));
  const auto hw = want.read(), hm = mag.read();
  const auto hy = y.read();
  double dd = 0, rr = 0, over = 0, worst = 0;
  for (size_t i = 0; i < hw.size(); i++) {
    const double d = fabs((double)__bfloat162float(hy[i]) - hw[i]);
    dd += d * d, rr += hw[i] * hw[i];
    worst = std::max(worst, std::max(0., d - fabs(hw[i]) * 0x1p-8) / hm[i]);
    over = std::max(over, d / sqrt(hw[i] * hw[i] + 1e-300));
  }
  const double e = sqrt(dd / rr);
  const bool bad = !right(fp8, e);
  printf(
      "%s %s %dx%d T=%d x 2^%d: error %.3e of the norm, beyond y's rounding at most %.2e of "
      "|W||x|; %s\n",
      bad ? "BAD" : "ok", fp8 ? "fp8" : "int8", n, k, t, (int)log2f(x_scale), e, worst,
      name_of(plan).c_str());
  return bad;
}
// The same bits while another stream keeps the memory busy.
static int check_repeats(bool fp8) {
  const int n = 4096, k = 4096, most = 512;
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)most * k), y((size_t)most * n),
      first((size_t)most * n), load((size_t)16 << 20);
  Buffer<unsigned char> ws(nm::rounded_workspace_bytes(k, most));
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, 3, true, fp8);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, 4);
  Packed packed(fp8, n, k);
  packed.add(w.p, s.p);
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  int moved = 0;
  for (int t : {17, 32, 64, 100, 512}) {
    k::GpuPlan plan;
    if (!packed.plan(t, &plan)) return 1;
    CK(packed.run(0, plan, x.p, first.p, ws.p, false));
    for (int i = 0; i < 100; i++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 4, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(packed.run(0, plan, x.p, y.p, ws.p, i % 2));
      moved += differing(y.p, first.p, (size_t)n * t) != 0;
    }
  }
  CK(cudaStreamSynchronize(other));
  cudaStreamDestroy(other);
  if (moved) printf("BAD %s: %d of 500 repeats differ\n", fp8 ? "fp8" : "int8", moved);
  return moved != 0;
}
static int check(bool small, const vector<int>& kinds) {
  int bad = 0, total = 0;
  for (int kind : kinds) {
    const bool fp8 = kind == 0;
    const auto test = [&](int n, int k, int t, bool identity, bool all = false) {
      vector<k::GpuPlan> plans = cuts(n, k, t, all);
      Packed packed(fp8, n, k);
      k::GpuPlan planned;
      if (packed.plan(t, &planned)) plans.push_back(planned);
      bad += exact(fp8, n, k, t, identity, plans, total % 2);
      total += (int)plans.size();
    };
    test(72, 128, 128, true);
    test(264, 256, 64, true, !small);
    test(264, 256, 256, true);
    for (int n : small ? vector<int>{17, 72} : vector<int>{1, 3, 16, 17, 100, 333, 520})
      for (int k : small ? vector<int>{384} : vector<int>{128, 384, 1152})
        for (int t : small ? vector<int>{17, 64, 100}
                           : vector<int>{1, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128})
          test(n, k, t, false);
    for (int n : small ? vector<int>{8, 200} : vector<int>{8, 128, 200, 1032})
      for (int k : small ? vector<int>{128, 256} : vector<int>{128, 256, 1152})
        for (int t : small ? vector<int>{130, 257} : vector<int>{129, 130, 255, 256, 257, 600})
          test(n, k, t, false);
    for (int t : small ? vector<int>{20} : vector<int>{17, 64, 100, 300})
      bad += check_nonfinite(fp8, 520, 384, t), total++;
    if (small) continue;
    test(4104, 512, 2048, false);
    for (int t : {17, 64, 128, 300})
      for (float scale : {1.f, 0x1p-20f}) bad += check_random(fp8, 1000, 4096, t, scale), total++;
    for (int t : {64, 256}) bad += check_random(fp8, 1024, 14336, t, 1.f), total++;
    bad += check_repeats(fp8), total++;
  }
  printf("check%s: %d of %d bad\n", small ? " small" : "", bad, total);
  return bad;
}

int main(int argc, char** argv) {
  setup_device();
  const std::string mode = argc > 1 ? argv[1] : "--check";
  if (mode == "--check")
    return check(argc > 2 && std::string(argv[2]) == "small",
                 argc > 3 ? numbers(argv[3]) : vector<int>{0, 1}) != 0;
  setup_dense();
  if (mode == "one") {
    const Shape sh = kShapes[atoi(argv[2])];
    const int t = atoi(argv[3]);
    Problem p(sh.n, sh.k, t, atoi(argv[4]) == 0, false);
    k::GpuPlan plan;
    if (!p.packed.plan(t, &plan)) return 2;
    for (int i = 0; i < 6; i++) CK(p.packed.run(i, plan, p.x, p.y, p.workspace, false));
    CK(cudaStreamSynchronize(st));
    return 0;
  }
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  const vector<int> kinds = argc > 5 ? numbers(argv[5]) : vector<int>{0};
  if (mode == "sweep" || mode == "tiles") sweep(argv[3], numbers(argv[4]), kinds, mode == "tiles");
  if (mode == "time") time_run(argv[3], numbers(argv[4]), kinds);
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
