// Study of the block-sparse bf16 kernel (cuda_sm80_block) against cuBLAS and cuBLASLt on one GPU.
//   bench --check [small]              tests against float64 and the host; small for sanitizers
//   bench tune OUT.csv SHAPES PS TS    times the fastest cut, e.g. tune s.csv 05 80,90 8,16
//   bench final OUT.csv SHAPES PS TS   times the planned cut
//   bench unpack OUT.csv SHAPES PS     times packing and unpacking
// Blocks of 64 x 64 are dropped at random with the probability PS (percent). Times are medians of
// CUDA graph replays, weights rotated over more than 1 GB; no variant is timed before its result
// was compared. SHAPES are digits, indices into kShapes. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_bsr/bench.cu src/lacuna/kernels/linear_bsr/cuda_sm80_block.cu
//     -lcublas -lcublasLt -o build/gpu/bench
#include "../cuda_harness.h"
#include "lacuna/kernels/linear_bsr/cuda_sm80_block.h"

namespace lb = lacuna::kernels::linear_bsr;

static FILE* csv;

// Whole blocks are dropped; some weights of the others are zero, and some of the zeros are -0.0.
__global__ void gen_blocks(bf16* w, int n, int k, int height, int width, float scale,
                           unsigned long long seed, float percent) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k;
       i += (size_t)gridDim.x * blockDim.x) {
    const size_t block = (i / k / height) * (((size_t)k + width - 1) / width) + i % k / width;
    const float u = (float)(mix(block * 0x9E37ull + seed * 0x1000003ull) >> 40) * 0x1p-24f;
    const unsigned long long h = mix(i + seed * 0x5000011ull);
    bf16 v = __float2bfloat16(normal(h) * scale);
    if (h % 64 == 0) v = __float2bfloat16(0.f);
    if (u < percent * 0.01f) v = __float2bfloat16(h % 128 == 0 ? -0.f : 0.f);
    w[i] = v;
  }
}

struct Packed {
  lb::BlockLayout layout;
  unsigned char* bytes = nullptr;
  Packed() = default;
  Packed(const Packed&) = delete;
  Packed(Packed&& o) : layout(o.layout), bytes(o.bytes) { o.bytes = nullptr; }
  ~Packed() { cudaFree(bytes); }
};
static Packed pack(const bf16* w, int n, int k, int group_tiles, void* scratch) {
  Packed p;
  p.layout.group_tiles = group_tiles;
  CK(lb::block_measure(w, n, k, scratch, &p.layout, st));
  CK(cudaMalloc(&p.bytes, p.layout.packed_bytes));
  CK(cudaMemsetAsync(p.bytes, 0xff, p.layout.packed_bytes, st));
  CK(lb::block_pack(w, scratch, p.layout, p.bytes, st));
  return p;
}

static int g_most_tokens = 64;

