// Study of the kernels of 8-bit codes (cuda_sm90_fp8, cuda_sm90_int8; 2:4 and dense) against each
// other and cuBLASLt's fp8 and int8 products on one GPU.
//   bench --check [small]                 exact tests against the host; small for sanitizers
//   bench final OUT.csv SHAPES TS         times all kernels and both rivals
//   bench one SHAPE T KERNEL               runs one kernel a few times, for a profiler
//   bench sweep OUT.csv SHAPES TS KERNELS times cuts, e.g. sweep s.csv 03 1,16 0,1
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; nothing is timed
// before its result was compared. SHAPES are digits, indices into kShapes; KERNELS indices into
// kKernels. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_coded/bench.cu src/lacuna/kernels/linear_nm/cuda_sm90_coded.cu
//     src/lacuna/kernels/linear_dense/cuda_sm90_coded.cu -lcublas -lcublasLt -o build/gpu/bench
#include <memory>

#include "codes.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_coded.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_coded.h"
#include "plans.h"

static FILE* csv;

struct Kernel {
  const char* name;
  const k::GpuLinearKernel* kernel;
  bool sparse, fp8;
};
static const Kernel kKernels[] = {{"2:4 fp8", &k::linear_nm::kFp8, true, true},
                                  {"dense fp8", &k::linear_dense::kFp8, false, true},
                                  {"2:4 int8", &k::linear_nm::kInt8, true, false},
                                  {"dense int8", &k::linear_dense::kInt8, false, false}};
constexpr int kCount = 4;

// ---------- one shape ----------
struct Problem {
  int n, k;
  vector<std::unique_ptr<Packed>> packed;  // of kKernels, null: not asked for
  vector<void*> fp8, int8;                 // dense codes for cuBLASLt
  bf16 *codes, *scales, *x, *y, *y2;
  vector<bf16*> first;  // codes of each kernel's first copy
  void *x8, *xi, *yi;
  double *want, *mag;
  float* plain;  // products of codes, unscaled
  Problem(int n_, int k_, const vector<int>& kernels, bool rivals) : n(n_), k(k_) {
    const size_t count = (size_t)n * k;
    CK(cudaMalloc(&codes, count * 2));
    CK(cudaMalloc(&scales, n * 2));
    gen_scales<<<64, 256, 0, st>>>(scales, n);
    first.resize(kCount);
    packed.resize(kCount);
    for (int q : kernels) {
      packed[q] = std::make_unique<Packed>(*kKernels[q].kernel, n, k);
      const int copies = std::max<int>(3, 1100000000 / packed[q]->layout.packed_bytes + 1);
      for (int i = 0; i < copies; i++) {
        gen_codes<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i, kKernels[q].sparse,
                                        kKernels[q].fp8);
        packed[q]->add(codes, scales, nullptr);
        if (i == 0) {
          CK(cudaMalloc(&first[q], count * 2));
          CK(cudaMemcpyAsync(first[q], codes, count * 2, cudaMemcpyDeviceToDevice, st));
        }
      }
    }
    if (rivals) {
      const int copies = std::max<int>(3, 1100000000 / count + 1);
      for (int i = 0; i < copies; i++)
        for (int f : {0, 1}) {
          void* p;
          CK(cudaMalloc(&p, count));
          gen_codes<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i, false, f);
          if (f)
            convert<<<2048, 256, 0, st>>>(codes, (__nv_fp8_e4m3*)p, count);
          else
            convert<<<2048, 256, 0, st>>>(codes, (signed char*)p, count);
          (f ? fp8 : int8).push_back(p);
        }
    }
    CK(cudaMalloc(&x, (size_t)64 * k * 2));
    CK(cudaMalloc(&x8, (size_t)64 * k));
    CK(cudaMalloc(&xi, (size_t)64 * k));
    CK(cudaMalloc(&y, (size_t)64 * n * 2));
    CK(cudaMalloc(&y2, (size_t)64 * n * 2));
    CK(cudaMalloc(&yi, (size_t)64 * n * 4));
    CK(cudaMalloc(&want, (size_t)64 * n * 8));
    CK(cudaMalloc(&mag, (size_t)64 * n * 8));
    CK(cudaMalloc(&plain, (size_t)64 * n * 4));
    // x of small whole numbers: the same for all, whatever their type.
    gen_codes<<<256, 256, 0, st>>>(x, (size_t)64 * k / 4, 5, false, false);
    convert<<<256, 256, 0, st>>>(x, (signed char*)xi, (size_t)64 * k);
    CK(cudaStreamSynchronize(st));
    vector<bf16> host((size_t)64 * k);
    CK(cudaMemcpy(host.data(), x, host.size() * 2, cudaMemcpyDeviceToHost));
    for (bf16& v : host) v = __float2bfloat16(rintf(__bfloat162float(v) / 10.f));
    CK(cudaMemcpy(x, host.data(), host.size() * 2, cudaMemcpyHostToDevice));
    convert<<<256, 256, 0, st>>>(x, (signed char*)xi, (size_t)64 * k);
    convert<<<256, 256, 0, st>>>(x, (__nv_fp8_e4m3*)x8, (size_t)64 * k);
    CK(cudaStreamSynchronize(st));
  }
  ~Problem() {
    for (auto& v : {fp8, int8})
      for (auto p : v) cudaFree(p);
    for (auto p : first) cudaFree(p);
    for (void* p : {(void*)codes, (void*)scales, (void*)x, (void*)y, (void*)y2, x8, xi, yi,
                    (void*)want, (void*)mag, (void*)plain})
      cudaFree(p);
  }
  void reference(int q, int t) {
    reference64<<<dim3(n, t), 128, 0, st>>>(first[q], x, want, mag, n, k, t);
    scale_rows<<<256, 256, 0, st>>>(want, n, t);
  }
  void lt_reference(bool f, int t) {
    gen_codes<<<2048, 256, 0, st>>>(codes, (size_t)n * k / 4, 77, false, f);
    CB(gemm_ex(codes, x, plain, CUDA_R_32F, n, k, t));
  }
  // Relative error on poisoned output, or a negative number if the launch was refused.
  double check(int q, int t, const k::GpuPlan& plan, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    if (packed[q]->run(0, plan, x, y, pdl) != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, want, (size_t)n * t);
  }
};

