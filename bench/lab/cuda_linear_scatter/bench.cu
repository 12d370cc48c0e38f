// Study of the unstructured bf16 kernel on tensor cores (cuda_sm90_scatter) against cuBLAS and
// cuBLASLt on one GPU.
//   bench --check [small]              tests against float64 and the host; small for sanitizers
//   bench tune OUT.csv SHAPES PS TS    the same with the fastest cut, e.g. tune s.csv 05 50,80 8,16
//   bench final OUT.csv SHAPES PS TS   times the planned kernel against the best dense product
//   bench unpack OUT.csv SHAPES PS     times packing and unpacking
//   bench one OUT.csv SHAPE P T        three launches, for a profiler
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; no variant is timed
// before its result was compared. SHAPES are digits, indices into kShapes; PS sparsities in
// percent. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_scatter/bench.cu src/lacuna/kernels/linear_bitmap/cuda_sm90_scatter.cu
//     -lcublas -lcublasLt -o build/gpu/bench
#include "../cuda_harness.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_scatter.h"

namespace lb = lacuna::kernels::linear_bitmap;

static FILE* csv;

struct Packed {
  lb::ScatterLayout layout;
  unsigned char* bytes = nullptr;
  Packed() = default;
  Packed(const Packed&) = delete;
  Packed(Packed&& o) : layout(o.layout), bytes(o.bytes) { o.bytes = nullptr; }
  ~Packed() { cudaFree(bytes); }
};
static Packed pack(const bf16* w, int n, int k, int fours, void* scratch,
                   lb::ScatterForm form = lb::ScatterForm::kChoose) {
  Packed p;
  p.layout.form = form;
  p.layout.fours = fours;
  CK(lb::scatter_measure(w, n, k, scratch, &p.layout, st));
  CK(cudaMalloc(&p.bytes, p.layout.packed_bytes));
  CK(cudaMemsetAsync(p.bytes, 0xff, p.layout.packed_bytes, st));
  CK(lb::scatter_pack(w, scratch, p.layout, p.bytes, st));
  return p;
}

static const int kMaxT = (int)lb::kScatterMaxTokens;

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
    CK(cudaMalloc(&scratch, lb::scatter_scratch_bytes(n, k)));
    CK(cudaMalloc(&x, (size_t)kMaxT * k * 2));
    CK(cudaMalloc(&y, (size_t)kMaxT * n * 2));
    CK(cudaMalloc(&y2, (size_t)kMaxT * n * 2));
    CK(cudaMalloc(&ref, (size_t)kMaxT * n * 4));
    gen_x<<<256, 256, 0, st>>>(x, (size_t)kMaxT * k, 5);
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
  void pack_all() {
    packed.clear();
    const auto form = (lb::ScatterForm)(getenv("LAB_FORM") ? atoi(getenv("LAB_FORM")) : 0);
    size_t bytes = 0;
    for (int i = 0; bytes < 1100000000 || i < 4; i++) {
      const bf16* d = i < (int)dense.size() ? dense[i] : tmp;
      if (d == tmp) generate(tmp, i);
      packed.push_back(pack(d, n, k, 0, scratch, form));
      bytes += packed.back().layout.packed_bytes;
    }
    CK(cudaStreamSynchronize(st));
  }
  double mean_bytes() const {
    double b = 0;
    for (auto& p : packed) b += p.layout.packed_bytes;
    return b / packed.size();
  }
  void reference(int t) { CB(gemm_ex(dense[0], x, ref, CUDA_R_32F, n, k, t)); }
  cudaError_t run(int i, int t, const lb::ScatterPlan& plan, bool pdl) {
    return lb::scatter_run(packed[i].bytes, packed[i].layout, x, y, t, plan, pdl, st);
  }
  double check(int t, const lb::ScatterPlan& p, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    const cudaError_t e = run(0, t, p, pdl);
    if (e != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, ref, (size_t)n * t);
  }
  unsigned moving(int t, const lb::ScatterPlan& p) {
    unsigned worst = 0;
    CK(cudaMemcpyAsync(y2, y, (size_t)n * t * 2, cudaMemcpyDeviceToDevice, st));
    for (int i = 0; i < 3; i++) {
      CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
      CK(run(0, t, p, i == 1));
      worst = std::max(worst, differing(y, y2, (size_t)n * t));
    }
    return worst;
  }
  // Of all packed copies: some have larger units than the first.
  bool fits(const lb::ScatterPlan& p) const {
    for (auto& q : packed) {
      const size_t bytes = lb::scatter_shared_bytes(q.layout, p);
      if (bytes == 0 || bytes > 227 * 1024) return false;
    }
    return true;
  }
  lb::ScatterPlan planned(int t) const {
    lb::ScatterPlan plan;
    for (auto& q : packed) {
      CK(lb::scatter_plan(q.layout, t, &plan));
      if (fits(plan)) break;
    }
    return plan;
  }
};
static std::string name_of(const lb::ScatterLayout& l, const lb::ScatterPlan& p) {
  char b[96];
  snprintf(b, sizeof b, "%c%d NT%d MT%d RW%d KW%d U%d X%d C%d P%d",
           l.form == lb::ScatterForm::kPairs ? 'P' : 'L', l.fours, p.token_tiles, p.tiles_per_warp,
           p.row_warps, p.k_warps, p.stage_units, p.x_stages, p.cluster, p.x_warps);
  return b;
}