struct Problem {
  int n, k, percent;
  vector<bf16*> dense;
  bf16 *x, *y, *y2;
  float* ref;
  void* scratch;
  vector<Packed> packed;
  Problem(int n_, int k_, int percent_) : n(n_), k(k_), percent(percent_) {
    const size_t db = (size_t)n * k * 2, tokens = g_most_tokens;
    const int nd = std::max<int>(3, (1100000000 + db - 1) / db);
    for (int i = 0; i < nd; i++) {
      bf16* d;
      CK(cudaMalloc(&d, db));
      dense.push_back(d);
      gen_blocks<<<2048, 256, 0, st>>>(d, n, k, 64, 64, 1.f / sqrtf(k), 77 + i, percent);
    }
    CK(cudaMalloc(&scratch, lb::block_scratch_bytes(n, k)));
    CK(cudaMalloc(&x, tokens * k * 2));
    CK(cudaMalloc(&y, tokens * n * 2));
    CK(cudaMalloc(&y2, tokens * n * 2));
    CK(cudaMalloc(&ref, tokens * n * 4));
    gen_x<<<256, 256, 0, st>>>(x, tokens * k, 5);
  }
  ~Problem() {
    for (auto p : dense) cudaFree(p);
    packed.clear();
    cudaFree(x);
    cudaFree(y);
    cudaFree(y2);
    cudaFree(ref);
    cudaFree(scratch);
  }
  // Enough packed weights: those of all dense ones, then copies of them elsewhere.
  void pack_all() {
    size_t bytes = 0;
    const size_t distinct = std::min<size_t>(dense.size(), 8);
    for (size_t i = 0; bytes < 1100000000 || i < 4; i++) {
      if (i < distinct) {
        packed.push_back(pack(dense[i], n, k, 0, scratch));
      } else {
        const Packed& from = packed[i % distinct];
        Packed p;
        p.layout = from.layout;
        CK(cudaMalloc(&p.bytes, p.layout.packed_bytes));
        CK(cudaMemcpyAsync(p.bytes, from.bytes, p.layout.packed_bytes, cudaMemcpyDeviceToDevice,
                           st));
        packed.push_back(std::move(p));
      }
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
  cudaError_t run(int i, int t, const lb::BlockPlan& plan, bool pdl) {
    return lb::block_run(packed[i].bytes, packed[i].layout, x, y, t, plan, pdl, st);
  }
  double check(int t, const lb::BlockPlan& p, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    const cudaError_t e = run(0, t, p, pdl);
    if (e != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, ref, (size_t)n * t);
  }
  unsigned moving(int t, const lb::BlockPlan& p) {
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
static std::string name_of(const lb::BlockLayout& l, const lb::BlockPlan& p) {
  char b[96];
  snprintf(b, sizeof b, "G%d NT%d MT%d D%d W%d", l.group_tiles, p.token_tiles, p.row_tiles, p.depth,
           p.k_warps);
  return b;
}

static vector<lb::BlockPlan> cuts(const Problem& p, int t) {
  vector<lb::BlockPlan> all;
  const int nt = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8;
  for (int tiles : {nt, nt / 2})
    for (int mt : {1, 2, 4})
      for (int depth : {1, 2})
        for (int warps : {1, 2, 3, 4, 6, 8, 12, 16}) {
          const lb::BlockPlan q{tiles, mt, depth, warps};
          if (lb::block_shared_bytes(p.packed[0].layout, q) > 0) all.push_back(q);
        }
  return all;
}

struct Timed {
  double us;
  lb::BlockPlan plan;
};
static vector<Timed> time_cuts(Problem& p, int t) {
  vector<Timed> rows;
  const double guess = p.mean_bytes() / 3.5e6 + 3;
  for (const auto& c : cuts(p, t)) {
    const double e = p.check(t, c, false);
    if (!(e >= 0 && e < 2.5e-3)) {
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
  g_most_tokens = std::max(64, *std::max_element(ts.begin(), ts.end()));
  fprintf(csv,
          "n,k,percent,t,dense_us,dense_low,dense_high,dense_algorithm,plan,graph_us,graph_low,"
          "graph_high,pdl_us,pdl_low,pdl_high,packed_bytes,error,moved\n");
  printf("| n x k | %% | T | dense | ours graph (ratio) | PDL (ratio) | GB/s | bytes | plan |\n");
  struct Mean {
    int percent, t;
    vector<double> plain, overlap;
  };
  vector<Mean> means;
  for (int percent : percents)
    for (int t : ts) means.push_back({percent, t, {}, {}});
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      p.pack_all();
      for (int t : ts) {
        p.reference(t);
        lb::BlockPlan plan;
        CK(lb::block_plan(p.packed[0].layout, t, &plan));
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
        for (Mean& m : means)
          if (m.percent == percent && m.t == t) {
            m.plain.push_back(d.us / g.us);
            m.overlap.push_back(d.us / o.us);
          }
      }
    }
  for (const Mean& m : means) {
    double g = 0, o = 0, worst = 1e9;
    for (double v : m.plain) g += log(v), worst = std::min(worst, v);
    for (double v : m.overlap) o += log(v);
    printf("%d%% T=%d geometric mean %.3f worst %.3f pdl %.3f over %zu shapes\n", m.percent, m.t,
           exp(g / m.plain.size()), worst, exp(o / m.plain.size()), m.plain.size());
  }
}

static void unpack_run(const char* shapes, const vector<int>& percents) {
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent);
      p.pack_all();
      const Time u = time_graph(
          [&](int i) {
            return lb::block_unpack(p.packed[i].bytes, p.packed[i].layout,
                                    p.dense[i % p.dense.size()], st);
          },
          (int)p.packed.size(), 100, 5, 2000);
      float measure_ms = 0, pack_ms = 0;
      lb::BlockLayout layout;
      for (int i = 0; i < 2; i++) {
        CK(lb::block_unpack(p.packed[0].bytes, p.packed[0].layout, p.dense[0], st));
        CK(cudaEventRecord(e0, st));
        layout = {};
        CK(lb::block_measure(p.dense[0], sh.n, sh.k, p.scratch, &layout, st));
        CK(cudaEventRecord(e1, st));
        CK(cudaEventSynchronize(e1));
        CK(cudaEventElapsedTime(&measure_ms, e0, e1));
        CK(cudaEventRecord(e0, st));
        CK(lb::block_pack(p.dense[0], p.scratch, layout, p.packed[0].bytes, st));
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
  int n, k, height, width;
  float percent;
  int group_tiles;
};
static std::string name_of(const Case& c) {
  char b[96];
  snprintf(b, sizeof b, "%dx%d blocks %dx%d %.0f%% group %d", c.n, c.k, c.height, c.width,
           c.percent, c.group_tiles);
  return b;
}
// Some T and every cut on one weight, with and without overlap, against float64. The error may be
// half a bf16 step of the result and what float32 sums of k products in any order allow.
static int check_case(const Case& c, const vector<int>& ts, int* total) {
  const int n = c.n, k = c.k, most = *std::max_element(ts.begin(), ts.end());
  const size_t size = (size_t)n * k;
  Buffer<bf16> w(size), back(size), x((size_t)most * k);
  Buffer<unsigned char> scratch(lb::block_scratch_bytes(n, k));
  Buffer<double> ref((size_t)most * n), mag((size_t)most * n);
  gen_blocks<<<512, 256, 0, st>>>(w.p, n, k, c.height, c.width, 1.f / sqrtf(k), n * 31 + k,
                                  c.percent);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, n + 3);
  const Packed p = pack(w.p, n, k, c.group_tiles, scratch.p);
  int bad = 0;
  CK(cudaMemsetAsync(back.p, 0xff, size * 2, st));
  CK(lb::block_unpack(p.bytes, p.layout, back.p, st));
  CK(cudaStreamSynchronize(st));
  const vector<bf16> original = w.read(), again = back.read();
  unsigned unequal = 0;
  for (size_t i = 0; i < size; i++) {
    unsigned short a, b;
    memcpy(&a, &original[i], 2);
    memcpy(&b, &again[i], 2);
    unequal += a != b && !(a == 0x8000 && b == 0);
  }
  ++*total;
  if (unequal) {
    bad++;
    printf("BAD unpack: %u, %s\n", unequal, name_of(c).c_str());
  }
  reference64<<<dim3(n, most), 128, 0, st>>>(w.p, x.p, ref.p, mag.p, n, k, most);
  CK(cudaStreamSynchronize(st));
  const vector<double> r = ref.read(), m = mag.read();
  for (int t : ts) {
    lb::BlockPlan planned;
    CK(lb::block_plan(p.layout, t, &planned));
    vector<lb::BlockPlan> plans = {planned};
    for (int nt : {1, 2, 4, 8})
      for (int mt : {1, 2, 4})
        for (int depth : {1, 2}) {
          const lb::BlockPlan q{nt, mt, depth, 1 + (t + nt + mt + depth) % 12};
          if (lb::block_shared_bytes(p.layout, q) > 0) plans.push_back(q);
        }
    for (size_t v = 0; v < plans.size(); v++) {
      Buffer<unsigned short> y((size_t)n * t + 64);
      CK(cudaMemset(y.p, 0xff, y.n * 2));
      CK(cudaDeviceSynchronize());
      CK(lb::block_run(p.bytes, p.layout, x.p, y.p, t, plans[v], (t + v) % 2, st));
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
// NaN and Inf of W reach exactly the outputs of their rows; of x, those of all rows that keep their
// tile.
static int check_special(int t) {
  const int n = 77, k = 1288;
  g_state = t;
  vector<unsigned short> w((size_t)n * k, 0), x((size_t)t * k);
  for (auto& v : x) v = bits((float)(rnd() % 5 + 1));
  for (int r = 0; r < n; r++)
    for (int c = 0; c < k; c++)
      if ((r / 16 + c / 32) % 3 == 0) w[(size_t)r * k + c] = bits((float)(rnd() % 3 + 1));
  const float inf = INFINITY;
  w[3 * k + 100] = bits(inf);
  w[17 * k + 1287] = bits(-inf);
  w[33 * k] = 0x7fc1;
  w[76 * k + 640] = bits(inf);
  x[(size_t)(t - 1) * k + 700] = bits(inf);  // kept where (r / 16 + 21) % 3 == 0
  vector<double> want((size_t)n * t, 0);
  for (int q = 0; q < t; q++)
    for (int r = 0; r < n; r++)
      for (int c = 0; c < k; c++)
        if (w[(size_t)r * k + c])
          want[(size_t)q * n + r] +=
              (double)value(w[(size_t)r * k + c]) * value(x[(size_t)q * k + c]);
  Buffer<unsigned short> dw(w), dx(x), dy((size_t)n * t), back((size_t)n * k);
  Buffer<unsigned char> scratch(lb::block_scratch_bytes(n, k));
  const Packed p = pack((bf16*)dw.p, n, k, 0, scratch.p);
  lb::BlockPlan plan;
  CK(lb::block_plan(p.layout, t, &plan));
  CK(lb::block_run(p.bytes, p.layout, dx.p, dy.p, t, plan, false, st));
  CK(lb::block_unpack(p.bytes, p.layout, back.p, st));
  CK(cudaStreamSynchronize(st));
  const vector<unsigned short> y = dy.read(), again = back.read();
  int wrong = again != w, special = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const float got = value(y[i]), ref = value(bits((float)want[i]));
    special += !std::isfinite(ref);
    if (!(got == ref || (!std::isfinite(got) && !std::isfinite(ref))) && wrong++ < 3)
      printf("  special: row %zu token %zu got %g want %g\n", i % n, i / n, got, ref);
  }
  if (wrong) printf("BAD special values, T=%d: %d\n", t, wrong);
  return wrong != 0 || special < 4;
}
// The same bits 100 times while another stream keeps the memory busy; packing again, too.
static int check_repeats() {
  const int n = 6144, k = 4096;
  Buffer<bf16> w((size_t)n * k), x((size_t)64 * k), y((size_t)64 * n), first((size_t)64 * n),
      load((size_t)64 << 20);
  Buffer<unsigned char> scratch(lb::block_scratch_bytes(n, k));
  gen_blocks<<<512, 256, 0, st>>>(w.p, n, k, 64, 64, 1.f / 64, 3, 80);
  gen_x<<<64, 256, 0, st>>>(x.p, (size_t)64 * k, 4);
  const Packed a = pack(w.p, n, k, 0, scratch.p), b = pack(w.p, n, k, 0, scratch.p);
  CK(cudaStreamSynchronize(st));
  int moved = a.layout.packed_bytes != b.layout.packed_bytes, runs = 1;
  if (!moved) moved += differing((bf16*)a.bytes, (bf16*)b.bytes, a.layout.packed_bytes / 2) != 0;
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  for (int t : {1, 8, 16, 32, 64}) {
    lb::BlockPlan plan;
    CK(lb::block_plan(a.layout, t, &plan));
    CK(lb::block_run(a.bytes, a.layout, x.p, first.p, t, plan, false, st));
    for (int i = 0; i < 100; i++, runs++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 16, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(lb::block_run(i % 3 ? a.bytes : b.bytes, a.layout, x.p, y.p, t, plan, i % 2, st));
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
  if (size == "small") {
    bad += check_case({100, 392, 32, 32, 60, 0}, {1, 13, 64, 70}, &total);
    bad += check_case({33, 136, 16, 32, 50, 1}, {8, 16}, &total);
    bad += check_case({192, 512, 64, 64, 80, 0}, {5}, &total);
    bad += check_special(16);
    total++;
    printf("check small: %d of %d bad\n", bad, total);
    return bad;
  }
  vector<int> every;
  for (int t = 1; t <= 70; t++) every.push_back(t);
  for (int t : {1, 8, 9, 33, 64}) bad += check_special(t), total++;
  bad += check_case({1000, 1024, 64, 64, 80, 0}, every, &total);
  bad += check_case({333, 680, 32, 32, 75, 0}, every, &total);
  for (float percent : {0.f, 50.f, 90.f, 98.f, 100.f})
    for (int group : {0, 4})
      for (auto [height, width] : {std::pair{16, 16}, {32, 16}, {64, 64}, {128, 128}, {5, 7}})
        for (auto [n, k] : {std::pair{1, 8},
                            {1, 4096},
                            {31, 392},
                            {65, 1144},
                            {257, 128},
                            {1023, 2048},
                            {4100, 576}}) {
          if (height == 5 && n > 300) continue;
          bad += check_case({n, k, height, width, percent, group}, {1, 7, 16, 40, 64, 130}, &total);
        }
  bad += check_case({70000, 64, 64, 64, 80, 0}, {1, 64}, &total);
  bad += check_case({1023, 2048, 64, 64, 80, 1}, {3, 16, 64}, &total);
  bad += check_case({1023, 2048, 64, 64, 80, 2}, {3, 16, 64}, &total);
  bad += check_case({256, 28672, 64, 64, 80, 0}, {1, 64}, &total);
  bad += check_repeats();
  total++;
  printf("check: %d of %d bad\n", bad, total);
  return bad;
}

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  setup_device();
  if (mode == "--check") return check(argc > 2 ? argv[2] : "") != 0;
  if (argc < 5) {
    printf("usage: see the head of the source\n");
    return 2;
  }
  setup_dense();
  csv = fopen(argv[2], "w");
  if (csv == nullptr) {
    printf("can't write %s\n", argv[2]);
    return 1;
  }
  if (mode == "unpack")
    unpack_run(argv[3], numbers(argv[4]));
  else if (argc == 6 && (mode == "tune" || mode == "final"))
    final_run(argv[3], numbers(argv[4]), numbers(argv[5]), mode == "tune");
  fclose(csv);
  return 0;
}
