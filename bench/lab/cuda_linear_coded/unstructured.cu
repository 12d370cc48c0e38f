// Study of the kernels of unstructured 8-bit codes (cuda_sm90_fp8, cuda_sm90_int8 and their
// counterparts of few tokens, cuda_sm90_gap_fp8 and cuda_sm90_gap_int8, of linear_bitmap) against
// the best dense product of such codes on one GPU: cuBLASLt's, or our own dense stream.
//   bench --check [small]                    tests against the host; small for sanitizers
//   bench final OUT.csv SHAPES PS TS KINDS   times the planned cuts, e.g. final o.csv 05 50 1,8 01
//   bench tune OUT.csv SHAPES PS TS KINDS    the same with the fastest cut of each cell
//   bench unpack OUT.csv SHAPES PS           times packing and unpacking
//   bench one SHAPE P T KIND                 runs one kernel a few times, for a profiler
// Times are medians of CUDA graph replays, weights rotated over more than 1 GB; nothing is timed
// before its result was compared. SHAPES are digits, indices into kShapes; PS sparsities in
// percent; KINDS digits: 0 fp8, 1 int8, with gaps 2 and 3. Build (CUDA 13):
//   nvcc -std=c++20 -O3 -gencode=arch=compute_90a,code=sm_90a -Isrc -cudart static
//     bench/lab/cuda_linear_coded/unstructured.cu
//     src/lacuna/kernels/linear_bitmap/cuda_sm90_coded.cu
//     src/lacuna/kernels/linear_bitmap/cuda_sm90_gap.cu
//     src/lacuna/kernels/linear_dense/cuda_sm90_coded.cu -lcublas -lcublasLt -o build/gpu/bench
#include <memory>

#include "codes.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_coded.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_coded.h"

namespace k = lacuna::kernels;
using k::linear_bitmap::CodedCall;
using k::linear_bitmap::CodedCut;

static FILE* csv;

struct Kind {
  const char* name;
  const k::GpuLinearKernel *sparse, *dense;
  bool fp8;
  bool cuts = true;  // whether plans hold a CodedCut
  int most_tokens = 64;
};
static const Kind kKinds[] = {
    {"fp8", &k::linear_bitmap::kFp8, &k::linear_dense::kFp8, true},
    {"int8", &k::linear_bitmap::kInt8, &k::linear_dense::kInt8, false},
    {"gap fp8", &k::linear_bitmap::kGapFp8, &k::linear_dense::kFp8, true, false, 2},
    {"gap int8", &k::linear_bitmap::kGapInt8, &k::linear_dense::kInt8, false, false, 2}};

static vector<int> up_to(const Kind& kind, vector<int> ts) {
  ts.erase(std::remove_if(ts.begin(), ts.end(), [&](int t) { return t > kind.most_tokens; }),
           ts.end());
  return ts;
}

// Zeros where a hash says so. `uneven`: more or fewer from row to row and along K.
__global__ void drop(bf16* w, int n, int k, unsigned long long seed, float percent, int uneven) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(mix(i + 17) + seed * 0x1000003ull);
    float share = percent * 0.01f;
    if (uneven) {
      const unsigned long long row = mix(i / k + seed);
      share += 0.15f * sinf((float)(row & 1023)) + 0.1f * sinf((float)(i % k) * 0.01f);
    }
    if ((float)(h >> 40) * 0x1p-24f < share) w[i] = __float2bfloat16(h % 64 ? 0.f : -0.f);
  }
}

