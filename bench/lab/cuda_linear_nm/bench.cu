// Study of the 2:4 bf16 decode kernel (cuda_sm90_mma_sp) against cuBLAS and cuBLASLt on one GPU.
//   bench --check [small|tiny]     exact tests against the host; small and tiny for sanitizers
//   bench sweep OUT.csv SHAPES TS  times every cut of the kernel, e.g. sweep s.csv 012345 8,16
//   bench near OUT.csv SHAPES TS   times the planned cut and those beside it
//   bench final OUT.csv SHAPES TS  times the planned cut against the best dense product
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; no variant is timed
// before its result was compared. SHAPES are digits, indices into kShapes. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_nm/bench.cu src/lacuna/kernels/linear_nm/cuda_sm90_{mma,wgmma}_sp.cu
//     src/lacuna/kernels/linear_nm/cuda_sm80_mma_sp_pack.cu -lcublas -lcublasLt -o build/gpu/bench
#include "../cuda_harness.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp.h"

namespace nm = lacuna::kernels::linear_nm;

static FILE* csv;

// Two random places of each group of four hold normal values; `thin` also leaves groups with one or
// no value and writes -0.0 at some dropped places.
__global__ void gen_w(bf16* w, size_t groups, float scale, unsigned long long seed, int thin) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
    const int pair = pairs[h % 6], count = thin ? int((h >> 8) % 3) : 2;
    const float neg = thin && (h >> 16) % 2 ? -0.f : 0.f;
    bf16 v[4];
    for (int j = 0; j < 4; ++j) v[j] = __float2bfloat16(neg);
    if (count > 0) v[pair & 15] = __float2bfloat16(normal(mix(h ^ 0x1111)) * scale);
    if (count > 1) v[pair >> 4] = __float2bfloat16(normal(mix(h ^ 0x2222)) * scale);
    *reinterpret_cast<uint2*>(w + 4 * i) = *reinterpret_cast<uint2*>(v);
  }
}
// ---------- one shape ----------
struct Problem {
  int n, k;
  vector<bf16*> dense;
  vector<unsigned char*> packed;
  bf16 *x, *y, *y2;
  float* ref;
  Problem(int n_, int k_) : n(n_), k(k_) {
    const size_t db = (size_t)n * k * 2, pb = nm::mma_sp_packed_bytes(n, k);
    const int nd = std::max<int>(3, (1100000000 + db - 1) / db),
              np = std::max<int>(4, (1100000000 + pb - 1) / pb);
    bf16* tmp;
    CK(cudaMalloc(&tmp, db));
    for (int i = 0; i < np; i++) {
      bf16* d = tmp;
      if (i < nd) {
        CK(cudaMalloc(&d, db));
        dense.push_back(d);
      }
      gen_w<<<2048, 256, 0, st>>>(d, (size_t)n * k / 4, 1.f / sqrtf(k), 77 + i, 0);
      unsigned char* p;
      CK(cudaMalloc(&p, pb));
      packed.push_back(p);
      CK(nm::mma_sp_pack(d, n, k, p, nullptr, st));
    }
    CK(cudaStreamSynchronize(st));
    CK(cudaFree(tmp));
    CK(cudaMalloc(&x, (size_t)64 * k * 2));
    CK(cudaMalloc(&y, (size_t)64 * n * 2));
    CK(cudaMalloc(&y2, (size_t)64 * n * 2));
    CK(cudaMalloc(&ref, (size_t)64 * n * 4));
    gen_x<<<256, 256, 0, st>>>(x, (size_t)64 * k, 5);
  }
  ~Problem() {
    for (auto p : dense) cudaFree(p);
    for (auto p : packed) cudaFree(p);
    cudaFree(x);
    cudaFree(y);
    cudaFree(y2);
    cudaFree(ref);
  }
  void reference(int t) { CB(gemm_ex(dense[0], x, ref, CUDA_R_32F, n, k, t)); }
  cudaError_t run(int i, int t, const nm::MmaSpPlan& p, bool pdl) {
    return nm::mma_sp_run(packed[i], x, y, n, k, t, p, pdl, st);
  }
  // Relative error on poisoned output, or a negative number if the launch was refused.
  double check(int t, const nm::MmaSpPlan& p, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    const cudaError_t e = run(0, t, p, pdl);
    if (e != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, ref, (size_t)n * t);
  }
  unsigned moving(int t, const nm::MmaSpPlan& p) {
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
static std::string name_of(const nm::MmaSpPlan& p) {
  char b[96];
  snprintf(b, sizeof b, "NT%d MT%d RW%d KW%d U%d S%d X%d C%d P%d F%d", p.token_tiles,
           p.tiles_per_warp, p.row_warps, p.k_warps, p.stage_units, p.stages, p.x_stages, p.cluster,
           p.x_warps, p.x_first);
  return b;
}

static nm::MmaSpPlan planned(int n, int k, int t) {
  nm::MmaSpPlan plan;
  const cudaError_t e = nm::mma_sp_plan(n, k, t, &plan);
  if (e != cudaSuccess) {
    printf("no plan for %dx%d T=%d\n", n, k, t);
    exit(1);
  }
  return plan;
}

// Every cut worth timing: all blocks in one wave, rings as deep as shared memory allows.
static int g_clusters[9];  // clusters of that size that fit at once
static vector<nm::MmaSpPlan> cuts(int n, int k, int t) {
  vector<nm::MmaSpPlan> all;
  const int nt = t <= 8 ? 1 : t <= 16 ? 2 : t <= 32 ? 4 : 8, tiles = (n + 15) / 16, units = k / 128;
  for (int cluster : {1, 2, 4, 8}) {
    if (t <= 8 && cluster == 8) continue;
    for (int mt : {1, 2, 3}) {
      if ((mt >= 3 && nt < 4) || (nt == 8 && mt == 1)) continue;
      const int groups = g_clusters[cluster];
      const int rw = ((tiles + groups - 1) / groups + mt - 1) / mt, part = units / cluster;
      for (int kw : {1, 2, 3, 4, 6}) {
        const int warps = rw * kw;
        if (kw > part || warps < 5) continue;
        for (int su : {1, 2, 4}) {
          const int rounds = (part + su * kw - 1) / (su * kw);
          if (su * kw > part) continue;
          for (int xs : {2, 3, 4}) {
            if (xs > rounds || (xs == 4 && t >= 32)) continue;
            int last = 0;
            for (int most : {1, 2, 4}) {
              nm::MmaSpPlan p;
              p.token_tiles = nt;
              p.tiles_per_warp = mt;
              p.row_warps = rw;
              p.k_warps = kw;
              p.stage_units = su;
              p.cluster = cluster;
              p.x_stages = xs;
              for (int s = std::min(most, rounds); s > last; s--) {
                p.stages = s;
                const size_t bytes = nm::mma_sp_shared_bytes(p);
                if (bytes > 0 && bytes <= 227 * 1024) {
                  for (int producers : {1, 2, 4}) {
                    if (producers == 4 && nt < 4) continue;
                    p.x_warps = producers;
                    if (nm::mma_sp_shared_bytes(p) > 0) all.push_back(p);
                  }
                  last = s;
                  break;
                }
              }
            }
          }
        }
      }
    }
  }
  return all;
}

// The planned cut and cuts beside it.
static vector<nm::MmaSpPlan> near_cuts(int n, int k, int t) {
  vector<nm::MmaSpPlan> all;
  const nm::MmaSpPlan base = planned(n, k, t);
  for (int su : {1, 2})
    for (int s : {1, 2, 3, 4})
      for (int xs : {2, 3, 4, 6})
        for (int x_warps : {1, 2, 3, 4})
          for (int kw : {base.k_warps, base.k_warps + 1}) {
            nm::MmaSpPlan p = base;
            p.stage_units = su;
            p.stages = s;
            p.x_stages = xs;
            p.x_warps = x_warps;
            p.k_warps = kw;
            const int rounds = (k / 128 / p.cluster + su * kw - 1) / (su * kw);
            const size_t bytes = nm::mma_sp_shared_bytes(p);
            if (bytes > 0 && bytes <= 227 * 1024 && s <= rounds && xs <= rounds) all.push_back(p);
          }
  for (int first : {2, 3, 4}) {
    nm::MmaSpPlan p = base;
    p.x_first = first;
    all.push_back(p);
  }
  return all;
}

static void sweep(const char* shapes, const vector<int>& ts, bool near) {
  for (const char* s = shapes; *s; s++) {
    const Shape sh = kShapes[*s - '0'];
    Problem p(sh.n, sh.k);
    const double bytes = nm::mma_sp_packed_bytes(sh.n, sh.k);
    for (int t : ts) {
      p.reference(t);
      struct Row {
        double us;
        nm::MmaSpPlan plan;
      };
      vector<Row> rows;
      int wrong = 0, refused = 0;
      for (const auto& c : near ? near_cuts(sh.n, sh.k, t) : cuts(sh.n, sh.k, t)) {
        const double e = p.check(t, c, false);
        if (e < 0) {
          refused++;
          continue;
        }
        if (!(e < 2.5e-3)) {
          wrong++;
          fprintf(csv, "wrong,%d,%d,%d,%s,%g\n", sh.n, sh.k, t, name_of(c).c_str(), e);
          continue;
        }
        const Time q = time_graph([&](int i) { return p.run(i, t, c, false); },
                                  (int)p.packed.size(), bytes / 3.5e6 + 3, 2, 500);
        rows.push_back({q.us, c});
        fprintf(csv, "sweep,%d,%d,%d,%s,%.3f,%.3f\n", sh.n, sh.k, t, name_of(c).c_str(), q.us, e);
      }
      std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) { return a.us < b.us; });
      printf("## %dx%d T=%d: %zu cuts, %d wrong, %d refused\n", sh.n, sh.k, t, rows.size(), wrong,
             refused);
      vector<Row> pdl;
      for (size_t i = 0; i < rows.size() && i < 10; i++) {
        const Time g = time_graph([&](int j) { return p.run(j, t, rows[i].plan, false); },
                                  (int)p.packed.size(), bytes / 3.5e6 + 3, 5, 1500);
        const Time o = time_graph([&](int j) { return p.run(j, t, rows[i].plan, true); },
                                  (int)p.packed.size(), bytes / 3.5e6 + 3, 3, 1500);
        const unsigned moved = (p.check(t, rows[i].plan, false), p.moving(t, rows[i].plan));
        fprintf(csv, "top,%d,%d,%d,%s,%.3f,%.3f,%u\n", sh.n, sh.k, t, name_of(rows[i].plan).c_str(),
                g.us, o.us, moved);
        if (i < 5)
          printf("  %-34s %7.2f  pdl %7.2f  moved %u\n", name_of(rows[i].plan).c_str(), g.us, o.us,
                 moved);
      }
      fflush(stdout);
      fflush(csv);
    }
  }
}