static void final_run(const char* shapes, const vector<int>& ts) {
  fprintf(csv, "n,k,t,what,us,low,high,bytes,plan\n");
  for (const char* s = shapes; *s; s++) {
    const Shape sh = kShapes[*s - '0'];
    Problem p(sh.n, sh.k, {0, 1, 2, 3}, true);
    for (int t : ts) {
      vector<Rival> all;
      for (int f : {1, 0}) {
        p.lt_reference(f, t);
        for (Rival& r : lt_rivals(f, f ? p.fp8 : p.int8, f ? p.x8 : p.xi, f ? (void*)p.y : p.yi,
                                  p.plain, sh.n, sh.k, t))
          all.push_back(std::move(r));
      }
      const size_t rivals = all.size();
      vector<k::GpuPlan> plans(kCount), others(kCount);
      bool wrong = false;
      for (int q = 0; q < kCount; q++) {
        plans[q] = p.packed[q]->plan(t);
        p.reference(q, t);
        const double e = p.check(q, t, plans[q], false), e2 = p.check(q, t, plans[q], true);
        if (!(e >= 0 && e < 2.5e-3) || fabs(e - e2) > 1e-9) {
          printf("WRONG %s %dx%d T=%d %s error %g %g\n", kKernels[q].name, sh.n, sh.k, t,
                 name_of(plans[q]).c_str(), e, e2);
          wrong = true;
        }
        const double bytes = p.packed[q]->layout.packed_bytes;
        Call alone = k::held<Call>(&plans[q]);
        alone.plan.least_shared = alone.plan.least_shared ? 0 : 116 * 1024;
        k::hold(&others[q], alone);
        for (int way = 0; way < 3; way++)  // plain, overlap, overlap with the other residency
          all.push_back({std::string(kKernels[q].name) + (way == 2 ? " other"
                                                          : way    ? " overlap"
                                                                   : ""),
                         capture(
                             [&, q, way](int i) {
                               return p.packed[q]->run(i, way == 2 ? others[q] : plans[q], p.x, p.y,
                                                       way > 0);
                             },
                             (int)p.packed[q]->copies.size(), bytes / 3.5e6 + 3, 3000)});
      }
      if (wrong) continue;
      vector<Graph*> graphs;
      for (Rival& r : all) graphs.push_back(&r.graph);
      interleave(graphs, 7);
      double best[2] = {1e30, 1e30};
      vector<double> us;
      for (size_t i = 0; i < all.size(); i++) {
        const Time q = median(all[i].graph);
        us.push_back(q.us);
        if (i < rivals) {
          double& b = best[all[i].name[2] == 'F' ? 0 : 1];
          b = std::min(b, q.us);
        }
        fprintf(csv, "%d,%d,%d,%s,%.3f,%.3f,%.3f,%.0f,%s\n", sh.n, sh.k, t, all[i].name.c_str(),
                q.us, q.low, q.high,
                i < rivals ? (double)sh.n * sh.k
                           : (double)p.packed[(i - rivals) / 3]->layout.packed_bytes,
                i < rivals ? "" : name_of(plans[(i - rivals) / 3]).c_str());
      }
      printf("%dx%d T=%d lt fp8 %.2f int8 %.2f", sh.n, sh.k, t, best[0], best[1]);
      for (int f = 0; f < 2; f++) {
        const double *of = us.data() + rivals + 6 * f, dense = std::min(best[f], of[3]);
        printf(" | %s 2:4 %.2f dense %.2f (%.2fx) overlap %.2f %.2f (%.2fx) other %.2f %.2f",
               f ? "int8" : "fp8", of[0], of[3], dense / of[0], of[1], of[4],
               std::min(best[f], of[4]) / of[1], of[2], of[5]);
      }
      printf("\n");
      fflush(stdout);
      fflush(csv);
    }
  }
}