// A cut from LAB_CUT, e.g. 2,1,14,1,1,3,1,2 (as name_of prints it), else `plan`.
static lb::ScatterPlan cut_wished(lb::ScatterPlan plan) {
  if (const char* wish = getenv("LAB_CUT")) {
    const vector<int> v = numbers(wish);
    plan.token_tiles = v[0];
    plan.tiles_per_warp = v[1];
    plan.row_warps = v[2];
    plan.k_warps = v[3];
    plan.stage_units = v[4];
    plan.x_stages = v[5];
    plan.cluster = v[6];
    plan.x_warps = v[7];
  }
  return plan;
}

// Cuts worth timing: all blocks in one wave.
static vector<lb::ScatterPlan> cuts(const Problem& p, int t) {
  static const int at_once[9] = {0, 132, 66, 0, 30, 0, 0, 0, 15};
  vector<lb::ScatterPlan> all;
  const int nt = t <= 8    ? 1
                 : t <= 16 ? 2
                 : t <= 32 ? 4
                           : 8,
            tiles = (p.n + 15) / 16, units = p.k / 128;
  for (int cluster : {1, 2, 4, 8})
    for (int mt : {1, 2}) {
      const int groups = at_once[cluster], part = units / cluster;
      const int rw = ((tiles + groups - 1) / groups + mt - 1) / mt;
      for (int kw : {1, 2, 3, 4, 5, 6, 8, 10}) {
        const int warps = rw * kw;
        if (kw > part || warps < (nt == 8 ? 3 : 7)) continue;
        for (int su : {1, 2, 4})
          for (int xs : {2, 3})
            for (int producers : {1, 2, 3, 4}) {
              if (nt == 8   ? producers > 2
                  : nt == 1 ? producers < 2 || producers > 3
                            : producers != nt)
                continue;
              const int rounds = (part + su * kw - 1) / (su * kw);
              if (su * kw > part || xs > rounds || (xs == 2) != (nt >= 4 || rounds == 2)) continue;
              lb::ScatterPlan q;
              q.token_tiles = nt;
              q.tiles_per_warp = mt;
              q.row_warps = rw;
              q.k_warps = kw;
              q.stage_units = su;
              q.x_stages = xs;
              q.cluster = cluster;
              q.x_warps = producers;
              if (p.fits(q)) all.push_back(q);
            }
      }
    }
  return all;
}