struct Packed {
  const k::GpuLinearKernel* kernel;
  k::GpuLayout layout;
  unsigned char* bytes = nullptr;
  Packed(const k::GpuLinearKernel* of, const bf16* codes, const bf16* scales, int n, int k)
      : kernel(of) {
    void* scratch;
    CK(cudaMalloc(&scratch, kernel->scratch_bytes(n, k) + 16));
    CK((cudaError_t)kernel->measure(codes, n, k, scratch, &layout, st));
    CK(cudaMalloc(&bytes, layout.packed_bytes));
    CK(cudaMemsetAsync(bytes, 0xff, layout.packed_bytes, st));
    CK((cudaError_t)kernel->pack(&layout, codes, scratch, bytes, nullptr, st));
    CK((cudaError_t)kernel->pack_scales(&layout, scales, bytes, st));
    CK(cudaStreamSynchronize(st));
    cudaFree(scratch);
  }
  Packed(const Packed&) = delete;
  ~Packed() { cudaFree(bytes); }
  k::GpuPlan plan(int t) const {
    k::GpuPlan p;
    CK((cudaError_t)kernel->plan(&layout, t, &p));
    return p;
  }
  cudaError_t run(const k::GpuPlan& plan, const bf16* x, bf16* y, bool pdl) const {
    return (cudaError_t)kernel->run(&layout, &plan, bytes, x, y, nullptr, pdl, st);
  }
};
static std::string name_of(const Kind& kind, const k::GpuPlan& held) {
  if (!kind.cuts) return "planned";
  const CodedCut c = k::held<CodedCall>(&held).cut;
  char b[96];
  snprintf(b, sizeof b, "NT%d MT%d RW%d KW%d S%d C%d", c.token_tiles, c.tiles_per_warp, c.row_warps,
           c.k_warps, c.stages, c.cluster);
  return b;
}

struct Problem {
  int n, k, percent;
  const Kind* kind;
  vector<std::unique_ptr<Packed>> sparse, dense;
  vector<void*> rival;
  bf16 *codes, *first, *scales, *x, *y;
  void *x8, *y8;
  double *want, *mag;
  float* plain;
  Problem(int n_, int k_, int percent_, const Kind& kind_, bool rivals)
      : n(n_), k(k_), percent(percent_), kind(&kind_) {
    const size_t count = (size_t)n * k;
    CK(cudaMalloc(&codes, count * 2));
    CK(cudaMalloc(&first, count * 2));
    CK(cudaMalloc(&scales, n * 2));
    gen_scales<<<64, 256, 0, st>>>(scales, n);
    do {
      generate(sparse.size(), true);
      if (sparse.empty())
        CK(cudaMemcpyAsync(first, codes, count * 2, cudaMemcpyDeviceToDevice, st));
      sparse.push_back(std::make_unique<Packed>(kind->sparse, codes, scales, n, k));
    } while (sparse.size() < 3 || sparse.size() * sparse[0]->layout.packed_bytes < 1100000000);
    for (size_t i = 0; rivals && (i < 3 || i * count < 1100000000); i++) {
      void* p;
      CK(cudaMalloc(&p, count));
      generate(i, false);
      if (kind->fp8)
        convert<<<2048, 256, 0, st>>>(codes, (__nv_fp8_e4m3*)p, count);
      else
        convert<<<2048, 256, 0, st>>>(codes, (signed char*)p, count);
      rival.push_back(p);
      dense.push_back(std::make_unique<Packed>(kind->dense, codes, scales, n, k));
    }
    CK(cudaMalloc(&x, (size_t)64 * k * 2));
    CK(cudaMalloc(&x8, (size_t)64 * k));
    CK(cudaMalloc(&y, (size_t)64 * n * 2));
    CK(cudaMalloc(&y8, (size_t)64 * n * 4));
    CK(cudaMalloc(&want, (size_t)64 * n * 8));
    CK(cudaMalloc(&mag, (size_t)64 * n * 8));
    CK(cudaMalloc(&plain, (size_t)64 * n * 4));
    // x of small whole numbers: the same for all, whatever their type.
    gen_codes<<<256, 256, 0, st>>>(x, (size_t)64 * k / 4, 5, false, false);
    CK(cudaStreamSynchronize(st));
    vector<bf16> host((size_t)64 * k);
    CK(cudaMemcpy(host.data(), x, host.size() * 2, cudaMemcpyDeviceToHost));
    for (bf16& v : host) v = __float2bfloat16(rintf(__bfloat162float(v) / 10.f));
    CK(cudaMemcpy(x, host.data(), host.size() * 2, cudaMemcpyHostToDevice));
    if (kind->fp8)
      convert<<<256, 256, 0, st>>>(x, (__nv_fp8_e4m3*)x8, (size_t)64 * k);
    else
      convert<<<256, 256, 0, st>>>(x, (signed char*)x8, (size_t)64 * k);
    CK(cudaStreamSynchronize(st));
  }
  ~Problem() {
    for (void* p : rival) cudaFree(p);
    for (void* p : {(void*)codes, (void*)first, (void*)scales, (void*)x, (void*)y, x8, y8,
                    (void*)want, (void*)mag, (void*)plain})
      cudaFree(p);
  }
  void generate(size_t i, bool zeros) {
    gen_codes<<<2048, 256, 0, st>>>(codes, (size_t)n * k / 4, 77 + i, false, kind->fp8);
    if (zeros) drop<<<2048, 256, 0, st>>>(codes, n, k, 7 + i, percent, 0);
  }
  void reference(bool of_sparse, int t) {
    if (!of_sparse) generate(0, false);
    reference64<<<dim3(n, t), 128, 0, st>>>(of_sparse ? first : codes, x, want, mag, n, k, t);
    scale_rows<<<256, 256, 0, st>>>(want, n, t);
  }
  // Relative error on poisoned output, or a negative number if the launch was refused.
  double check(const Packed& w, int t, const k::GpuPlan& plan, bool pdl) {
    CK(cudaMemsetAsync(y, 0xff, (size_t)n * t * 2, st));
    if (w.run(plan, x, y, pdl) != cudaSuccess) {
      cudaGetLastError();
      return -1;
    }
    CK(cudaStreamSynchronize(st));
    return norm_error(y, want, (size_t)n * t);
  }
  // Each copy with its own plan, for its layout is its own; or all with a `given` one.
  Graph graph(const vector<std::unique_ptr<Packed>>& w, int t, const k::GpuPlan* given, bool pdl,
              double target_us) {
    vector<k::GpuPlan> plans;
    for (const auto& copy : w) plans.push_back(given ? *given : copy->plan(t));
    return capture([&](int i) { return w[i]->run(plans[i], x, y, pdl); }, (int)w.size(),
                   w[0]->layout.packed_bytes / 3.5e6 + 3, target_us);
  }
};