static void final_run(const char* shapes, const vector<int>& ts) {
  fprintf(csv,
          "n,k,t,dense_us,dense_low,dense_high,dense_algorithm,plan,graph_us,graph_low,graph_high,"
          "pdl_us,pdl_low,pdl_high,bytes,error,moved\n");
  printf(
      "| n x k | T | dense | ours graph (ratio) | ours PDL (ratio) | GB/s | share of limit | plan "
      "|\n");
  vector<double> log_ratio(65, 0), count(65, 0);
  for (const char* s = shapes; *s; s++) {
    const Shape sh = kShapes[*s - '0'];
    Problem p(sh.n, sh.k);
    const double bytes = nm::mma_sp_packed_bytes(sh.n, sh.k);
    for (int t : ts) {
      p.reference(t);
      nm::MmaSpPlan plan;
      CK(nm::mma_sp_plan(sh.n, sh.k, t, &plan));
      const double e = p.check(t, plan, false), e2 = p.check(t, plan, true);
      if (!(e >= 0 && e < 2.5e-3) || fabs(e - e2) > 1e-9) {
        printf("WRONG %dx%d T=%d %s error %g %g\n", sh.n, sh.k, t, name_of(plan).c_str(), e, e2);
        continue;
      }
      const unsigned moved = p.moving(t, plan);
      vector<Rival> rivals = dense_rivals(p.dense, p.x, p.y, p.ref, sh.n, sh.k, t);
      Graph plain = capture([&](int j) { return p.run(j, t, plan, false); }, (int)p.packed.size(),
                            bytes / 3.5e6 + 3, 3000);
      Graph overlap = capture([&](int j) { return p.run(j, t, plan, true); }, (int)p.packed.size(),
                              bytes / 3.5e6 + 3, 3000);
      vector<Graph*> all = {&plain, &overlap};
      for (Rival& r : rivals) all.push_back(&r.graph);
      interleave(all, 9);
      struct {
        Time time;
        std::string name;
      } d;
      for (Rival& r : rivals) {
        const Time q = median(r.graph);
        if (!(q.us >= d.time.us)) {
          d.time = q;
          d.name = r.name;
        }
      }
      const Time g = median(plain), o = median(overlap);
      fprintf(csv, "%d,%d,%d,%.3f,%.3f,%.3f,%s,%s,%.3f,%.3f,%.3f,%.3f,%.3f,%.3f,%.0f,%.5f,%u\n",
              sh.n, sh.k, t, d.time.us, d.time.low, d.time.high, d.name.c_str(),
              name_of(plan).c_str(), g.us, g.low, g.high, o.us, o.low, o.high, bytes, e, moved);
      printf("| %dx%d | %d | %.2f | %.2f (%.2f) | %.2f (%.2f) | %.0f | %.2f | %s |%s\n", sh.n, sh.k,
             t, d.time.us, g.us, d.time.us / g.us, o.us, d.time.us / o.us, bytes / g.us / 1e3,
             bytes / 4.28e6 / g.us, name_of(plan).c_str(), moved ? " MOVED" : "");
      fflush(stdout);
      fflush(csv);
      log_ratio[t] += log(d.time.us / g.us);
      count[t]++;
    }
  }
  for (int t : ts)
    printf("T=%d geometric mean %.3f over %d shapes\n", t, exp(log_ratio[t] / count[t]),
           (int)count[t]);
}

