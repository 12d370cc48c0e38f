// Study of the unstructured bf16 decode kernel (cuda_sm90_gap) against cuBLAS and cuBLASLt on one
// GPU.
//   bench --check [small]              tests against float64 and the host; small for sanitizers
//   bench sweep OUT.csv SHAPES PS TS   times every layout and plan, e.g. sweep s.csv 05 50,80 1,4
//   bench final OUT.csv SHAPES PS TS   times the planned kernel against the best dense product;
//   [BITS
//     [WARPS]]: of these layouts, 0 is what the kernel chooses, 7 are windows: final o.csv 012345
//     70,80 4,8 3,4,7 16,24
//   bench unpack OUT.csv SHAPES PS     times packing and unpacking; [BITS]
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; no variant is timed
// before its result was compared. SHAPES are digits, indices into kShapes; PS sparsities in
// percent. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_bitmap/bench.cu src/lacuna/kernels/linear_bitmap/cuda_sm90_gap.cu
//     -lcublas -lcublasLt -o build/gpu/bench
#include <map>

#include "../cuda_harness.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"

namespace lb = lacuna::kernels::linear_bitmap;

static FILE* csv;
static const int kMost = 8;  // tokens

struct Packed {
  lb::GapLayout layout;
  unsigned char* bytes = nullptr;
  Packed() = default;
  Packed(const Packed&) = delete;
  Packed(Packed&& o) : layout(o.layout), bytes(o.bytes) { o.bytes = nullptr; }
  ~Packed() { cudaFree(bytes); }
};
static Packed pack(const bf16* w, int n, int k, const lb::GapLayout& wish, void* scratch) {
  Packed p;
  p.layout = wish;
  CK(lb::gap_measure(w, n, k, scratch, &p.layout, st));
  CK(cudaMalloc(&p.bytes, p.layout.packed_bytes));
  CK(cudaMemsetAsync(p.bytes, 0xff, p.layout.packed_bytes, st));
  CK(lb::gap_pack(w, scratch, p.layout, p.bytes, st));
  return p;
}

struct Problem {
  int n, k, percent;
  vector<bf16*> dense;
  bf16 *x, *y, *y2, *tmp;
  float* ref;
  void* scratch;
  vector<Packed> packed;
  Problem(int n_, int k_, int percent_) : n(n_), k(k_), percent(percent_) {
    const size_t db = (size_t)n * k * 2;
    const int nd = std::max<int>(3, (1100000000 + db - 1) / db);
    for (int i = 0; i < nd; i++) {
      bf16* d;
      CK(cudaMalloc(&d, db));
      dense.push_back(d);
      generate(d, i);
    }
    CK(cudaMalloc(&tmp, db));
    CK(cudaMalloc(&scratch, lb::gap_scratch_bytes(n)));
    CK(cudaMalloc(&x, (size_t)kMost * k * 2));
    CK(cudaMalloc(&y, (size_t)kMost * n * 2));
    CK(cudaMalloc(&y2, (size_t)kMost * n * 2));
    CK(cudaMalloc(&ref, (size_t)kMost * n * 4));
    gen_x<<<256, 256, 0, st>>>(x, (size_t)kMost * k, 5);
  }
  ~Problem() {
    for (auto p : dense) cudaFree(p);
    packed.clear();
    cudaFree(x);
    cudaFree(y);
    cudaFree(y2);
    cudaFree(tmp);
    cudaFree(ref);
    cudaFree(scratch);
  }
  void generate(bf16* d, int i) {
    gen_unstructured<<<2048, 256, 0, st>>>(d, n, k, 1.f / sqrtf(k), 77 + i, percent, 0);
  }
  // Packs enough copies of different random weights.
  void pack_all(const lb::GapLayout& wish) {
    packed.clear();
    size_t bytes = 0;
    for (int i = 0; bytes < 1100000000 || i < 4; i++) {
      const bf16* d = i < (int)dense.size() ? dense[i] : tmp;
      if (d == tmp) generate(tmp, i);
      packed.push_back(pack(d, n, k, wish, scratch));
      bytes += packed.back().layout.packed_bytes;
    }
    CK(cudaStreamSynchronize(st));
  }
  double mean_bytes() const {
    double b = 0;
    for (auto& p : packed) b += p.layout.packed_bytes;
    return b / packed.size();
  }
  // Bytes of the places alone: what a launch reads of W.
  double read_bytes() const {
    double b = 0;
    for (auto& p : packed)
      b += p.layout.places * (p.layout.bits == 3   ? 2
                              : p.layout.bits == 4 ? 2.125
                                                   : 2.5) +
           4. * p.layout.strays;
    return b / packed.size();
  }
  void reference(int t) { CB(gemm_ex(dense[0], x, ref, CUDA_R_32F, n, k, t)); }
  cudaError_t run(int i, int t, const lb::GapPlan& plan, bool pdl) {
    return lb::gap_run(packed[i].bytes, packed[i].layout, x, y, t, plan, pdl, st);
  }
  double check(int t, const lb::GapPlan& p, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    const cudaError_t e = run(0, t, p, pdl);
    if (e != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, ref, (size_t)n * t);
  }
  unsigned moving(int t, const lb::GapPlan& p) {
    unsigned worst = 0;
    CK(cudaMemcpyAsync(y2, y, (size_t)n * t * 2, cudaMemcpyDeviceToDevice, st));
    for (int i = 0; i < 3; i++) {
      CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
      CK(run(0, t, p, i == 1));
      worst = std::max(worst, differing(y, y2, (size_t)n * t));
    }
    return worst;
  }
};
static std::string name_of(const lb::GapLayout& l, const lb::GapPlan& p) {
  char b[96];
  snprintf(b, sizeof b, "B%d L%d W%d T%d", l.bits, l.lanes_per_row, l.warps, p.tokens);
  return b;
}