static void sweep(const char* shapes, const vector<int>& ts, const vector<int>& kernels) {
  fprintf(csv, "kernel,n,k,t,plan,us,overlap_us\n");
  for (const char* s = shapes; *s; s++) {
    const Shape sh = kShapes[*s - '0'];
    Problem p(sh.n, sh.k, kernels, false);
    for (int q : kernels)
      for (int t : ts) {
        p.reference(q, t);
        const Packed& w = *p.packed[q];
        const double guess = w.layout.packed_bytes / 3.5e6 + 3;
        const auto time = [&](const k::GpuPlan& plan, bool pdl) {
          return time_graph([&](int i) { return w.run(i, plan, p.x, p.y, pdl); },
                            (int)w.copies.size(), guess, 2, 1000)
              .low;
        };
        struct Row {
          double plain, overlap;
          k::GpuPlan plan;
        };
        vector<Row> rows;
        int wrong = 0, refused = 0;
        for (const auto& c : cuts(w.n, w.k, t, /*least_warps=*/7, {1, 2})) {
          const double e = p.check(q, t, c, false);
          if (e < 0) {
            refused++;
            continue;
          }
          if (!(e < 2.5e-3)) {
            if (wrong++ < 3) printf("WRONG %s %g\n", name_of(c).c_str(), e);
            continue;
          }
          rows.push_back({time(c, false), time(c, true), c});
        }
        const k::GpuPlan planned = w.plan(t);
        printf("## %s %dx%d T=%d: %zu cuts, %d wrong, %d refused; planned %s %.2f overlap %.2f\n",
               kKernels[q].name, sh.n, sh.k, t, rows.size(), wrong, refused,
               name_of(planned).c_str(), time(planned, false), time(planned, true));
        std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
          return a.plain + a.overlap < b.plain + b.overlap;
        });
        for (size_t i = 0; i < rows.size() && i < 6; i++)
          printf("  %-34s %7.2f  overlap %7.2f\n", name_of(rows[i].plan).c_str(), rows[i].plain,
                 rows[i].overlap);
        for (const Row& r : rows)
          fprintf(csv, "%s,%d,%d,%d,%s,%.3f,%.3f\n", kKernels[q].name, sh.n, sh.k, t,
                  name_of(r.plan).c_str(), r.plain, r.overlap);
        fflush(stdout);
        fflush(csv);
      }
  }
}