// Cuts of one wave of blocks, or of as few as there can be.
static vector<k::GpuPlan> cuts(int n, int k, int t) {
  vector<k::GpuPlan> all;
  const int tiles = (n + 15) / 16, stages = (k + 255) / 256;
  for (int cluster : {1, 2, 4, 8})
    for (int mt : {1, 2}) {
      const int groups = cluster == 1 ? 132 : cluster == 2 ? 66 : cluster == 4 ? 30 : 15;
      const int of_all = ((tiles + groups - 1) / groups + mt - 1) / mt;
      const int waves = (of_all + 27) / 28, part = stages / cluster;
      const int rw = ((tiles + groups * waves - 1) / (groups * waves) + mt - 1) / mt;
      for (int kw : {1, 2, 3, 4, 5, 6, 8, 12, 16}) {
        if (kw > part || rw * kw < 7 || rw * kw > 28) continue;
        for (int ring : {1, 2, 3, 4}) {
          if (ring > (part + kw - 1) / kw) continue;
          CodedCall call{t, t, {}};
          call.cut.token_tiles = t <= 8 ? 1 : 2;
          call.cut.tiles_per_warp = mt;
          call.cut.row_warps = rw;
          call.cut.k_warps = kw;
          call.cut.stages = ring;
          call.cut.cluster = cluster;
          k::GpuPlan held;
          k::hold(&held, call);
          all.push_back(held);
        }
      }
    }
  return all;
}

