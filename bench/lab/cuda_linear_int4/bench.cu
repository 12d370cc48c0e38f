// Study of cuda_sm90_int4 (2:4, codes of 4 bits in groups of 64) against dense bf16 on one GPU.
//   bench --check [small]            exact tests against the host; small for sanitizers
//   bench final OUT.csv SHAPES TS    times it and the dense products
//   bench sweep OUT.csv SHAPES TS    times cuts, e.g. sweep s.csv 03 1,16
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; nothing is timed
// before its result was compared. SHAPES are digits, indices into kShapes. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_int4/bench.cu src/lacuna/kernels/linear_nm/cuda_sm90_int4.cu
//     -lcublas -lcublasLt -o build/gpu/bench
#include "../cuda_linear_coded/plans.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_int4.h"

static const k::GpuLinearKernel& kernel = k::linear_nm::kInt4;
static FILE* csv;

// Codes -8..7 of two random places of each group of four, as bf16 numbers.
__global__ void gen_codes(bf16* w, size_t groups, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
    const int pair = pairs[h % 6];
    for (int j = 0; j < 4; ++j) {
      const bool kept = j == (pair & 15) || j == pair >> 4;
      w[4 * i + j] = __float2bfloat16(kept ? int(mix(h ^ (0x1111 * (j + 1))) >> 20 & 15) - 8 : 0.f);
    }
  }
}
// bf16, around 2^-8, no two neighbours alike. [n, groups]
__host__ __device__ inline float scale_of(size_t i) {
  return ldexpf(1.f + (i * 37 % 128) / 128.f, -8 - int(i % 3));
}
__global__ void gen_scales(bf16* s, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    s[i] = __float2bfloat16(scale_of(i));
}
// Sums in float64 of codes times x times scales, and of their magnitudes: a block an output.
__global__ void reference_groups(const bf16* w, const bf16* s, const bf16* x, double* y,
                                 double* mag, int n, int k) {
  const int row = blockIdx.x, t = blockIdx.y;
  __shared__ double sums[2][128];
  double sum = 0, all = 0;
  for (int c = threadIdx.x; c < k; c += 128) {
    const double v = (double)__bfloat162float(w[(size_t)row * k + c]) *
                     (double)__bfloat162float(s[(size_t)row * (k / 64) + c / 64]) *
                     (double)__bfloat162float(x[(size_t)t * k + c]);
    sum += v;
    all += fabs(v);
  }
  sums[0][threadIdx.x] = sum;
  sums[1][threadIdx.x] = all;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < 128; ++i) {
    sums[0][0] += sums[0][i];
    sums[1][0] += sums[1][i];
  }
  y[(size_t)t * n + row] = sums[0][0];
  mag[(size_t)t * n + row] = sums[1][0];
}