static void one(int shape, int t, int q) {
  const Shape sh = kShapes[shape];
  Problem p(sh.n, sh.k, {q}, false);
  const k::GpuPlan plan = p.packed[q]->plan(t);
  for (int i = 0; i < 6; i++) CK(p.packed[q]->run(i, plan, p.x, p.y, false));
  CK(cudaStreamSynchronize(st));
}

// ---------- correctness ----------
// Small whole numbers, so that y must be the exact sum, scaled by a power of two and rounded once.
static int exact(const Kernel& kernel, int n, int k, const vector<int>& ts, bool pdl,
                 const Plan* given) {
  vector<unsigned short> w((size_t)n * k, 0), s(n), x((size_t)64 * k);
  vector<float> wf(w.size(), 0), xf(x.size());
  for (int r = 0; r < n; r++)
    for (int g = 0; g < k / 4; g++) {
      const int a = rnd() % 4, b = (a + 1 + rnd() % 3) % 4, count = rnd() % 8 ? 2 : rnd() % 2;
      for (int j = 0; j < 4; j++) {
        const bool kept = !kernel.sparse || (j == a && count > 0) || (j == b && count > 1);
        const int v = kept ? int(rnd() % 31) - 15 : 0;
        wf[(size_t)r * k + 4 * g + j] = v;
        w[(size_t)r * k + 4 * g + j] = v == 0 && rnd() % 2 ? 0x8000 : bits(v);
      }
    }
  for (int r = 0; r < n; r++) s[r] = bits(ldexpf(1, r % 5 - 2));
  for (size_t i = 0; i < x.size(); i++) xf[i] = int(rnd() % 17) - 8, x[i] = bits(xf[i]);
  Buffer<unsigned short> dw(w), ds(s), dx(x);
  Packed packed(*kernel.kernel, n, k);
  Buffer<k::GpuPackReport> report(1);
  packed.add((const bf16*)dw.p, (const bf16*)ds.p, report.p);
  int bad = 0;
  CK(cudaStreamSynchronize(st));
  if (kernel.sparse) bad += report.read()[0].violations != 0;
  // Unpacked: codes times scales.
  Buffer<unsigned short> back((size_t)n * k);
  CK((cudaError_t)kernel.kernel->unpack(&packed.layout, packed.copies[0], back.p, st));
  CK(cudaStreamSynchronize(st));
  const auto unpacked = back.read();
  for (size_t i = 0; i < unpacked.size(); i++)
    bad += value(unpacked[i]) != wf[i] * ldexpf(1, int(i / k) % 5 - 2);
  if (bad) printf("BAD unpack or report %s %dx%d\n", kernel.name, n, k);
  const int most = *std::max_element(ts.begin(), ts.end());
  vector<float> want((size_t)most * n);
  for (int q = 0; q < most; q++)
    for (int r = 0; r < n; r++) {
      double sum = 0;
      float all = 0;  // exact: whole numbers below 2^24
      for (int c = 0; c < k; c++) all += wf[(size_t)r * k + c] * xf[(size_t)q * k + c];
      sum = all;
      want[(size_t)q * n + r] = value(bits((float)(sum * ldexp(1, r % 5 - 2))));
    }
  for (int t : ts) {
    const size_t count = (size_t)t * n;
    Buffer<unsigned short> y(count + 64);
    CK(cudaMemsetAsync(y.p, 0xff, (count + 64) * 2, st));
    // x of exactly t tokens, so that memcheck sees what lies behind it.
    Buffer<unsigned short> xt(vector<unsigned short>(x.begin(), x.begin() + (size_t)t * k));
    k::GpuPlan plan;
    if (given)
      k::hold(&plan, Call{t, *given});
    else
      plan = packed.plan(t);
    const cudaError_t e = packed.run(0, plan, (const bf16*)xt.p, (bf16*)y.p, pdl);
    if (e != cudaSuccess) {
      printf("refused %s %dx%d T=%d %s: %s\n", kernel.name, n, k, t, name_of(plan).c_str(),
             cudaGetErrorString(e));
      cudaGetLastError();
      bad++;
      continue;
    }
    CK(cudaStreamSynchronize(st));
    const auto got = y.read();
    int wrong = 0;
    for (size_t i = 0; i < count; i++)
      if (value(got[i]) != want[i] && wrong++ < 2)
        printf("  row %zu token %zu got %g want %g\n", i % n, i / n, value(got[i]), want[i]);
    for (size_t i = count; i < count + 64; i++) wrong += got[i] != 0xffff;
    if (wrong)
      printf("BAD %d of %zu: %s %dx%d T=%d %s\n", wrong, count, kernel.name, n, k, t,
             name_of(plan).c_str());
    bad += wrong != 0;
  }
  return bad;
}
// Every code comes back as the number that it stands for; y of a unit vector is that number.
static int check_codes(const Kernel& kernel) {
  const int n = 16, k = 512;
  vector<unsigned short> w((size_t)n * k, 0), s(n, bits(1.f)), x((size_t)k, 0);
  for (int i = 0; i < n * k; i++) {
    const int byte = i / 2 * 37 % 256;
    const float v = code_number(byte, kernel.fp8);
    if (i % 4 < 2 && std::isfinite(v) && v != 0) w[i] = bits(v);
  }
  Buffer<unsigned short> dw(w), ds(s), back(w.size()), y(n);
  Packed packed(*kernel.kernel, n, k);
  packed.add((const bf16*)dw.p, (const bf16*)ds.p, nullptr);
  CK((cudaError_t)kernel.kernel->unpack(&packed.layout, packed.copies[0], back.p, st));
  CK(cudaStreamSynchronize(st));
  int bad = 0;
  const auto got = back.read();
  for (size_t i = 0; i < w.size(); i++) bad += got[i] != w[i];
  for (int c = 0; c < k; c += 97) {
    std::fill(x.begin(), x.end(), 0);
    x[c] = bits(1.f);
    Buffer<unsigned short> dx(x);
    CK(packed.run(0, packed.plan(1), (const bf16*)dx.p, (bf16*)y.p, false));
    CK(cudaStreamSynchronize(st));
    const auto column = y.read();
    for (int r = 0; r < n; r++) bad += value(column[r]) != value(w[(size_t)r * k + c]);
  }
  if (bad) printf("BAD codes %s: %d\n", kernel.name, bad);
  return bad != 0;
}
// Random codes against float64: float32 sums in any order, one factor a part, one rounding.
static int check_random(const Kernel& kernel, int n, int k, int t, float x_scale) {
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)t * k), y((size_t)t * n);
  Buffer<double> want((size_t)t * n), mag((size_t)t * n);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, n + k, kernel.sparse, kernel.fp8);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, t * 7 + n);
  CK(cudaStreamSynchronize(st));
  auto hx = x.read();
  for (bf16& v : hx) v = __float2bfloat16(__bfloat162float(v) * x_scale);
  CK(cudaMemcpy(x.p, hx.data(), hx.size() * 2, cudaMemcpyHostToDevice));
  Packed packed(*kernel.kernel, n, k);
  packed.add(w.p, s.p, nullptr);
  reference64<<<dim3(n, t), 128, 0, st>>>(w.p, x.p, want.p, mag.p, n, k, t);
  CK(packed.run(0, packed.plan(t), x.p, y.p, false));
  CK(cudaStreamSynchronize(st));
  const auto hw = want.read(), hm = mag.read();
  const auto hy = y.read();
  int bad = 0;
  for (size_t i = 0; i < hw.size(); i++) {
    const double scale = scale_of(i % n), ref = hw[i] * scale;
    const double bound = fabs(ref) * 0x1p-8 + hm[i] * scale * (k + 2) * 0x1p-24 + 0x1p-133;
    const double d = fabs((double)__bfloat162float(hy[i]) - ref);
    if (!(d <= bound) && bad++ < 2)
      printf("  %s n=%zu t=%zu got %g want %g\n", kernel.name, i % n, i / n,
             (double)__bfloat162float(hy[i]), ref);
  }
  if (bad) printf("BAD random %s %dx%d T=%d: %d\n", kernel.name, n, k, t, bad);
  return bad != 0;
}
// The same bits 100 times while another stream keeps the memory busy.
static int check_repeats(const Kernel& kernel) {
  const int n = 4096, k = 4096;
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)64 * k), y((size_t)64 * n), first((size_t)64 * n),
      load((size_t)16 << 20);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, 3, kernel.sparse, kernel.fp8);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, 4);
  Packed packed(*kernel.kernel, n, k);
  packed.add(w.p, s.p, nullptr);
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  int moved = 0;
  for (int t : {1, 8, 16, 32, 64}) {
    const k::GpuPlan plan = packed.plan(t);
    CK(packed.run(0, plan, x.p, first.p, false));
    for (int i = 0; i < 100; i++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 4, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(packed.run(0, plan, x.p, y.p, i % 2));
      moved += differing(y.p, first.p, (size_t)n * t) != 0;
    }
  }
  CK(cudaStreamSynchronize(other));
  cudaStreamDestroy(other);
  if (moved) printf("BAD %s: %d of 500 repeats differ\n", kernel.name, moved);
  return moved != 0;
}
static int check_violation() {
  const int n = 20, k = 256;
  vector<unsigned short> w((size_t)n * k, 0), s(n, bits(1.f));
  for (int c : {8, 9, 11}) w[7 * k + c] = bits(3.f);
  Buffer<unsigned short> dw(w), ds(s);
  Buffer<k::GpuPackReport> report(1);
  Packed packed(*kKernels[0].kernel, n, k);
  packed.add((const bf16*)dw.p, (const bf16*)ds.p, report.p);
  CK(cudaStreamSynchronize(st));
  const auto r = report.read()[0];
  const bool bad = r.violations != 1 || r.first_group != 7 * (k / 4) + 2;
  if (bad) printf("BAD report: %llu, %llu\n", r.violations, r.first_group);
  return bad;
}
static vector<int> range(int a, int b) {
  vector<int> v;
  for (int i = a; i <= b; i++) v.push_back(i);
  return v;
}
static int check(bool small) {
  int bad = check_violation(), total = 1;
  for (const Kernel& kernel : kKernels) {
    bad += check_codes(kernel), total++;
    bool pdl = false;
    for (int nt : {1, 2, 4, 8})
      for (int mt : {1, 2, 3})
        for (int cluster : {1, 2, 4}) {
          if (mt == 3 && nt < 4) continue;
          if (small && cluster == 4) continue;
          Plan p;
          p.token_tiles = nt;
          p.tiles_per_warp = mt;
          p.row_warps = 2;
          p.k_warps = cluster == 2 ? 1 : nt == 1 && cluster == 1 ? 7 : 2;
          p.stage_units = cluster == 1 || nt >= 4 ? 1 : 3;
          p.stages = cluster == 2 ? 3 : 2;
          p.x_stages = 2;
          p.cluster = cluster;
          p.x_warps = 1 + (nt + mt + cluster) % 4;
          bad += exact(kernel, small ? 100 : 333, 1408, {8 * nt, 8 * nt - 3}, pdl = !pdl, &p);
          total += 2;
        }
    for (int n :
         small ? vector<int>{1, 17, 100} : vector<int>{1, 2, 3, 5, 15, 16, 17, 33, 100, 1023})
      for (int k : small ? vector<int>{128, 384} : vector<int>{128, 256, 1152, 3712}) {
        bad += exact(kernel, n, k, {1, 2, 7, 8, 9, 16, 17, 33, 64}, n % 2, nullptr);
        total += 9;
      }
    if (small) continue;
    bad += exact(kernel, 528, 640, range(1, 64), false, nullptr), total += 64;
    for (int t : {1, 5, 8, 16, 31, 64})
      for (float scale : {1.f, 0x1p-20f})
        bad += check_random(kernel, 1000, 4096, t, scale), total++;
    bad += check_random(kernel, 4096, 14336, 8, 1.f), total++;
    bad += check_repeats(kernel), total++;
  }
  printf("check%s: %d of %d bad\n", small ? " small" : "", bad, total);
  return bad;
}

int main(int argc, char** argv) {
  setup_device();
  const std::string mode = argc > 1 ? argv[1] : "--check";
  if (mode == "--check") return check(argc > 2) != 0;
  setup_dense();
  if (mode == "one") return one(atoi(argv[2]), atoi(argv[3]), atoi(argv[4])), 0;
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  if (mode == "sweep") sweep(argv[3], numbers(argv[4]), numbers(argv[5]));
  if (mode == "final") final_run(argv[3], numbers(argv[4]));
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