static void time_all(const char* shapes, const vector<int>& percents, const vector<int>& ts,
                     const char* kinds, bool tune) {
  fprintf(csv, "n,k,percent,t,kind,what,us,low,high,bytes,plan\n");
  for (const char* q = kinds; *q; q++)
    for (const char* s = shapes; *s; s++)
      for (size_t ip = 0; ip < percents.size(); ip++) {
        const Shape sh = kShapes[*s - '0'];
        const Kind& kind = kKinds[*q - '0'];
        Problem p(sh.n, sh.k, percents[ip], kind, true);
        for (int t : up_to(kind, ts)) {
          gen_codes<<<2048, 256, 0, st>>>(p.codes, (size_t)sh.n * sh.k / 4, 77, false, kind.fp8);
          CB(gemm_ex(p.codes, p.x, p.plain, CUDA_R_32F, sh.n, sh.k, t));
          vector<Rival> all = lt_rivals(kind.fp8, p.rival, p.x8, kind.fp8 ? (void*)p.y : p.y8,
                                        p.plain, sh.n, sh.k, t);
          const k::GpuPlan dense_plan = p.dense[0]->plan(t);
          p.reference(false, t);
          double e = p.check(*p.dense[0], t, dense_plan, false);
          if (!(e >= 0 && e < 2.5e-3)) printf("WRONG dense %g\n", e);
          all.push_back({"dense", p.graph(p.dense, t, nullptr, false, 3000)});
          const size_t rivals = all.size();
          p.reference(true, t);
          vector<std::string> names(rivals);
          k::GpuPlan plan = p.sparse[0]->plan(t);
          const auto right = [&](const k::GpuPlan& c) {
            const double a = p.check(*p.sparse[0], t, c, false);
            if (a < 0) return false;
            const double b = p.check(*p.sparse[0], t, c, true);
            if (a < 2.5e-3 && fabs(a - b) < 1e-9) return true;
            printf("WRONG %s %dx%d T=%d %s error %g %g\n", kind.name, sh.n, sh.k, t,
                   name_of(kind, c).c_str(), a, b);
            return false;
          };
          if (!right(plan)) printf("planned cut refused: %s\n", name_of(kind, plan).c_str());
          if (tune && kind.cuts) {
            double best = 1e30;
            vector<std::pair<double, std::string>> rows;
            k::GpuPlan fastest = plan;
            for (const auto& c : cuts(sh.n, sh.k, t)) {
              if (!right(c)) continue;
              Graph g = p.graph(p.sparse, t, &c, false, 1000);
              interleave({&g}, 2);
              const double us = median(g).low;
              rows.push_back({us, name_of(kind, c)});
              if (us < best) best = us, fastest = c;
            }
            std::sort(rows.begin(), rows.end());
            for (size_t i = 0; i < rows.size() && i < 5; i++)
              printf("    %-30s %7.2f\n", rows[i].second.c_str(), rows[i].first);
            for (const auto& r : rows)
              fprintf(csv, "%d,%d,%d,%d,%s,cut,%.3f,,,,%s\n", sh.n, sh.k, percents[ip], t,
                      kind.name, r.first, r.second.c_str());
            all.push_back({"fastest", p.graph(p.sparse, t, &fastest, false, 3000)});
            names.push_back(name_of(kind, fastest));
          }
          all.push_back({"planned", p.graph(p.sparse, t, nullptr, false, 3000)});
          all.push_back({"overlap", p.graph(p.sparse, t, nullptr, true, 3000)});
          names.push_back(name_of(kind, plan));
          names.push_back(name_of(kind, plan));
          vector<Graph*> graphs;
          for (Rival& r : all) graphs.push_back(&r.graph);
          interleave(graphs, 7);
          double best = 1e30;
          printf("%s %dx%d %d%% T=%d bytes %.3f", kind.name, sh.n, sh.k, percents[ip], t,
                 p.sparse[0]->layout.packed_bytes / ((double)sh.n * sh.k));
          for (size_t i = 0; i < all.size(); i++) {
            const Time m = median(all[i].graph);
            if (i < rivals) best = std::min(best, m.us);
            if (i >= rivals)
              printf(" | %s %.2f (%.2fx)", all[i].name.c_str(), m.us, best / m.us);
            else
              printf(" %s %.2f", all[i].name.c_str(), m.us);
            fprintf(csv, "%d,%d,%d,%d,%s,%s,%.3f,%.3f,%.3f,%.0f,%s\n", sh.n, sh.k, percents[ip], t,
                    kind.name, all[i].name.c_str(), m.us, m.low, m.high,
                    i + 1 < rivals
                        ? (double)sh.n * sh.k
                        : (double)(i < rivals ? p.dense : p.sparse)[0]->layout.packed_bytes,
                    names[i].c_str());
          }
          printf(" %s\n", name_of(kind, plan).c_str());
          fflush(stdout);
          fflush(csv);
        }
      }
}