static void sweep(const char* shapes, const vector<int>& percents, const vector<int>& ts) {
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      struct Row {
        double us, pdl, read;
        std::string name;
      };
      vector<vector<Row>> rows(ts.size());
      vector<double> dense(ts.size(), NAN);
      for (size_t q = 0; q < ts.size(); q++) {
        p.reference(ts[q]);
        vector<Rival> rivals = dense_rivals(p.dense, p.x, p.y, p.ref, sh.n, sh.k, ts[q]);
        for (Rival& r : rivals) {
          interleave({&r.graph}, 3);
          dense[q] = fmin(dense[q], median(r.graph).us);
        }
      }
      const int lanes0 = sh.n == 14336 || sh.n == 6144 ? 2 : 1;
      for (int bits : {3, 4}) {
        if ((bits == 3 && percent > 70) || (bits == 4 && percent < 70)) continue;
        for (int lanes : {lanes0, lanes0 * 2})
          for (int warps : {16, 24}) {
            lb::GapLayout wish;
            wish.bits = bits;
            wish.lanes_per_row = lanes;
            wish.warps = warps;
            p.pack_all(wish);
            for (size_t q = 0; q < ts.size(); q++) {
              const int t = ts[q];
              p.reference(t);
              {
                lb::GapPlan plan;
                plan.tokens = t >= 3 ? 4 : t;
                const double e = p.check(t, plan, false);
                if (e < 0) continue;
                const std::string name = name_of(p.packed[0].layout, plan);
                if (!(e < 2.5e-3) && !getenv("LAB_ANY")) {
                  printf("WRONG %dx%d %d%% T=%d %s %g\n", sh.n, sh.k, percent, t, name.c_str(), e);
                  continue;
                }
                const double guess = p.read_bytes() / 3.5e6 + 3;
                const Time g = time_graph([&](int i) { return p.run(i, t, plan, false); },
                                          (int)p.packed.size(), guess, 3, 800);
                const Time o = time_graph([&](int i) { return p.run(i, t, plan, true); },
                                          (int)p.packed.size(), guess, 2, 500);
                rows[q].push_back({g.us, o.us, p.read_bytes(), name});
                fprintf(csv, "sweep,%d,%d,%d,%d,%s,%.3f,%.3f,%.3f,%.0f,%.0f,%.5f\n", sh.n, sh.k,
                        percent, t, name.c_str(), dense[q], g.us, o.us, p.read_bytes(),
                        p.mean_bytes(), e);
              }
            }
          }
      }
      for (size_t q = 0; q < ts.size(); q++) {
        std::sort(rows[q].begin(), rows[q].end(),
                  [](const Row& a, const Row& b) { return a.us < b.us; });
        printf("## %dx%d %d%% T=%d dense %.2f\n", sh.n, sh.k, percent, ts[q], dense[q]);
        for (size_t i = 0; i < rows[q].size(); i++)
          printf("  %-24s %7.2f (%.2f) pdl %7.2f  %.0f GB/s\n", rows[q][i].name.c_str(),
                 rows[q][i].us, dense[q] / rows[q][i].us, rows[q][i].pdl,
                 rows[q][i].read / rows[q][i].us / 1e3);
      }
      fflush(stdout);
      fflush(csv);
    }
}