// ---------- correctness ----------
static int check_one(int n, int k, int t, int thin, const nm::MmaSpPlan* given) {
  bf16 *w, *x, *y;
  unsigned char* packed;
  double *ref, *mag;
  nm::PackReport* report;
  const size_t guard = 256;  // canaries behind y
  CK(cudaMalloc(&w, (size_t)n * k * 2));
  CK(cudaMalloc(&x, (size_t)t * k * 2));
  CK(cudaMalloc(&y, (size_t)n * t * 2 + guard));
  CK(cudaMalloc(&packed, nm::mma_sp_packed_bytes(n, k)));
  CK(cudaMalloc(&ref, (size_t)n * t * 8));
  CK(cudaMalloc(&mag, (size_t)n * t * 8));
  CK(cudaMalloc(&report, sizeof(nm::PackReport)));
  gen_w<<<512, 256, 0, st>>>(w, (size_t)n * k / 4, 1.f / sqrtf(k), n * 31 + k, thin);
  gen_x<<<64, 256, 0, st>>>(x, (size_t)t * k, t * 7 + n);
  CK(nm::mma_sp_pack(w, n, k, packed, report, st));
  nm::PackReport r;
  CK(cudaMemcpyAsync(&r, report, sizeof r, cudaMemcpyDeviceToHost, st));
  reference64<<<dim3(n, t), 128, 0, st>>>(w, x, ref, mag, n, k, t);
  CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2 + guard, st));
  nm::MmaSpPlan plan;
  if (given)
    plan = *given;
  else
    CK(nm::mma_sp_plan(n, k, t, &plan));
  const cudaError_t e = nm::mma_sp_run(packed, x, y, n, k, t, plan, false, st);
  if (e != cudaSuccess) {
    printf("refused %dx%d T=%d %s: %s\n", n, k, t, name_of(plan).c_str(), cudaGetErrorString(e));
    exit(1);
  }
  vector<bf16> hy((size_t)n * t + guard / 2);
  vector<double> hr((size_t)n * t), hm((size_t)n * t);
  CK(cudaMemcpyAsync(hy.data(), y, hy.size() * 2, cudaMemcpyDeviceToHost, st));
  CK(cudaMemcpyAsync(hr.data(), ref, hr.size() * 8, cudaMemcpyDeviceToHost, st));
  CK(cudaMemcpyAsync(hm.data(), mag, hm.size() * 8, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  int bad = r.violations != 0;
  for (size_t i = 0; i < hr.size(); i++) {
    // half a bf16 step of the result, and float32 sums of k/2 products in any order
    const double bound = fabs(hr[i]) * 0x1p-8 + hm[i] * (k / 2) * 0x1p-24 + 1e-30;
    const double d = fabs((double)__bfloat162float(hy[i]) - hr[i]);
    if (!(d <= bound)) {
      if (bad++ < 3)
        printf("  n=%zu t=%zu got %g want %g\n", i % n, i / n, (double)__bfloat162float(hy[i]),
               hr[i]);
    }
  }
  unsigned short c;
  for (size_t i = 0; i < guard / 2; i++) {
    memcpy(&c, &hy[hr.size() + i], 2);
    bad += c != 0xffff;
  }
  if (bad)
    printf("BAD %d of %zu: %dx%d T=%d thin %d %s\n", bad, hr.size(), n, k, t, thin,
           name_of(plan).c_str());
  cudaFree(w);
  cudaFree(x);
  cudaFree(y);
  cudaFree(packed);
  cudaFree(ref);
  cudaFree(mag);
  cudaFree(report);
  return bad != 0;
}

// Small whole numbers: every product and sum is exact in float32, so y must be the exact integer
// sum of the host, rounded once to bf16, to the bit. Groups hold 2, 1 or 0 values (thin) or always
// 2, at random places; -0.0 stands at some dropped places. Tests each T of `ts` on one weight.
static int exact(int n, int k, const vector<int>& ts, bool thin, const nm::MmaSpPlan* given,
                 bool pdl) {
  g_state = n * 7919ull + k * 31 + ts[0];
  struct Kept {
    int column, value;
  };
  vector<unsigned short> w((size_t)n * k);
  vector<vector<Kept>> rows(n);
  for (int r = 0; r < n; r++)
    for (int g = 0; g < k / 4; g++) {
      static const int pairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
      const int* pair = pairs[rnd() % 6];
      const int count = thin ? rnd() % 3 : 2, first = rnd() % 2;
      unsigned short* q = &w[(size_t)r * k + 4 * g];
      for (int i = 0; i < 4; i++) q[i] = rnd() % 3 == 0 ? 0x8000 : 0;
      for (int i = 0; i < count; i++) {
        const int c = pair[(first + i) % 2], v = (int)(rnd() % 4 + 1) * (rnd() % 2 ? 1 : -1);
        q[c] = bits((float)v);
        rows[r].push_back({4 * g + c, v});
      }
    }
  const int tmax = *std::max_element(ts.begin(), ts.end());
  vector<unsigned short> x((size_t)tmax * k);
  vector<float> xt((size_t)k * tmax);
  for (int t = 0; t < tmax; t++)
    for (int i = 0; i < k; i++) {
      const int v = (int)(rnd() % 7) - 3;
      x[(size_t)t * k + i] = bits((float)v);
      xt[(size_t)i * tmax + t] = (float)v;
    }
  vector<float> want((size_t)n * tmax);  // whole numbers below 2^24
  for (int r = 0; r < n; r++)
    for (const Kept& e : rows[r])
      for (int t = 0; t < tmax; t++)
        want[(size_t)r * tmax + t] += e.value * xt[(size_t)e.column * tmax + t];
  Buffer<unsigned short> dw(w);
  Buffer<unsigned char> packed(nm::mma_sp_packed_bytes(n, k));
  Buffer<nm::PackReport> report(1);
  CK(nm::mma_sp_pack(dw.p, n, k, packed.p, report.p, st));
  CK(cudaStreamSynchronize(st));
  int bad = 0;
  const nm::PackReport rep = report.read()[0];
  if (rep.violations != 0 || rep.first_group != ~0ull) {
    bad++;
    printf("  false violation\n");
  }
  for (int t : ts) {
    const nm::MmaSpPlan plan = given ? *given : planned(n, k, t);
    // x ends with its last token: what a kernel reads past it, memcheck reports.
    Buffer<unsigned short> dx(vector<unsigned short>(x.begin(), x.begin() + (size_t)t * k));
    Buffer<unsigned short> dy((size_t)n * t + 64);
    CK(cudaMemset(dy.p, 0xff, dy.n * 2));
    CK(cudaDeviceSynchronize());
    const cudaError_t e = nm::mma_sp_run(packed.p, dx.p, dy.p, n, k, t, plan, pdl, st);
    if (e != cudaSuccess) {
      printf("refused %dx%d T=%d %s: %s\n", n, k, t, name_of(plan).c_str(), cudaGetErrorString(e));
      exit(1);
    }
    CK(cudaStreamSynchronize(st));
    const vector<unsigned short> y = dy.read();
    int wrong = 0;
    for (int q = 0; q < t; q++)
      for (int r = 0; r < n; r++) {
        const unsigned short got = y[(size_t)q * n + r], ref = bits(want[(size_t)r * tmax + q]);
        if (got != ref && !(value(got) == 0.f && value(ref) == 0.f)) {
          if (wrong++ < 3)
            printf("  row %d token %d: got %g want %g\n", r, q, value(got), value(ref));
        }
      }
    for (size_t i = (size_t)n * t; i < y.size(); i++) wrong += y[i] != 0xffff;
    if (wrong) {
      bad++;
      printf("BAD %d: %dx%d T=%d thin %d %s\n", wrong, n, k, t, thin, name_of(plan).c_str());
    }
  }
  return bad;
}
static int
check_violation() {  // rows that are not 2:4 are counted, the first one is named, two values stay
  const int n = 33, k = 256;
  vector<unsigned short> w((size_t)n * k, 0), x(k, bits(1.f));
  for (int i = 0; i < 4; i++) w[20 * k + 40 + i] = bits(1.f + i);
  for (int i = 0; i < 3; i++) w[32 * k + 252 + i] = bits(1.f);
  w[3 * k + 3] = 0x8000;
  Buffer<unsigned short> d(w), dx(x), y(n);
  Buffer<unsigned char> p(nm::mma_sp_packed_bytes(n, k));
  Buffer<nm::PackReport> report(1);
  CK(nm::mma_sp_pack(d.p, n, k, p.p, report.p, st));
  CK(nm::mma_sp_run(p.p, dx.p, y.p, n, k, 1, planned(n, k, 1), false, st));
  CK(cudaStreamSynchronize(st));
  const nm::PackReport r = report.read()[0];
  const vector<unsigned short> got = y.read();
  bool ok = r.violations == 2 && r.first_group == 20ull * (k / 4) + 10;
  for (int i = 0; i < n; i++) ok &= value(got[i]) == (i == 20 ? 3.f : i == 32 ? 2.f : 0.f);
  printf("pack report: %llu violations, first group %llu: %s\n", r.violations, r.first_group,
         ok ? "right" : "WRONG");
  return !ok;
}
// NaN and Inf of W and of x reach exactly the outputs whose kept weights meet them.
static int check_special(int t) {
  const int n = 70, k = 1280;
  g_state = t;
  vector<unsigned short> w((size_t)n * k, 0), x((size_t)t * k);
  for (auto& v : x) v = bits((float)(rnd() % 5 + 1));
  for (int r = 0; r < n; r++)
    for (int g = 0; g < k / 4; g++) {  // two values in each group: no place is filled up
      const int a = rnd() % 4, b = (a + 1 + rnd() % 3) % 4;
      w[(size_t)r * k + 4 * g + a] = bits((float)(rnd() % 3 + 1));
      w[(size_t)r * k + 4 * g + b] = bits(-(float)(rnd() % 3 + 1));
    }
  const float inf = INFINITY;
  auto kept = [&](int r, int c) { return (w[(size_t)r * k + c] & 0x7fff) != 0; };
  auto put = [&](int r, float v) {
    for (int c = 5 * r;; c++)
      if (kept(r, c)) {
        w[(size_t)r * k + c] = bits(v);
        return;
      }
  };
  put(3, inf);
  put(17, -inf);
  put(33, NAN);
  put(69, inf);
  x[(size_t)(t - 1) * k + 700] = bits(inf);
  x[(size_t)(t / 2) * k + 701] = bits(NAN);
  vector<double> want((size_t)n * t, 0);
  for (int q = 0; q < t; q++)
    for (int r = 0; r < n; r++)
      for (int c = 0; c < k; c++)
        if (kept(r, c))
          want[(size_t)q * n + r] +=
              (double)value(w[(size_t)r * k + c]) * value(x[(size_t)q * k + c]);
  Buffer<unsigned short> dw(w), dx(x), dy((size_t)n * t);
  Buffer<unsigned char> packed(nm::mma_sp_packed_bytes(n, k));
  CK(nm::mma_sp_pack(dw.p, n, k, packed.p, nullptr, st));
  CK(nm::mma_sp_run(packed.p, dx.p, dy.p, n, k, t, planned(n, k, t), false, st));
  CK(cudaStreamSynchronize(st));
  const vector<unsigned short> y = dy.read();
  int wrong = 0, special = 0;
  for (size_t i = 0; i < want.size(); i++) {
    const float got = value(y[i]), ref = value(bits((float)want[i]));
    special += !std::isfinite(ref);
    if (!(got == ref || (std::isnan(got) && std::isnan(ref)))) {
      if (wrong++ < 3)
        printf("  special: row %zu token %zu got %g want %g\n", i % n, i / n, got, ref);
    }
  }
  if (wrong) printf("BAD special values, T=%d: %d\n", t, wrong);
  return wrong != 0 || special == 0;
}
// The same bits 100 times while another stream keeps the memory busy.
static int check_repeats() {
  const int n = 4096, k = 4096;
  Buffer<bf16> w((size_t)n * k), x((size_t)64 * k), y((size_t)64 * n), first((size_t)64 * n),
      load((size_t)64 << 20);
  Buffer<unsigned char> packed(nm::mma_sp_packed_bytes(n, k));
  gen_w<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, 1.f / 64, 3, 0);
  gen_x<<<64, 256, 0, st>>>(x.p, (size_t)64 * k, 4);
  CK(nm::mma_sp_pack(w.p, n, k, packed.p, nullptr, st));
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  int moved = 0;
  for (int t : {1, 8, 16, 32, 64}) {
    const nm::MmaSpPlan plan = planned(n, k, t);
    CK(nm::mma_sp_run(packed.p, x.p, first.p, n, k, t, plan, false, st));
    for (int i = 0; i < 100; i++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 16, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(nm::mma_sp_run(packed.p, x.p, y.p, n, k, t, plan, i % 2, st));
      moved += differing(y.p, first.p, (size_t)n * t) != 0;
    }
  }
  CK(cudaStreamSynchronize(other));
  cudaStreamDestroy(other);
  printf("repeats under load: %d of 500 differ\n", moved);
  return moved != 0;
}
// Every instantiation with in-block and cluster sums and ragged rounds.
static vector<nm::MmaSpPlan> odd_plans(bool small) {
  vector<nm::MmaSpPlan> all;
  for (int nt : {1, 2, 4, 8})
    for (int mt : {1, 2, 3})
      for (int cluster : {1, 2, 4, 8}) {
        if (small && (cluster == 8 || (cluster == 4 && mt == 1))) continue;
        nm::MmaSpPlan p;
        p.token_tiles = nt;
        p.tiles_per_warp = mt;
        p.row_warps = 2;
        p.k_warps = cluster == 2 ? 1 : 3;
        p.stage_units = cluster == 1 || nt * mt > 8 ? 1 : 2;
        p.stages = cluster == 2 ? 3 : 2;
        p.x_stages = cluster == 4 ? 3 : 2;
        p.cluster = cluster;
        p.x_warps = 1 + (nt + mt + cluster) % 4;
        const size_t bytes = nm::mma_sp_shared_bytes(p);
        if (bytes > 0 && bytes <= 227 * 1024) all.push_back(p);
      }
  return all;
}
static vector<int> range(int a, int b) {
  vector<int> v;
  for (int i = a; i <= b; i++) v.push_back(i);
  return v;
}
static int check(const std::string& size) {
  const bool small = size == "small", tiny = size == "tiny";
  if (tiny) {  // for racecheck
    int bad = 0;
    for (int t : {1, 16, 33}) bad += exact(100, 1280, {t}, true, nullptr, false);
    for (int c : {1, 2}) {
      nm::MmaSpPlan p;
      p.token_tiles = 1;
      p.tiles_per_warp = 1;
      p.row_warps = 2;
      p.k_warps = 2;
      p.stage_units = 1;
      p.stages = 2;
      p.x_stages = 2;
      p.cluster = c;
      bad += exact(50, 1664, {5}, true, &p, false);
    }
    printf("check tiny: %d bad\n", bad);
    return bad;
  }
  int bad = check_violation(), total = 1;
  for (int t : {1, 7, 16, 31, 64}) bad += check_special(t), total++;
  bool pdl = false;
  for (const auto& p : odd_plans(small)) {
    const int most = p.token_tiles * 8;
    bad += exact(small ? 100 : 1001, small ? 1408 : 5504, {most, most - 3}, p.cluster == 1, &p,
                 pdl = !pdl);
    total += 2;
  }
  if (small) {
    for (int n : {1, 17, 100})
      for (int k : {128, 384}) {
        bad += exact(n, k, {1, 2, 7, 8, 9, 16, 17, 33, 64}, n % 2, nullptr, false);
        total += 9;
      }
    printf("check small: %d of %d bad\n", bad, total);
    return bad;
  }
  for (auto [n, k] : {std::pair{528, 640}, {37, 128}, {1000, 1408}, {2053, 4096}}) {
    bad += exact(n, k, range(1, 64), n % 2, nullptr, k % 256 != 0);
    total += 64;
  }
  for (int n : {1, 2, 3, 4, 5, 7, 15, 16, 17, 31, 33, 100, 1023, 4100})
    for (int k : {128, 256, 1152, 3712, 14336}) {
      bad += exact(n, k, {1, 3, 8, 9, 16, 24, 32, 40, 63, 64}, n % 2 == 0, nullptr, n % 3 == 0);
      total += 10;
    }
  for (auto [n, k] : {std::pair{4096, 4096}, {14336, 4096}, {4096, 14336}}) {
    bad += exact(n, k, {1, 8, 13, 16, 32, 64}, false, nullptr, false);
    total += 6;
  }
  for (int t : {1, 5, 8, 16, 31, 64})
    for (int thin : {0, 1}) {
      bad += check_one(1000, 4096, t, thin, nullptr);
      total++;
    }
  bad += check_repeats();
  total++;
  int unplanned = 0;
  for (int n = 1; n < 300000; n = n * 5 / 3 + 1)
    for (int k = 128; k < (1 << 20); k = (k * 7 / 4 + 128) / 128 * 128)
      for (int t = 1; t <= 64; t++) {
        nm::MmaSpPlan p;
        if (nm::mma_sp_plan(n, k, t, &p) != cudaSuccess || nm::mma_sp_shared_bytes(p) == 0 ||
            nm::mma_sp_shared_bytes(p) > 227 * 1024) {
          if (unplanned++ < 3) printf("no plan: %dx%d T=%d\n", n, k, t);
        }
      }
  bad += unplanned != 0;
  total++;
  printf("check: %d of %d bad\n", bad, total);
  return bad;
}