static void time_packing(const char* shapes, const vector<int>& percents) {
  for (const char* s = shapes; *s; s++)
    for (int percent : percents) {
      const Shape sh = kShapes[*s - '0'];
      Problem p(sh.n, sh.k, percent, kKinds[0], false);
      const auto time = [&](const Launch& f, int times) {
        float ms;
        CK(f(0));
        CK(cudaEventRecord(e0, st));
        for (int i = 0; i < times; i++) CK(f(i));
        CK(cudaEventRecord(e1, st));
        CK(cudaEventSynchronize(e1));
        CK(cudaEventElapsedTime(&ms, e0, e1));
        return ms * 1e3 / times;
      };
      const k::GpuLinearKernel& kernel = *kKinds[0].sparse;
      void* scratch;
      CK(cudaMalloc(&scratch, kernel.scratch_bytes(sh.n, sh.k)));
      k::GpuLayout layout;
      const double measure = time(
          [&](int) {
            return (cudaError_t)kernel.measure(p.first, sh.n, sh.k, scratch, &layout, st);
          },
          5);
      const double pack = time(
          [&](int) {
            return (cudaError_t)kernel.pack(&layout, p.first, scratch, p.sparse[0]->bytes, nullptr,
                                            st);
          },
          5);
      CK((cudaError_t)kernel.pack_scales(&layout, p.scales, p.sparse[0]->bytes, st));
      const double unpack = time(
          [&](int i) {
            const Packed& w = *p.sparse[i % p.sparse.size()];
            return (cudaError_t)kernel.unpack(&w.layout, w.bytes, p.codes, st);
          },
          20);
      printf("%dx%d %d%%: measure %.0f us, pack %.0f us, unpack %.1f us\n", sh.n, sh.k, percent,
             measure, pack, unpack);
      fprintf(csv, "%d,%d,%d,%.1f,%.1f,%.1f\n", sh.n, sh.k, percent, measure, pack, unpack);
      cudaFree(scratch);
    }
}

static void one(int shape, int percent, int t, int kind) {
  const Shape sh = kShapes[shape];
  Problem p(sh.n, sh.k, percent, kKinds[kind], false);
  for (int i = 0; i < 6; i++) CK(p.sparse[i % 3]->run(p.sparse[0]->plan(t), p.x, p.y, false));
  CK(cudaStreamSynchronize(st));
}

// ---------- correctness ----------
enum Mask { kRandom, kUneven, kFull, kEmpty };