static void final_run(const char* shapes, const vector<int>& percents, const vector<int>& ts,
                      const vector<int>& bits, const vector<int>& warps) {
  fprintf(csv,
          "n,k,percent,t,dense_us,dense_low,dense_high,dense_algorithm,plan,graph_us,graph_low,"
          "graph_high,pdl_us,pdl_low,pdl_high,read_bytes,packed_bytes,error,moved\n");
  printf("| n x k | %% | T | dense | ours graph (ratio) | PDL (ratio) | GB/s | bytes | plan |\n");
  std::map<std::string, vector<std::pair<double, double>>> ratios;
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      std::map<int, vector<Rival>> dense;
      for (int t : ts) {
        p.reference(t);
        dense[t] = dense_rivals(p.dense, p.x, p.y, p.ref, sh.n, sh.k, t);
      }
      for (int b : bits)
        for (int w : warps) {
          lb::GapLayout wish;
          wish.bits = b;
          wish.warps = w;
          p.pack_all(wish);
          for (int t : ts) {
            p.reference(t);
            lb::GapPlan plan;
            if (lb::gap_plan(p.packed[0].layout, t, &plan) != cudaSuccess) continue;
            const double e = p.check(t, plan, false), e2 = p.check(t, plan, true);
            const std::string name = name_of(p.packed[0].layout, plan);
            if (!(e >= 0 && e < 2.5e-3) || fabs(e - e2) > 1e-9) {
              printf("WRONG %dx%d %d%% T=%d %s error %g %g\n", sh.n, sh.k, percent, t, name.c_str(),
                     e, e2);
              continue;
            }
            const unsigned moved = p.moving(t, plan);
            const double guess = p.read_bytes() / 3.5e6 + 3;
            Graph plain = capture([&](int j) { return p.run(j, t, plan, false); },
                                  (int)p.packed.size(), guess, 3000);
            Graph overlap = capture([&](int j) { return p.run(j, t, plan, true); },
                                    (int)p.packed.size(), guess, 3000);
            vector<Graph*> all = {&plain, &overlap};
            for (Rival& r : dense[t]) {
              r.graph.times.clear();
              all.push_back(&r.graph);
            }
            interleave(all, 7);
            Time d;
            std::string best;
            for (Rival& r : dense[t]) {
              const Time q = median(r.graph);
              if (!(q.us >= d.us)) {
                d = q;
                best = r.name;
              }
            }
            const Time g = median(plain), o = median(overlap);
            fprintf(csv,
                    "%d,%d,%d,%d,%.3f,%.3f,%.3f,%s,%s,%.3f,%.3f,%.3f,%.3f,%.3f,%.3f,%.0f,%.0f,%.5f,"
                    "%u\n",
                    sh.n, sh.k, percent, t, d.us, d.low, d.high, best.c_str(), name.c_str(), g.us,
                    g.low, g.high, o.us, o.low, o.high, p.read_bytes(), p.mean_bytes(), e, moved);
            printf("| %dx%d | %d | %d | %.2f | %.2f (%.2f) | %.2f (%.2f) | %.0f | %.3f | %s |%s\n",
                   sh.n, sh.k, percent, t, d.us, g.us, d.us / g.us, o.us, d.us / o.us,
                   p.read_bytes() / g.us / 1e3, p.mean_bytes() / (2. * sh.n * sh.k), name.c_str(),
                   moved ? " MOVED" : "");
            fflush(stdout);
            fflush(csv);
            char key[64];
            snprintf(key, sizeof key, "%d%% T=%d bits %d warps %d", percent, t, b, w);
            ratios[key].push_back({d.us / g.us, d.us / o.us});
          }
        }
    }
  for (const auto& [key, r] : ratios) {
    double g = 0, o = 0, worst = 1e9;
    for (const auto& [plain, overlap] : r) {
      g += log(plain);
      o += log(overlap);
      worst = std::min(worst, plain);
    }
    printf("%s geometric mean %.3f worst %.3f pdl %.3f over %zu shapes\n", key.c_str(),
           exp(g / r.size()), worst, exp(o / r.size()), r.size());
  }
}