__global__ void __launch_bounds__(512, 1) empty_cluster_kernel() {}
static void
print_clusters() {  // how many clusters of blocks with 200 KB of shared memory fit at once
  CK(cudaFuncSetAttribute(empty_cluster_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                          200 * 1024));
  for (int c : {1, 2, 4, 8}) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute a;
    a.id = cudaLaunchAttributeClusterDimension;
    a.val.clusterDim.x = c;
    a.val.clusterDim.y = a.val.clusterDim.z = 1;
    config.attrs = &a;
    config.numAttrs = 1;
    config.gridDim = dim3(c * 64);
    config.blockDim = dim3(512);
    config.dynamicSmemBytes = 200 * 1024;
    int n = 0;
    CK(cudaOccupancyMaxActiveClusters(&n, empty_cluster_kernel, &config));
    g_clusters[c] = n;
    printf("clusters of %d at once: %d\n", c, n);
  }
}

int main(int argc, char** argv) {
  setup_device();
  const std::string mode = argc > 1 ? argv[1] : "check";
  if (mode == "check" || mode == "--check") return check(argc > 2 ? argv[2] : "") != 0;
  setup_dense();
  print_clusters();
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  if (mode == "sweep" || mode == "near") sweep(argv[3], numbers(argv[4]), mode == "near");
  if (mode == "final") final_run(argv[3], numbers(argv[4]));
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