// Small whole numbers, so that y must be the exact sum, scaled by a power of two and rounded once.
static int exact(const Kind& kind, int n, int k, int percent, Mask mask, const vector<int>& all_ts,
                 bool pdl, const CodedCut* given, int* total) {
  const vector<int> ts = up_to(kind, all_ts);
  *total += (int)ts.size() + 2;
  vector<unsigned short> w((size_t)n * k, 0), s(n), x((size_t)64 * k);
  vector<float> wf(w.size(), 0), xf(x.size());
  for (int r = 0; r < n; r++) {
    const int row = mask != kUneven ? percent : r % 5 == 0 ? 100 : r % 5 == 1 ? 0 : rnd() % 100;
    for (int c = 0; c < k; c++) {
      const int zeros = mask == kFull ? 0 : mask == kEmpty ? 100 : row;
      int v = int(rnd() % 100) < zeros ? 0 : int(rnd() % 31) - 15;
      if (mask == kFull && v == 0) v = 7;
      wf[(size_t)r * k + c] = v;
      w[(size_t)r * k + c] = v == 0 && rnd() % 2 ? 0x8000 : bits(v);
    }
  }
  for (int r = 0; r < n; r++) s[r] = bits(ldexpf(1, r % 5 - 2));
  for (size_t i = 0; i < x.size(); i++) xf[i] = int(rnd() % 17) - 8, x[i] = bits(xf[i]);
  Buffer<unsigned short> dw(w), ds(s);
  const Packed packed(kind.sparse, (const bf16*)dw.p, (const bf16*)ds.p, n, k);
  const Packed again(kind.sparse, (const bf16*)dw.p, (const bf16*)ds.p, n, k);
  int bad = 0;
  vector<unsigned char> first(packed.layout.packed_bytes), second(first.size());
  CK(cudaMemcpy(first.data(), packed.bytes, first.size(), cudaMemcpyDeviceToHost));
  CK(cudaMemcpy(second.data(), again.bytes, first.size(), cudaMemcpyDeviceToHost));
  if (first != second) bad++, printf("BAD packed twice %s %dx%d\n", kind.name, n, k);
  // Unpacked: codes times scales.
  Buffer<unsigned short> back((size_t)n * k);
  CK((cudaError_t)kind.sparse->unpack(&packed.layout, packed.bytes, back.p, st));
  CK(cudaStreamSynchronize(st));
  const auto unpacked = back.read();
  int wrong_back = 0;
  for (size_t i = 0; i < unpacked.size(); i++)
    wrong_back += value(unpacked[i]) != wf[i] * ldexpf(1, int(i / k) % 5 - 2);
  if (wrong_back) bad++, printf("BAD unpack %s %dx%d: %d\n", kind.name, n, k, wrong_back);
  const int most = *std::max_element(ts.begin(), ts.end());
  vector<float> want((size_t)most * n);
  for (int q = 0; q < most; q++)
    for (int r = 0; r < n; r++) {
      float all = 0;  // exact: whole numbers below 2^24
      for (int c = 0; c < k; c++) all += wf[(size_t)r * k + c] * xf[(size_t)q * k + c];
      want[(size_t)q * n + r] = value(bits((float)(all * ldexp(1, r % 5 - 2))));
    }
  for (int t : ts) {
    const size_t count = (size_t)t * n;
    Buffer<unsigned short> y(count + 64);
    CK(cudaMemsetAsync(y.p, 0xff, (count + 64) * 2, st));
    // x of exactly t tokens, so that memcheck sees what lies behind it.
    Buffer<unsigned short> xt(vector<unsigned short>(x.begin(), x.begin() + (size_t)t * k));
    k::GpuPlan plan;
    if (given)
      k::hold(&plan, CodedCall{t, t, *given});
    else
      plan = packed.plan(t);
    const cudaError_t e = packed.run(plan, (const bf16*)xt.p, (bf16*)y.p, pdl);
    if (e != cudaSuccess) {
      printf("refused %s %dx%d T=%d %s: %s\n", kind.name, n, k, t, name_of(kind, plan).c_str(),
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
      printf("BAD %d of %zu: %s %dx%d %d%% T=%d %s\n", wrong, count, kind.name, n, k, percent, t,
             name_of(kind, plan).c_str());
    bad += wrong != 0;
  }
  return bad;
}
// Every code comes back as the number that it stands for; y of a unit vector is that number.
static int check_codes(const Kind& kind) {
  const int n = 16, k = 512;
  vector<unsigned short> w((size_t)n * k, 0), s(n, bits(1.f)), x((size_t)k, 0);
  for (int i = 0; i < n * k; i++) {
    const float v = code_number(i / 2 * 37 % 256, kind.fp8);
    if (i % 3 < 2 && std::isfinite(v) && v != 0) w[i] = bits(v);
  }
  Buffer<unsigned short> dw(w), ds(s), back(w.size()), y(n);
  const Packed packed(kind.sparse, (const bf16*)dw.p, (const bf16*)ds.p, n, k);
  CK((cudaError_t)kind.sparse->unpack(&packed.layout, packed.bytes, back.p, st));
  CK(cudaStreamSynchronize(st));
  int bad = 0;
  const auto got = back.read();
  for (size_t i = 0; i < w.size(); i++) bad += got[i] != w[i];
  for (int c = 0; c < k; c += 13) {
    std::fill(x.begin(), x.end(), 0);
    x[c] = bits(1.f);
    Buffer<unsigned short> dx(x);
    CK(packed.run(packed.plan(1), (const bf16*)dx.p, (bf16*)y.p, false));
    CK(cudaStreamSynchronize(st));
    const auto column = y.read();
    for (int r = 0; r < n; r++) bad += value(column[r]) != value(w[(size_t)r * k + c]);
  }
  if (bad) printf("BAD codes %s: %d\n", kind.name, bad);
  return bad != 0;
}
// Random codes against float64: float32 sums in any order, one factor a part, one rounding. x of a
// wide range: its magnitudes spread over 2^24 within 256 columns.
static int check_random(const Kind& kind, int n, int k, int t, float x_scale, bool wide) {
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)t * k), y((size_t)t * n);
  Buffer<double> want((size_t)t * n), mag((size_t)t * n);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, n + k, false, kind.fp8);
  drop<<<512, 256, 0, st>>>(w.p, n, k, 3, 50, 1);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, t * 7 + n);
  CK(cudaStreamSynchronize(st));
  auto hx = x.read();
  for (bf16& v : hx)
    v = __float2bfloat16(__bfloat162float(v) * x_scale * (wide ? ldexpf(1, -int(rnd() % 25)) : 1));
  CK(cudaMemcpy(x.p, hx.data(), hx.size() * 2, cudaMemcpyHostToDevice));
  const Packed packed(kind.sparse, w.p, s.p, n, k);
  reference64<<<dim3(n, t), 128, 0, st>>>(w.p, x.p, want.p, mag.p, n, k, t);
  CK(packed.run(packed.plan(t), x.p, y.p, false));
  CK(cudaStreamSynchronize(st));
  const auto hw = want.read(), hm = mag.read();
  const auto hy = y.read();
  int bad = 0;
  for (size_t i = 0; i < hw.size(); i++) {
    const double scale = scale_of(i % n), ref = hw[i] * scale;
    const double bound = fabs(ref) * 0x1p-8 + hm[i] * scale * (k + 2) * 0x1p-24 + 0x1p-133;
    const double d = fabs((double)__bfloat162float(hy[i]) - ref);
    if (!(d <= bound) && bad++ < 2)
      printf("  %s n=%zu t=%zu got %g want %g\n", kind.name, i % n, i / n,
             (double)__bfloat162float(hy[i]), ref);
  }
  if (bad) printf("BAD random %s %dx%d T=%d scale %g: %d\n", kind.name, n, k, t, x_scale, bad);
  return bad != 0;
}
// NaN and Inf in one token's x: no output of it is finite, and the other tokens' are what they
// were.
static int check_nonfinite(const Kind& kind) {
  const int n = 100, k = 768, t = std::min(9, kind.most_tokens), bad_token = t / 2;
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)t * k), y((size_t)t * n);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, 8, false, kind.fp8);
  drop<<<512, 256, 0, st>>>(w.p, n, k, 3, 60, 0);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, 1);
  const Packed packed(kind.sparse, w.p, s.p, n, k);
  CK(packed.run(packed.plan(t), x.p, y.p, false));
  CK(cudaStreamSynchronize(st));
  const auto clean = y.read(), hw = w.read();
  int bad = 0;
  for (const unsigned short v : {0x7f80, 0xff80, 0x7fc1}) {
    auto hx = x.read();
    memcpy(&hx[(size_t)bad_token * k + 300], &v, 2);
    Buffer<bf16> dx(hx);
    CK(packed.run(packed.plan(t), dx.p, y.p, false));
    CK(cudaStreamSynchronize(st));
    const auto got = y.read();
    for (int i = 0; i < t * n; i++)
      // Kernels of gaps leave rows alone that keep nothing there.
      if (i / n != bad_token)
        bad += memcmp(&got[i], &clean[i], 2) != 0;
      else if (kind.cuts || __bfloat162float(hw[(size_t)(i % n) * k + 300]) != 0)
        bad += std::isfinite(__bfloat162float(got[i]));
  }
  if (bad) printf("BAD nonfinite %s: %d\n", kind.name, bad);
  return bad != 0;
}
// The same bits 100 times while another stream keeps the memory busy.
static int check_repeats(const Kind& kind) {
  const int n = 4096, k = 4096;
  Buffer<bf16> w((size_t)n * k), s(n), x((size_t)64 * k), y((size_t)64 * n), first((size_t)64 * n),
      load((size_t)16 << 20);
  gen_codes<<<512, 256, 0, st>>>(w.p, (size_t)n * k / 4, 3, false, kind.fp8);
  drop<<<512, 256, 0, st>>>(w.p, n, k, 3, 50, 0);
  gen_scales<<<64, 256, 0, st>>>(s.p, n);
  gen_x<<<64, 256, 0, st>>>(x.p, x.n, 4);
  const Packed packed(kind.sparse, w.p, s.p, n, k);
  cudaStream_t other;
  CK(cudaStreamCreateWithFlags(&other, cudaStreamNonBlocking));
  int moved = 0;
  for (int t : up_to(kind, {1, 2, 8, 16, 40})) {
    const k::GpuPlan plan = packed.plan(t);
    CK(packed.run(plan, x.p, first.p, false));
    for (int i = 0; i < 100; i++) {
      if (i % 4 == 0) gen_x<<<64 + i, 128, 0, other>>>(load.p, load.n / 4, i);
      CK(cudaMemsetAsync(y.p, 0xff, (size_t)n * t * 2, st));
      CK(packed.run(plan, x.p, y.p, i % 2));
      moved += differing(y.p, first.p, (size_t)n * t) != 0;
    }
  }
  CK(cudaStreamSynchronize(other));
  cudaStreamDestroy(other);
  if (moved) printf("BAD %s: %d repeats differ\n", kind.name, moved);
  return moved != 0;
}
static vector<int> range(int a, int b) {
  vector<int> v;
  for (int i = a; i <= b; i++) v.push_back(i);
  return v;
}
static int check(bool small) {
  int bad = 0, total = 0;
  for (const Kind& kind : kKinds) {
    bad += check_codes(kind), total++;
    bool pdl = false;
    for (int nt : {1, 2})
      for (int mt : {1, 2})
        for (int cluster : {1, 2, 4, 8}) {
          if ((small && cluster > 2) || !kind.cuts) continue;
          CodedCut c;
          c.token_tiles = nt;
          c.tiles_per_warp = mt;
          c.row_warps = 1 + (nt + mt) % 3;
          c.k_warps = cluster == 2 ? 1 : nt == 1 && cluster == 1 ? 5 : 2;
          c.stages = 1 + (mt + cluster) % 3;
          c.cluster = cluster;
          bad += exact(kind, small ? 100 : 333, 2088, 50, kRandom, {8 * nt, 8 * nt - 3}, pdl = !pdl,
                       &c, &total);
        }
    for (int n : small ? vector<int>{1, 17, 100} : vector<int>{1, 2, 3, 15, 16, 17, 33, 100, 1023})
      for (int k : small ? vector<int>{1, 8, 300} : vector<int>{1, 7, 8, 129, 256, 264, 1150, 3712})
        bad += exact(kind, n, k, n % 3 ? 50 : 80, (n + k) % 2 ? kRandom : kUneven,
                     {1, 2, 7, 8, 9, 16, 17, 33, 64}, n % 2, nullptr, &total);
    for (Mask mask : {kUneven, kFull, kEmpty})
      bad += exact(kind, 100, 520, 50, mask, {1, 2, 8, 16}, false, nullptr, &total);
    bad += check_nonfinite(kind), total++;
    if (small) continue;
    for (int percent : {10, 30, 60, 95})
      bad += exact(kind, 260, 1024, percent, kRandom, {1, 2, 8, 16}, false, nullptr, &total);
    bad += exact(kind, 5000, 200, 60, kUneven, {1, 2}, true, nullptr, &total);
    bad += exact(kind, 528, 640, 50, kRandom, range(1, 64), false, nullptr, &total);
    for (int t : up_to(kind, {1, 2, 5, 8, 16, 31, 64}))
      for (float scale : {1.f, 0x1p-20f, 0x1p-60f, 0x1p60f}) {
        bad += check_random(kind, 1000, 4096, t, scale, false), total++;
        bad += check_random(kind, 1000, 4096, t, scale, true), total++;
      }
    bad += check_random(kind, 4096, 14336, std::min(8, kind.most_tokens), 1.f, false), total++;
    bad += check_random(kind, 512, 28672, std::min(16, kind.most_tokens), 1.f, false), total++;
    bad += check_repeats(kind), total++;
  }
  printf("check%s: %d of %d bad\n", small ? " small" : "", bad, total);
  return bad;
}

int main(int argc, char** argv) {
  setup_device();
  const std::string mode = argc > 1 ? argv[1] : "--check";
  if (mode == "--check") return check(argc > 2) != 0;
  setup_dense();
  if (mode == "one") return one(atoi(argv[2]), atoi(argv[3]), atoi(argv[4]), atoi(argv[5])), 0;
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  if (mode == "unpack") time_packing(argv[3], numbers(argv[4]));
  if (mode == "final" || mode == "tune")
    time_all(argv[3], numbers(argv[4]), numbers(argv[5]), argv[6], mode == "tune");
  fclose(csv);
  CK(cudaDeviceSynchronize());
  return 0;
}