static void unpack_run(const char* shapes, const vector<int>& percents, int bits) {
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      lb::GapLayout wish;
      wish.bits = bits;
      p.pack_all(wish);
      const int copies = (int)p.packed.size();
      const Time u = time_graph(
          [&](int i) {
            return lb::gap_unpack(p.packed[i].bytes, p.packed[i].layout,
                                  p.dense[i % p.dense.size()], st);
          },
          copies, 100, 5, 2000);
      float measure_ms = 0, pack_ms = 0;
      lb::GapLayout layout;
      for (int i = 0; i < 2; i++) {
        p.generate(p.tmp, 0);
        CK(cudaEventRecord(e0, st));
        layout = wish;
        CK(lb::gap_measure(p.tmp, sh.n, sh.k, p.scratch, &layout, st));
        CK(cudaEventRecord(e1, st));
        CK(cudaEventSynchronize(e1));
        CK(cudaEventElapsedTime(&measure_ms, e0, e1));
        CK(cudaEventRecord(e0, st));
        CK(lb::gap_pack(p.tmp, p.scratch, layout, p.packed[0].bytes, st));
        CK(cudaEventRecord(e1, st));
        CK(cudaEventSynchronize(e1));
        CK(cudaEventElapsedTime(&pack_ms, e0, e1));
      }
      printf("%dx%d %d%%: unpack %.1f us (%.0f GB/s of dense), measure %.2f ms, pack %.2f ms\n",
             sh.n, sh.k, percent, u.us, 2. * sh.n * sh.k / u.us / 1e3, measure_ms, pack_ms);
      fprintf(csv, "unpack,%d,%d,%d,%.1f,%.3f,%.3f\n", sh.n, sh.k, percent, u.us, measure_ms,
              pack_ms);
    }
}