// ---------- one shape ----------
struct Problem {
  int n, k;
  Packed packed;
  vector<bf16*> dense;
  bf16 *codes, *first, *scales, *x, *y;
  double *want, *mag;
  float* plain;  // the dense product
  Problem(int n_, int k_, bool rivals) : n(n_), k(k_), packed(kernel, n_, k_) {
    const size_t count = (size_t)n * k;
    CK(cudaMalloc(&codes, count * 2));
    CK(cudaMalloc(&first, count * 2));
    CK(cudaMalloc(&scales, count / 32));
    gen_scales<<<256, 256, 0, st>>>(scales, count / 64);
    const int copies = std::max<int>(3, 1100000000 / packed.layout.packed_bytes + 1);
    for (int i = 0; i < copies; i++) {
      gen_codes<<<2048, 256, 0, st>>>(codes, count / 4, 77 + i);
      packed.add(codes, scales, nullptr);
      if (i == 0) CK(cudaMemcpyAsync(first, codes, count * 2, cudaMemcpyDeviceToDevice, st));
    }
    for (int i = 0; rivals && i < std::max<int>(3, 550000000 / count + 1); i++) {
      dense.push_back(nullptr);
      CK(cudaMalloc(&dense.back(), count * 2));
      gen_x<<<2048, 256, 0, st>>>(dense.back(), count, 99 + i);
    }
    CK(cudaMalloc(&x, (size_t)64 * k * 2));
    CK(cudaMalloc(&y, (size_t)64 * n * 2));
    CK(cudaMalloc(&want, (size_t)64 * n * 8));
    CK(cudaMalloc(&mag, (size_t)64 * n * 8));
    CK(cudaMalloc(&plain, (size_t)64 * n * 4));
    gen_x<<<256, 256, 0, st>>>(x, (size_t)64 * k, 5);
    CK(cudaStreamSynchronize(st));
  }
  ~Problem() {
    for (auto p : dense) cudaFree(p);
    for (void* p : {(void*)codes, (void*)first, (void*)scales, (void*)x, (void*)y, (void*)want,
                    (void*)mag, (void*)plain})
      cudaFree(p);
  }
  void reference(int t) {
    reference_groups<<<dim3(n, t), 128, 0, st>>>(first, scales, x, want, mag, n, k);
  }
  // Relative error on poisoned output, or a negative number if the launch was refused.
  double check(int t, const k::GpuPlan& plan, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    if (packed.run(0, plan, x, y, pdl) != cudaSuccess) {
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
    Problem p(sh.n, sh.k, true);
    for (int t : ts) {
      CB(gemm_ex(p.dense[0], p.x, p.plain, CUDA_R_32F, sh.n, sh.k, t));
      vector<Rival> all = dense_rivals(p.dense, p.x, p.y, p.plain, sh.n, sh.k, t);
      const size_t rivals = all.size();
      const k::GpuPlan plan = p.packed.plan(t);
      p.reference(t);
      const double e = p.check(t, plan, false), e2 = p.check(t, plan, true);
      if (!(e >= 0 && e < 2.5e-3) || fabs(e - e2) > 1e-9) {
        printf("WRONG %dx%d T=%d %s error %g %g\n", sh.n, sh.k, t, name_of(plan).c_str(), e, e2);
        continue;
      }
      const double bytes = p.packed.layout.packed_bytes;
      for (const bool pdl : {false, true})
        all.push_back({pdl ? "int4 overlap" : "int4",
                       capture([&, pdl](int i) { return p.packed.run(i, plan, p.x, p.y, pdl); },
                               (int)p.packed.copies.size(), bytes / 3.5e6 + 3, 3000)});
      vector<Graph*> graphs;
      for (Rival& r : all) graphs.push_back(&r.graph);
      interleave(graphs, 7);
      double best = 1e30;
      vector<double> us;
      for (size_t i = 0; i < all.size(); i++) {
        const Time q = median(all[i].graph);
        us.push_back(q.us);
        if (i < rivals) best = std::min(best, q.us);
        fprintf(csv, "%d,%d,%d,%s,%.3f,%.3f,%.3f,%.0f,%s\n", sh.n, sh.k, t, all[i].name.c_str(),
                q.us, q.low, q.high, i < rivals ? 2. * sh.n * sh.k : bytes,
                i < rivals ? "" : name_of(plan).c_str());
      }
      printf("%dx%d T=%d dense %.2f int4 2:4 %.2f (%.2fx, %.2f TB/s) overlap %.2f (%.2fx) %s\n",
             sh.n, sh.k, t, best, us[rivals], best / us[rivals], bytes / us[rivals] * 1e-6,
             us[rivals + 1], best / us[rivals + 1], name_of(plan).c_str());
      fflush(stdout);
      fflush(csv);
    }
  }
}

static void sweep(const char* shapes, const vector<int>& ts) {
  fprintf(csv, "n,k,t,plan,us,overlap_us\n");
  for (const char* s = shapes; *s; s++) {
    const Shape sh = kShapes[*s - '0'];
    Problem p(sh.n, sh.k, false);
    for (int t : ts) {
      p.reference(t);
      const double guess = p.packed.layout.packed_bytes / 3.5e6 + 3;
      const auto time = [&](const k::GpuPlan& plan, bool pdl) {
        return time_graph([&](int i) { return p.packed.run(i, plan, p.x, p.y, pdl); },
                          (int)p.packed.copies.size(), guess, 2, 1000)
            .low;
      };
      struct Row {
        double plain, overlap;
        k::GpuPlan plan;
      };
      vector<Row> rows;
      int wrong = 0, refused = 0;
      for (const auto& c : cuts(sh.n, sh.k, t, /*least_warps=*/4, {1, 2, 4})) {
        const double e = p.check(t, c, false);
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
      const k::GpuPlan planned = p.packed.plan(t);
      printf("## %dx%d T=%d: %zu cuts, %d wrong, %d refused; planned %s %.2f overlap %.2f\n", sh.n,
             sh.k, t, rows.size(), wrong, refused, name_of(planned).c_str(), time(planned, false),
             time(planned, true));
      std::sort(rows.begin(), rows.end(), [](const Row& a, const Row& b) {
        return a.plain + a.overlap < b.plain + b.overlap;
      });
      for (size_t i = 0; i < rows.size() && i < 5; i++)
        printf("  %-34s %7.2f  overlap %7.2f\n", name_of(rows[i].plan).c_str(), rows[i].plain,
               rows[i].overlap);
      for (const Row& r : rows)
        fprintf(csv, "%d,%d,%d,%s,%.3f,%.3f\n", sh.n, sh.k, t, name_of(r.plan).c_str(), r.plain,
                r.overlap);
      fflush(stdout);
      fflush(csv);
    }
  }
}

// ---------- correctness ----------
// Small whole numbers and scales that are powers of two, so that y must be the exact sum, rounded
// once.
static int exact(int n, int k, const vector<int>& ts, bool pdl, const Plan* given) {
  const int groups = k / 64;
  vector<unsigned short> w((size_t)n * k, 0), s((size_t)n * groups), x((size_t)64 * k);
  vector<float> wf(w.size(), 0), xf(x.size());
  for (int r = 0; r < n; r++)
    for (int g = 0; g < k / 4; g++) {
      const int a = rnd() % 4, b = (a + 1 + rnd() % 3) % 4, count = rnd() % 8 ? 2 : rnd() % 2;
      for (int j = 0; j < 4; j++) {
        const bool kept = (j == a && count > 0) || (j == b && count > 1);
        const int v = kept ? int(rnd() % 16) - 8 : 0;
        wf[(size_t)r * k + 4 * g + j] = v;
        w[(size_t)r * k + 4 * g + j] = v == 0 && rnd() % 2 ? 0x8000 : bits(v);
      }
    }
  const auto scale = [&](int r, int c) { return ldexpf(1, (r + c / 64) % 4 - 2); };
  for (int r = 0; r < n; r++)
    for (int g = 0; g < groups; g++) s[(size_t)r * groups + g] = bits(scale(r, 64 * g));
  for (size_t i = 0; i < x.size(); i++) xf[i] = int(rnd() % 17) - 8, x[i] = bits(xf[i]);
  Buffer<unsigned short> dw(w), ds(s);
  Packed packed(kernel, n, k);
  Buffer<k::GpuPackReport> report(1);
  packed.add((const bf16*)dw.p, (const bf16*)ds.p, report.p);
  int bad = 0;
  CK(cudaStreamSynchronize(st));
  bad += report.read()[0].violations != 0;
  // Unpacked: codes times scales.
  Buffer<unsigned short> back((size_t)n * k);
  CK((cudaError_t)kernel.unpack(&packed.layout, packed.copies[0], back.p, st));
  CK(cudaStreamSynchronize(st));
  const auto unpacked = back.read();
  for (size_t i = 0; i < unpacked.size(); i++)
    bad += value(unpacked[i]) != wf[i] * scale(int(i / k), int(i % k));
  if (bad) printf("BAD unpack or report %dx%d: %d\n", n, k, bad);
  const int most = *std::max_element(ts.begin(), ts.end());
  vector<float> want((size_t)most * n);
  for (int q = 0; q < most; q++)
    for (int r = 0; r < n; r++) {
      float all = 0;  // exact: quarters of whole numbers below 2^22
      for (int c = 0; c < k; c++)
        all += wf[(size_t)r * k + c] * xf[(size_t)q * k + c] * scale(r, c);
      want[(size_t)q * n + r] = value(bits(all));
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
      printf("refused %dx%d T=%d %s: %s\n", n, k, t, name_of(plan).c_str(), cudaGetErrorString(e));
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
      printf("BAD %d of %zu: %dx%d T=%d %s\n", wrong, count, n, k, t, name_of(plan).c_str());
    bad += wrong != 0;
  }
  return bad;
}
// Random codes against float64: float32 sums in any order, one factor a group, one rounding.
static int check_random(int n, int k, int t) {
  Buffer<bf16> w((size_t)n * k), s((size_t)n * k / 64), x((size_t)t * k), y((size_t)t * n);
  Buffer<double> want((size_t)t * n), mag((size_t)t * n);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, n + k);
  gen_scales<<<64, 256, 0, st>>>(s.p, s.n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, t * 7 + n);
  Packed packed(kernel, n, k);
  packed.add(w.p, s.p, nullptr);
  reference_groups<<<dim3(n, t), 128, 0, st>>>(w.p, s.p, x.p, want.p, mag.p, n, k);
  CK(packed.run(0, packed.plan(t), x.p, y.p, false));
  CK(cudaStreamSynchronize(st));
  const auto hw = want.read(), hm = mag.read();
  const auto hy = y.read();
  int bad = 0;
  for (size_t i = 0; i < hw.size(); i++) {
    const double bound = fabs(hw[i]) * 0x1p-8 + hm[i] * (k + 2) * 0x1p-24 + 0x1p-133;
    const double d = fabs((double)__bfloat162float(hy[i]) - hw[i]);
    if (!(d <= bound) && bad++ < 2)
      printf("  n=%zu t=%zu got %g want %g\n", i % n, i / n, (double)__bfloat162float(hy[i]),
             hw[i]);
  }
  if (bad) printf("BAD random %dx%d T=%d: %d\n", n, k, t, bad);
  return bad != 0;
}
// The same bits 100 times while another stream keeps the memory busy.
static int check_repeats() {
  const int n = 4096, k = 4096;
  Buffer<bf16> w((size_t)n * k), s((size_t)n * k / 64), x((size_t)64 * k), y((size_t)64 * n),
      first((size_t)64 * n), load((size_t)16 << 20);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, 3);
  gen_scales<<<64, 256, 0, st>>>(s.p, s.n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, 4);
  Packed packed(kernel, n, k);
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
  if (moved) printf("BAD: %d of 500 repeats differ\n", moved);
  return moved != 0;
}
static int check(bool small) {
  int bad = 0, total = 0;
  bool pdl = false;
  for (int nt : {1, 2, 4, 8})
    for (int mt : {1, 2, 3})
      for (int cluster : {1, 2, 4}) {
        if ((mt == 3 && nt < 4) || (small && cluster == 4)) continue;
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
        bad += exact(small ? 100 : 333, 1408, {8 * nt, 8 * nt - 3}, pdl = !pdl, &p);
        total += 2;
      }
  for (int n : small ? vector<int>{1, 17, 100} : vector<int>{1, 2, 3, 5, 15, 16, 17, 33, 100, 1023})
    for (int k : small ? vector<int>{128, 384} : vector<int>{128, 256, 1152, 3712}) {
      bad += exact(n, k, {1, 2, 7, 8, 9, 16, 17, 33, 64}, n % 2, nullptr);
      total += 9;
    }
  if (!small) {
    vector<int> all(64);
    for (int i = 0; i < 64; i++) all[i] = i + 1;
    bad += exact(528, 640, all, false, nullptr), total += 64;
    for (int t : {1, 5, 8, 16, 31, 64}) bad += check_random(1000, 4096, t), total++;
    bad += check_random(4096, 14336, 8), total++;
    bad += check_repeats(), total++;
  }
  printf("check%s: %d of %d bad\n", small ? " small" : "", bad, total);
  return bad;
}

int main(int argc, char** argv) {
  setup_device();
  const std::string mode = argc > 1 ? argv[1] : "--check";
  if (mode == "--check") return check(argc > 2) != 0;
  setup_dense();
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  if (mode == "sweep") sweep(argv[3], numbers(argv[4]));
  if (mode == "final") final_run(argv[3], numbers(argv[4]));
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