// Times all cuts shortly; the fastest first.
struct Timed {
  double us;
  lb::ScatterPlan plan;
};
static vector<Timed> time_cuts(Problem& p, int t) {
  vector<Timed> rows;
  const double guess = p.mean_bytes() / 3.5e6 + 3;
  for (const auto& c : cuts(p, t)) {
    const double e = p.check(t, c, false);
    if (e < 0) continue;
    if (!(e < 2.5e-3) && !getenv("LAB_ANY")) {
      printf("WRONG %dx%d %d%% T=%d %s %g\n", p.n, p.k, p.percent, t,
             name_of(p.packed[0].layout, c).c_str(), e);
      continue;
    }
    const Time g = time_graph([&](int i) { return p.run(i, t, c, false); }, (int)p.packed.size(),
                              guess, 2, 400);
    rows.push_back({g.us, c});
    fprintf(csv, "cut,%d,%d,%d,%d,%s,%.3f,%.0f,%.5f\n", p.n, p.k, p.percent, t,
            name_of(p.packed[0].layout, c).c_str(), g.us, p.mean_bytes(), e);
  }
  std::sort(rows.begin(), rows.end(), [](const Timed& a, const Timed& b) { return a.us < b.us; });
  return rows;
}

// `tuned`: with the best cut found here, not the planned one.
static void final_run(const char* shapes, const vector<int>& percents, const vector<int>& ts,
                      bool tuned) {
  fprintf(csv,
          "n,k,percent,t,dense_us,dense_low,dense_high,dense_algorithm,plan,graph_us,graph_low,"
          "graph_high,pdl_us,pdl_low,pdl_high,packed_bytes,error,moved\n");
  printf("| n x k | %% | T | dense | ours graph (ratio) | PDL (ratio) | GB/s | bytes | plan |\n");
  vector<vector<double>> ratios(101 * 65), overlaps(101 * 65);
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      p.pack_all();
      for (int t : ts) {
        p.reference(t);
        lb::ScatterPlan plan = p.planned(t);
        if (tuned) {
          const vector<Timed> rows = time_cuts(p, t);
          for (size_t i = 0; i < rows.size() && i < 3; i++)
            printf("  %.2f %s\n", rows[i].us, name_of(p.packed[0].layout, rows[i].plan).c_str());
          if (!rows.empty()) plan = rows[0].plan;
        }
        const double e = p.check(t, plan, false), e2 = p.check(t, plan, true);
        const std::string name = name_of(p.packed[0].layout, plan);
        if (!(e >= 0 && e < 2.5e-3) || fabs(e - e2) > 1e-9) {
          printf("WRONG %dx%d %d%% T=%d %s error %g %g\n", sh.n, sh.k, percent, t, name.c_str(), e,
                 e2);
          continue;
        }
        const unsigned moved = p.moving(t, plan);
        vector<Rival> rivals = dense_rivals(p.dense, p.x, p.y, p.ref, sh.n, sh.k, t);
        const double guess = p.mean_bytes() / 3.5e6 + 3;
        Graph plain = capture([&](int j) { return p.run(j, t, plan, false); }, (int)p.packed.size(),
                              guess, 3000);
        Graph overlap = capture([&](int j) { return p.run(j, t, plan, true); },
                                (int)p.packed.size(), guess, 3000);
        vector<Graph*> all = {&plain, &overlap};
        for (Rival& r : rivals) all.push_back(&r.graph);
        interleave(all, 7);
        Time d;
        std::string best;
        for (Rival& r : rivals) {
          const Time q = median(r.graph);
          if (!(q.us >= d.us)) {
            d = q;
            best = r.name;
          }
        }
        const Time g = median(plain), o = median(overlap);
        fprintf(csv,
                "%d,%d,%d,%d,%.3f,%.3f,%.3f,%s,%s,%.3f,%.3f,%.3f,%.3f,%.3f,%.3f,%.0f,%.5f,%u\n",
                sh.n, sh.k, percent, t, d.us, d.low, d.high, best.c_str(), name.c_str(), g.us,
                g.low, g.high, o.us, o.low, o.high, p.mean_bytes(), e, moved);
        printf("| %dx%d | %d | %d | %.2f | %.2f (%.2f) | %.2f (%.2f) | %.0f | %.3f | %s |%s\n",
               sh.n, sh.k, percent, t, d.us, g.us, d.us / g.us, o.us, d.us / o.us,
               p.mean_bytes() / g.us / 1e3, p.mean_bytes() / (2. * sh.n * sh.k), name.c_str(),
               moved ? " MOVED" : "");
        fflush(stdout);
        fflush(csv);
        ratios[percent * 65 + t].push_back(d.us / g.us);
        overlaps[percent * 65 + t].push_back(d.us / o.us);
      }
    }
  for (int percent : percents)
    for (int t : ts) {
      double g = 0, o = 0, worst = 1e9;
      const auto& r = ratios[percent * 65 + t];
      for (double v : r) g += log(v), worst = std::min(worst, v);
      for (double v : overlaps[percent * 65 + t]) o += log(v);
      printf("%d%% T=%d geometric mean %.3f worst %.3f pdl %.3f over %zu shapes\n", percent, t,
             exp(g / r.size()), worst, exp(o / r.size()), r.size());
    }
}