// ---------- correctness ----------
struct Case {
  int n, k;
  float percent;
  int uneven, bits, lanes, warps;
  int spread = 0;  // every so many values, one of any exponent
};
static std::string name_of(const Case& c) {
  char b[96];
  snprintf(b, sizeof b, "%dx%d %.0f%% uneven %d B%d L%d W%d spread %d", c.n, c.k, c.percent,
           c.uneven, c.bits, c.lanes, c.warps, c.spread);
  return b;
}
// One kept value of `every` gets an exponent between those of 2^-126 and 2^20, or becomes
// subnormal.
__global__ void spread_exponents(bf16* w, size_t n, int every) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + 12345);
    const unsigned short v = __bfloat16_as_ushort(w[i]);
    if ((v & 0x7fff) != 0 && h % every == 0)
      w[i] = __ushort_as_bfloat16((unsigned short)((v & 0x807f) | ((h >> 32) % 148) << 7 | 1));
  }
}
__global__ void reference32(const bf16* w, const bf16* x, float* y, int n, int k) {
  const int row = blockIdx.x, token = blockIdx.y;
  float sum = 0;
  for (int i = threadIdx.x; i < k; i += 32)
    sum += __bfloat162float(w[(size_t)row * k + i]) * __bfloat162float(x[(size_t)token * k + i]);
  for (int d = 16; d; d >>= 1) sum += __shfl_xor_sync(~0u, sum, d);
  if (threadIdx.x == 0) y[(size_t)token * n + row] = sum;
}
// Every T and plan on one weight, with and without overlap, against float64; x is given with an odd
// address too. The error may be half a bf16 step of the result and what float32 sums of k products
// in any order allow.
static int check_case(const Case& c, int* total) {
  const int n = c.n, k = c.k;
  const size_t size = (size_t)n * k;
  Buffer<bf16> w(size), back(size), x((size_t)kMost * k + 8);
  Buffer<unsigned char> scratch(lb::gap_scratch_bytes(n));
  Buffer<double> ref((size_t)kMost * n), mag((size_t)kMost * n);
  gen_unstructured<<<512, 256, 0, st>>>(w.p, n, k, 1.f / sqrtf(k), n * 31 + k, c.percent, c.uneven);
  if (c.spread > 0) spread_exponents<<<512, 256, 0, st>>>(w.p, size, c.spread);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, n + 3);
  lb::GapLayout wish;
  wish.bits = c.bits;
  wish.lanes_per_row = c.lanes;
  wish.warps = c.warps;
  const Packed p = pack(w.p, n, k, wish, scratch.p);
  int bad = 0;
  if (c.spread > 0 && c.percent < 90 && n > 9 && p.layout.strays == 0) {
    bad++;
    printf("BAD: no strays, %s\n", name_of(c).c_str());
  }
  CK(cudaMemsetAsync(back.p, 0xff, size * 2, st));
  CK(lb::gap_unpack(p.bytes, p.layout, back.p, st));
  CK(cudaMemsetAsync(d_count, 0, 4, st));
  count_unequal<<<256, 256, 0, st>>>((unsigned short*)back.p, (unsigned short*)w.p, size, d_count);
  unsigned unequal;
  CK(cudaMemcpyAsync(&unequal, d_count, 4, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  ++*total;
  if (unequal) {
    bad++;
    printf("BAD unpack: %u, %s\n", unequal, name_of(c).c_str());
  }
  for (int shift : {0, 1}) {
    reference64<<<dim3(n, kMost), 128, 0, st>>>(w.p, x.p + shift, ref.p, mag.p, n, k, kMost);
    CK(cudaStreamSynchronize(st));
    const vector<double> r = ref.read(), m = mag.read();
    const bool windows = p.layout.bits == lb::kWindowBits;
    for (int t = 1; t <= (windows ? kMost : 4); t++)
      for (int tokens : {1, 2, 4, 8}) {
        lb::GapPlan plan;
        plan.tokens = tokens;
        if ((tokens == 1 && t == 3) || (tokens == 4 && t < 3 && !windows)) continue;
        const size_t need = lb::gap_shared_bytes(p.layout, plan);
        if (need == 0 || need > 227 * 1024) continue;
        Buffer<unsigned short> y((size_t)n * t + 64);
        CK(cudaMemset(y.p, 0xff, y.n * 2));
        CK(cudaDeviceSynchronize());
        CK(lb::gap_run(p.bytes, p.layout, x.p + shift, y.p, t, plan, t % 2, st));
        CK(cudaStreamSynchronize(st));
        const vector<unsigned short> got = y.read();
        int wrong = 0;
        for (size_t i = 0; i < (size_t)n * t; i++) {
          const double bound = fabs(r[i]) * 0x1p-8 + m[i] * k * 0x1p-24 + 1e-30;
          if (!(fabs((double)value(got[i]) - r[i]) <= bound) && wrong++ < 2)
            printf("  row %zu token %zu got %g want %g\n", i % n, i / n, value(got[i]), r[i]);
        }
        for (size_t i = (size_t)n * t; i < got.size(); i++) wrong += got[i] != 0xffff;
        ++*total;
        if (wrong) {
          bad++;
          printf("BAD %d: T=%d shift %d %s, %s\n", wrong, t, shift, name_of(p.layout, plan).c_str(),
                 name_of(c).c_str());
        }
      }
  }
  return bad;
}
// NaN and Inf of W reach exactly the outputs of their rows; of x, every output whose row keeps
// them, and none whose row is far from them.
static int check_special(int bits_, int t) {
  const int n = 77, k = 1280;
  g_state = t;
  vector<unsigned short> w((size_t)n * k, 0), x((size_t)t * k);
  for (auto& v : x) v = bits((float)(rnd() % 5 + 1));
  for (size_t i = 0; i < w.size(); i++)
    if (rnd() % 2) w[i] = bits((float)(rnd() % 3 + 1));
  const float inf = INFINITY;
  w[3 * k + 100] = bits(inf);
  w[17 * k + 1279] = bits(-inf);
  w[33 * k] = 0x7fc1;
  w[76 * k + 640] = bits(inf);
  for (int r = 0; r < n; r++) w[(size_t)r * k + 700] = bits(r % 3 ? 1.f : 2.f);
  x[(size_t)(t - 1) * k + 700] = bits(inf);
  vector<double> want((size_t)n * t, 0);
  for (int q = 0; q < t; q++)
    for (int r = 0; r < n; r++)
      for (int c = 0; c < k; c++)
        want[(size_t)q * n + r] +=
            (double)value(w[(size_t)r * k + c]) * value(x[(size_t)q * k + c]);
  Buffer<unsigned short> dw(w), dx(x), dy((size_t)n * t), back((size_t)n * k);
  Buffer<unsigned char> scratch(lb::gap_scratch_bytes(n));
  lb::GapLayout wish;
  wish.bits = bits_;
  const Packed p = pack((bf16*)dw.p, n, k, wish, scratch.p);
  lb::GapPlan plan;
  CK(lb::gap_plan(p.layout, t, &plan));
  CK(lb::gap_run(p.bytes, p.layout, dx.p, dy.p, t, plan, false, st));
  CK(lb::gap_unpack(p.bytes, p.layout, back.p, st));
  CK(cudaStreamSynchronize(st));
  const vector<unsigned short> y = dy.read(), again = back.read();
  int wrong = again != w, special = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const float got = value(y[i]), ref = value(bits((float)want[i]));
    special += !std::isfinite(ref);
    if (!(got == ref || (std::isnan(got) && std::isnan(ref))) && wrong++ < 3)
      printf("  special: row %zu token %zu got %g want %g\n", i % n, i / n, got, ref);
  }
  if (wrong) printf("BAD special values, bits %d, T=%d: %d\n", bits_, t, wrong);
  return wrong != 0 || special == 0;
}
// The same bits 100 times while another stream keeps the memory busy; packing again, too.
static int check_repeats(int bits) {
  const int n = 6144, k = 4096;
  Buffer<bf16> w((size_t)n * k), x((size_t)kMost * k), y((size_t)kMost * n),
      first((size_t)kMost * n), load((size_t)64 << 20);
  Buffer<unsigned char> scratch(lb::gap_scratch_bytes(n));
  gen_unstructured<<<512, 256, 0, st>>>(w.p, n, k, 1.f / 64, 3, 70, 0);
  gen_x<<<64, 256, 0, st>>>(x.p, (size_t)kMost * k, 4);
  lb::GapLayout wish;
  wish.bits = bits;
  const Packed a = pack(w.p, n, k, wish, scratch.p), b = pack(w.p, n, k, wish, scratch.p);
  CK(cudaStreamSynchronize(st));
  int moved = a.layout.packed_bytes != b.layout.packed_bytes;
  if (!moved) moved += differing((bf16*)a.bytes, (bf16*)b.bytes, a.layout.packed_bytes / 2) != 0;
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  for (int t : bits == lb::kWindowBits ? vector<int>{4, 8} : vector<int>{1, 2, 3, 4}) {
    lb::GapPlan plan;
    CK(lb::gap_plan(a.layout, t, &plan));
    CK(lb::gap_run(a.bytes, a.layout, x.p, first.p, t, plan, false, st));
    for (int i = 0; i < 100; i++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 16, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(lb::gap_run(i % 3 ? a.bytes : b.bytes, a.layout, x.p, y.p, t, plan, i % 2, st));
      moved += differing(y.p, first.p, (size_t)n * t) != 0;
    }
  }
  CK(cudaStreamSynchronize(other));
  cudaStreamDestroy(other);
  printf("repeats under load, bits %d: %d differ\n", bits, moved);
  return moved != 0;
}
// The same by the entries of the library's table, for every number of tokens that they take.
static int check_entry(const lacuna::kernels::GpuLinearKernel& kernel, int n, int k, int* total) {
  using lacuna::kernels::GpuLayout, lacuna::kernels::GpuPlan;
  const size_t size = (size_t)n * k;
  Buffer<bf16> w(size), back(size), x((size_t)kMost * k), y((size_t)kMost * n);
  Buffer<unsigned char> scratch(kernel.scratch_bytes(n, k));
  Buffer<float> ref((size_t)kMost * n);
  gen_unstructured<<<512, 256, 0, st>>>(w.p, n, k, 1.f / sqrtf(k), n + k, 60, 0);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, n + 3);
  GpuLayout layout;
  CK((cudaError_t)kernel.measure(w.p, n, k, scratch.p, &layout, st));
  Buffer<unsigned char> packed(layout.packed_bytes);
  CK((cudaError_t)kernel.pack(&layout, w.p, scratch.p, packed.p, nullptr, st));
  CK((cudaError_t)kernel.unpack(&layout, packed.p, back.p, st));
  CK(cudaMemsetAsync(d_count, 0, 4, st));
  count_unequal<<<256, 256, 0, st>>>((unsigned short*)back.p, (unsigned short*)w.p, size, d_count);
  unsigned unequal;
  CK(cudaMemcpyAsync(&unequal, d_count, 4, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  int bad = unequal != 0;
  const int most = (int)kernel.max_tokens(&layout);
  for (int t = 1; t <= most; t++) {
    GpuPlan plan;
    CK((cudaError_t)kernel.plan(&layout, t, &plan));
    Buffer<unsigned char> workspace(kernel.workspace_bytes(&layout, &plan) + 1);
    CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
    CK((cudaError_t)kernel.run(&layout, &plan, packed.p, x.p, y.p, workspace.p, t % 2, st));
    reference32<<<dim3(n, t), 32, 0, st>>>(w.p, x.p, ref.p, n, k);
    ++*total;
    if (!(norm_error(y.p, ref.p, (size_t)n * t) < 2.5e-3)) {
      bad++;
      printf("BAD %s %dx%d T=%d\n", kernel.name, n, k, t);
    }
  }
  if (unequal) printf("BAD unpack: %s %dx%d\n", kernel.name, n, k);
  return bad;
}
static int check(const std::string& size) {
  int bad = 0, total = 0;
  if (size == "small") {
    for (int bits : {3, 4, 7})
      for (int lanes : {1, 2, 8}) {
        bad += check_case({100 + bits, 320, 60, lanes > 1, bits, lanes, 16}, &total);
        bad += check_case({33, 77, 50, 0, bits, lanes, 16}, &total);
        bad += check_case({45, 130, 50, 0, bits, lanes, 16, 3}, &total);
      }
    for (int t : {1, 2, 4}) bad += check_special(3, t), total++;
    for (int t : {4, 8}) bad += check_special(7, t), total++;
    bad += check_entry(lb::kWindow, 70, 520, &total);
    printf("check small: %d of %d bad\n", bad, total);
    return bad;
  }
  for (int bits : {3, 4, 7})
    for (int t = 1; t <= (bits == 7 ? kMost : 4); t++) bad += check_special(bits, t), total++;
  for (int bits : {3, 4, 7})
    for (int lanes : {1, 2, 4, 8})
      for (int warps : {16, 24}) {
        bad += check_case({1000 + lanes, 1024, 50, 1, bits, lanes, warps}, &total);
        bad += check_case({5000, 576, 75, 0, bits, lanes, warps}, &total);
        bad += check_case({2999, 1030, 70, 1, bits, lanes, warps, 40}, &total);
        bad += check_case({700, 640, 50, 0, bits, lanes, warps, 1}, &total);
      }
  for (int bits : {0, 7}) {
    for (float percent : {0.f, 30.f, 60.f, 95.f, 99.5f, 100.f})
      for (int uneven : {0, 1})
        for (auto [n, k] : {std::pair{1, 1},
                            {1, 4096},
                            {3, 8},
                            {31, 64},
                            {32, 100},
                            {65, 1001},
                            {257, 136},
                            {1023, 2049},
                            {4100, 640},
                            {9000, 64}})
          bad += check_case({n, k, percent, uneven, bits, 0, 0}, &total);
    for (auto [n, k] : {std::pair{4096, 4096}, {6144, 4096}, {4096, 14336}, {14336, 4096}})
      for (float percent : {50.f, 80.f}) bad += check_case({n, k, percent, 0, bits, 0, 0}, &total);
    bad += check_case({200000, 64, 50, 1, bits, 0, 0}, &total);
    bad += check_repeats(bits);
    total++;
  }
  bad += check_case({300, 24900, 50, 1, 7, 0, 0}, &total);
  for (const auto* kernel : {&lb::kGap, &lb::kWindow})
    for (auto [n, k] :
         {std::pair{1000, 1001}, {4096, 4096}, {300, 10600}, {300, 14336}, {64, 24900}})
      bad += check_entry(*kernel, n, k, &total);
  bad += check_case({300, 28672, 50, 1, 0, 0, 0}, &total);
  bad += check_case({40, 65472, 70, 1, 0, 0, 0}, &total);
  printf("check: %d of %d bad\n", bad, total);
  return bad;
}

int main(int argc, char** argv) {
  setup_device();
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check" || mode == "--check") return check(argc > 2 ? argv[2] : "") != 0;
  setup_dense();
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  if (mode == "sweep") sweep(argv[3], numbers(argv[4]), numbers(argv[5]));
  const auto more = [&](int i) { return argc > i ? numbers(argv[i]) : vector<int>{0}; };
  if (mode == "final") final_run(argv[3], numbers(argv[4]), numbers(argv[5]), more(6), more(7));
  if (mode == "unpack") unpack_run(argv[3], numbers(argv[4]), more(5)[0]);
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