static void unpack_run(const char* shapes, const vector<int>& percents) {
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      p.pack_all();
      const int copies = (int)p.packed.size();
      const Time u = time_graph(
          [&](int i) {
            return lb::scatter_unpack(p.packed[i].bytes, p.packed[i].layout,
                                      p.dense[i % p.dense.size()], st);
          },
          copies, 100, 5, 2000);
      float measure_ms = 0, pack_ms = 0;
      lb::ScatterLayout layout;
      for (int i = 0; i < 2; i++) {
        p.generate(p.tmp, 0);
        CK(cudaEventRecord(e0, st));
        layout = {};
        CK(lb::scatter_measure(p.tmp, sh.n, sh.k, p.scratch, &layout, st));
        CK(cudaEventRecord(e1, st));
        CK(cudaEventSynchronize(e1));
        CK(cudaEventElapsedTime(&measure_ms, e0, e1));
        CK(cudaEventRecord(e0, st));
        CK(lb::scatter_pack(p.tmp, p.scratch, layout, p.packed[0].bytes, st));
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
  int uneven;
  int fours;
  lb::ScatterForm form;
};
static std::string name_of(const Case& c) {
  char b[96];
  snprintf(b, sizeof b, "%dx%d %.0f%% uneven %d fours %d form %d", c.n, c.k, c.percent, c.uneven,
           c.fours, (int)c.form);
  return b;
}
// Some T and cuts on one weight, with and without overlap, against float64. The error may be half a
// bf16 step of the result and what float32 sums of k products in any order allow.
static int check_case(const Case& c, const vector<int>& ts, int* total) {
  const int n = c.n, k = c.k;
  const size_t size = (size_t)n * k;
  Buffer<bf16> w(size), back(size), x((size_t)kMaxT * k);
  Buffer<unsigned char> scratch(lb::scatter_scratch_bytes(n, k));
  Buffer<double> ref((size_t)kMaxT * n), mag((size_t)kMaxT * n);
  gen_unstructured<<<512, 256, 0, st>>>(w.p, n, k, 1.f / sqrtf(k), n * 31 + k, c.percent, c.uneven);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, n + 3);
  const Packed p = pack(w.p, n, k, c.fours, scratch.p, c.form);
  int bad = 0;
  CK(cudaMemsetAsync(back.p, 0xff, size * 2, st));
  CK(lb::scatter_unpack(p.bytes, p.layout, back.p, st));
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
  reference64<<<dim3(n, kMaxT), 128, 0, st>>>(w.p, x.p, ref.p, mag.p, n, k, kMaxT);
  CK(cudaStreamSynchronize(st));
  const vector<double> r = ref.read(), m = mag.read();
  for (int t : ts) {
    lb::ScatterPlan plan;
    CK(lb::scatter_plan(p.layout, t, &plan));
    vector<lb::ScatterPlan> plans = {plan};
    for (int variant = 0; variant < 6; variant++) {  // odd cuts
      lb::ScatterPlan q = plan;
      q.tiles_per_warp = 1 + variant % 2;
      q.cluster = 1 << (variant % 4);
      while (q.cluster > (k + 127) / 128) q.cluster /= 2;
      q.row_warps = 1 + variant % 3;
      q.k_warps = 1 + variant % 4;
      q.stage_units = 1 + variant % 3;
      q.x_stages = 1 + variant % 2;
      q.x_warps = 1 + variant % 4;
      plans.push_back(q);
    }
    for (size_t v = 0; v < plans.size(); v++) {
      const size_t need = lb::scatter_shared_bytes(p.layout, plans[v]);
      if (v > 0 && (need == 0 || need > 227 * 1024)) continue;
      Buffer<unsigned short> y((size_t)n * t + 64);
      CK(cudaMemset(y.p, 0xff, y.n * 2));
      CK(cudaDeviceSynchronize());
      CK(lb::scatter_run(p.bytes, p.layout, x.p, y.p, t, plans[v], (t + v) % 2, st));
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
        printf("BAD %d: T=%d %s, %s\n", wrong, t, name_of(p.layout, plans[v]).c_str(),
               name_of(c).c_str());
      }
    }
  }
  return bad;
}
// NaN and Inf of W reach exactly the outputs of their rows; of x, every output whose row keeps
// them. All others of that token meet a zero, and are NaN as well
static int check_special(int fours, int t, lb::ScatterForm form) {
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
  Buffer<unsigned char> scratch(lb::scatter_scratch_bytes(n, k));
  const Packed p = pack((bf16*)dw.p, n, k, fours, scratch.p, form);
  lb::ScatterPlan plan;
  CK(lb::scatter_plan(p.layout, t, &plan));
  CK(lb::scatter_run(p.bytes, p.layout, dx.p, dy.p, t, plan, false, st));
  CK(lb::scatter_unpack(p.bytes, p.layout, back.p, st));
  CK(cudaStreamSynchronize(st));
  const vector<unsigned short> y = dy.read(), again = back.read();
  int wrong = again != w, special = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const float got = value(y[i]), ref = value(bits((float)want[i]));
    special += !std::isfinite(ref);
    if (!(got == ref || (!std::isfinite(got) && !std::isfinite(ref))) && wrong++ < 3)
      printf("  special: row %zu token %zu got %g want %g\n", i % n, i / n, got, ref);
  }
  if (wrong) printf("BAD special values, fours %d, T=%d: %d\n", fours, t, wrong);
  return wrong != 0 || special == 0;
}
// The same bits 100 times while another stream keeps the memory busy; packing again, too.
static int check_repeats(int fours, lb::ScatterForm form) {
  const int n = 6144, k = 4096;
  Buffer<bf16> w((size_t)n * k), x((size_t)kMaxT * k), y((size_t)kMaxT * n),
      first((size_t)kMaxT * n), load((size_t)64 << 20);
  Buffer<unsigned char> scratch(lb::scatter_scratch_bytes(n, k));
  gen_unstructured<<<512, 256, 0, st>>>(w.p, n, k, 1.f / 64, 3, 70, 0);
  gen_x<<<64, 256, 0, st>>>(x.p, (size_t)kMaxT * k, 4);
  const Packed a = pack(w.p, n, k, fours, scratch.p, form),
               b = pack(w.p, n, k, fours, scratch.p, form);
  CK(cudaStreamSynchronize(st));
  int moved = a.layout.packed_bytes != b.layout.packed_bytes, runs = 1;
  if (!moved) moved += differing((bf16*)a.bytes, (bf16*)b.bytes, a.layout.packed_bytes / 2) != 0;
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  for (int t : {5, 8, 16, 32, 64}) {
    lb::ScatterPlan plan;
    CK(lb::scatter_plan(a.layout, t, &plan));
    CK(lb::scatter_run(a.bytes, a.layout, x.p, first.p, t, plan, false, st));
    for (int i = 0; i < 100; i++, runs++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 16, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(lb::scatter_run(i % 3 ? a.bytes : b.bytes, a.layout, x.p, y.p, t, plan, i % 2, st));
      moved += differing(y.p, first.p, (size_t)n * t) != 0;
    }
  }
  CK(cudaStreamSynchronize(other));
  cudaStreamDestroy(other);
  printf("repeats under load: %d of %d differ\n", moved, runs);
  return moved != 0;
}
static int check(const std::string& size) {
  int bad = 0, total = 0;
  const auto forms = {lb::ScatterForm::kPairs, lb::ScatterForm::kList};
  if (size == "small") {
    for (auto form : forms) {
      bad += check_case({100, 384, 60, 1, 0, form}, {1, 13, 32, 61}, &total);
      bad += check_case({33, 136, 50, 0, 20, form}, {8, 16}, &total);
      bad += check_case({48, 1024, 85, 0, 0, form}, {5}, &total);
      bad += check_special(0, 16, form);
      total++;
    }
    printf("check small: %d of %d bad\n", bad, total);
    return bad;
  }
  vector<int> every;
  for (int t = 1; t <= kMaxT; t++) every.push_back(t);
  for (auto form : forms) {
    for (int fours : {0, 20, 50, 100}) {
      for (int t : {1, 5, 8, 16, 31, 32, 63}) bad += check_special(fours, t, form), total++;
      bad += check_case({1000, 1024, 60, 1, fours, form}, every, &total);
      bad += check_case({333, 680, 75, 0, fours, form}, every, &total);
    }
    for (float percent : {0.f, 30.f, 60.f, 95.f, 99.5f, 100.f})
      for (int uneven : {0, 1})
        for (auto [n, k] : {std::pair{1, 8},
                            {1, 4096},
                            {3, 256},
                            {31, 392},
                            {32, 640},
                            {65, 1144},
                            {257, 128},
                            {1023, 2048},
                            {4100, 576},
                            {9000, 64}})
          bad += check_case({n, k, percent, uneven, 0, form}, {1, 7, 16, 29}, &total);
    for (auto [n, k] : {std::pair{4096, 4096}, {6144, 4096}, {4096, 14336}})
      for (float percent : {50.f, 60.f, 70.f, 80.f, 90.f})
        bad += check_case({n, k, percent, 0, 0, form}, {5, 8, 16, 32, 33, 64}, &total);
    bad += check_case({100000, 136, 50, 1, 0, form}, {8, 32, 64}, &total);
    bad += check_case({300, 28672, 50, 1, 0, form}, {8, 32, 64}, &total);
    for (int fours : {0, 50}) bad += check_repeats(fours, form), total++;
  }
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
  if (mode == "final" || mode == "tune") {
    final_run(argv[3], numbers(argv[4]), numbers(argv[5]), mode == "tune");
  }
  if (mode == "one") {  // for a profiler
    Problem p(kShapes[argv[3][0] - '0'].n, kShapes[argv[3][0] - '0'].k, atoi(argv[4]));
    p.pack_all();
    const int t = atoi(argv[5]);
    const lb::ScatterPlan plan = cut_wished(p.planned(t));
    printf("%s\n", name_of(p.packed[0].layout, plan).c_str());
    for (int i = 0; i < 3; i++) CK(p.run(i, t, plan, false));
  }
  if (mode == "unpack") unpack_run(argv[3], numbers(argv[4]));
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
