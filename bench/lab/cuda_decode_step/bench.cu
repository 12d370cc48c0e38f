// Laboratory: a decode step of Llama-3.1-8B's shapes in one CUDA graph, without a framework. What
// does a token cost beside the bytes of its weights, and which kernel is to blame?
//
//   gemv   cuda_sm90_stream alone against cuBLAS and cuBLASLt
//   step   the whole sequence, and again with parts left out
#include <functional>
#include <memory>

#include "../cuda_harness.h"
#include "lacuna/kernels/decode/cuda_sm80_decode.h"
#include "lacuna/kernels/linear_bitmap/cuda_sm90_gap.h"
#include "lacuna/kernels/linear_dense/cuda_sm90_stream.h"
#include "lacuna/kernels/linear_nm/cuda_sm90_mma_sp.h"

using namespace lacuna;
using namespace lacuna::kernels;

__global__ void gen_weights(bf16* w, size_t n, float share, int nm, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < n;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    bool keep = (mix(h) >> 40) * (1.f / 16777216.f) >= share;
    if (nm) keep = (mix(i / 4 + seed) >> (i & 1)) % 2 == (i >> 1) % 2;  // one of two pairs
    w[i] = __float2bfloat16(keep ? .02f * normal(h) : 0.f);
  }
}

struct Weight {
  int n, k;
  GpuLayout layout = {};
  GpuPlan plan = {};
  void* packed = nullptr;
  Weight(const GpuLinearKernel* kernel, const bf16* dense, int n_, int k_) : n(n_), k(k_) {
    void *scratch = nullptr, *report = nullptr;
    CK(cudaMalloc(&scratch, kernel->scratch_bytes(n, k) + 16));
    CK(cudaMalloc(&report, 64));
    CK((cudaError_t)kernel->measure(dense, n, k, scratch, &layout, st));
    const size_t bytes = layout.packed_bytes ? layout.packed_bytes : (size_t)n * k * 2;
    CK(cudaMalloc(&packed, bytes));
    if (layout.packed_bytes == 0)
      CK(cudaMemcpyAsync(packed, dense, bytes, cudaMemcpyDeviceToDevice, st));
    else
      CK((cudaError_t)kernel->pack(&layout, dense, scratch, packed, (GpuPackReport*)report, st));
    CK((cudaError_t)kernel->plan(&layout, 1, &plan));
    CK(cudaStreamSynchronize(st));
    cudaFree(scratch);
    cudaFree(report);
  }
  ~Weight() { cudaFree(packed); }
  void run(const GpuLinearKernel* kernel, const void* x, void* y) const {
    CK((cudaError_t)kernel->run(&layout, &plan, packed, x, y, nullptr, 1, st));
  }
};

static const int kHidden = 4096, kInner = 14336, kVocab = 128256, kLayers = 32, kOwn = 8;

struct Layer {
  std::unique_ptr<Weight> qkv, q, k, v, o, gate_up, gate, up, down;
};

static void step(const char* kind, float sparsity) {
  const bool nm = !strcmp(kind, "nm"), dense = !strcmp(kind, "dense");
  const GpuLinearKernel* kernel = dense ? &linear_dense::kStream
                                  : nm  ? &linear_nm::kMmaSp
                                        : &linear_bitmap::kGap;
  bf16* tmp;
  CK(cudaMalloc(&tmp, (size_t)kVocab * kHidden * 2));
  unsigned long long seed = 1;
  double bytes = 0;
  auto make = [&](const GpuLinearKernel* with, int n, int k, float share, int pattern) {
    gen_weights<<<2048, 256, 0, st>>>(tmp, (size_t)n * k, share, pattern, seed++);
    return std::make_unique<Weight>(with, tmp, n, k);
  };
  std::vector<Layer> layers(kOwn);
  for (Layer& l : layers) {
    auto one = [&](int n, int k) { return make(kernel, n, k, sparsity, nm); };
    l.qkv = one(6144, kHidden);
    l.o = one(kHidden, kHidden);
    l.gate_up = one(2 * kInner, kHidden);
    l.down = one(kHidden, kInner);
    l.q = one(4096, kHidden);
    l.k = one(1024, kHidden);
    l.v = one(1024, kHidden);
    l.gate = one(kInner, kHidden);
    l.up = one(kInner, kHidden);
  }
  for (const auto* w : {&layers[0].qkv, &layers[0].o, &layers[0].gate_up, &layers[0].down})
    bytes += (*w)->layout.packed_bytes ? (double)(*w)->layout.packed_bytes : 2. * (*w)->n * (*w)->k;
  bytes *= kLayers;
  auto head = make(&linear_dense::kStream, kVocab, kHidden, 0, 0);
  bytes += 2. * kVocab * kHidden;
  cudaFree(tmp);

  const int capacity = 1024, heads = 32, kv_heads = 8, d = 128;
  auto room = [&](size_t n) {
    void* p;
    CK(cudaMalloc(&p, n));
    CK(cudaMemset(p, 0, n));
    return p;
  };
  std::vector<void*> keys, values;
  for (int i = 0; i < kLayers; i++) {
    keys.push_back(room((size_t)kv_heads * capacity * d * 2));
    values.push_back(room((size_t)kv_heads * capacity * d * 2));
    gen_x<<<64, 256, 0, st>>>((bf16*)keys[i], (size_t)kv_heads * capacity * d, 5 + i);
    gen_x<<<64, 256, 0, st>>>((bf16*)values[i], (size_t)kv_heads * capacity * d, 105 + i);
  }
  bf16* table = (bf16*)room((size_t)1024 * kHidden * 2);
  gen_x<<<64, 256, 0, st>>>(table, (size_t)1024 * kHidden, 999);
  bf16* cs = (bf16*)room((size_t)capacity * d * 2);
  gen_x<<<64, 256, 0, st>>>(cs, (size_t)capacity * d, 99);
  bf16* norm = (bf16*)room(kHidden * 2);
  gen_x<<<4, 256, 0, st>>>(norm, kHidden, 98);
  int* state = (int*)room(64);
  const int position = 544, id = 17;
  CK(cudaMemcpy(state + 1, &position, 4, cudaMemcpyHostToDevice));
  CK(cudaMemcpy(state + 2, &id, 4, cudaMemcpyHostToDevice));
  bf16 *hidden = (bf16*)room(kHidden * 2), *normed = (bf16*)room(kHidden * 2),
       *qkv = (bf16*)room(6144 * 2), *attended = (bf16*)room(4096 * 2),
       *delta = (bf16*)room(kHidden * 2), *gate_up = (bf16*)room(2 * kInner * 2),
       *active = (bf16*)room(kInner * 2), *logits = (bf16*)room(kVocab * 2);
  float* wide = (float*)room(kVocab * 4);
  void* widen_workspace = room(decode::kWidenWorkspaceBytes);
  decode::Attend attend{.dtype = DType::kBF16,
                        .tokens = 1,
                        .heads = heads,
                        .kv_heads = kv_heads,
                        .head_dim = d,
                        .capacity = capacity,
                        .q = qkv,
                        .position = state + 1,
                        .out = attended};
  attend.workspace = room(decode::kCuda.attend_workspace_bytes(attend));

  struct Without {
    bool joined = true, norms = true, fused = true, attend = true, activate = true, linears = true,
         head = true;
  };
  auto sequence = [&](const Without& w) {
    decode::kCuda.gather({.dtype = DType::kBF16,
                          .tokens = 1,
                          .width = kHidden,
                          .table = table,
                          .ids = state + 2,
                          .out = hidden},
                         st);
    auto normalize = [&](const void* x, const void* gained, void* sum, void* out) {
      decode::kCuda.normalize({.dtype = DType::kBF16,
                               .rows = 1,
                               .width = kHidden,
                               .x = x,
                               .delta = gained,
                               .sum = sum,
                               .weight = norm,
                               .epsilon = 1e-5f,
                               .out = out},
                              st);
    };
    for (int i = 0; i < kLayers; i++) {
      const Layer& l = layers[i % kOwn];
      if (w.norms) normalize(hidden, i ? delta : nullptr, hidden, normed);
      if (w.linears) {
        if (w.joined) {
          l.qkv->run(kernel, normed, qkv);
        } else {
          l.q->run(kernel, normed, qkv);
          l.k->run(kernel, normed, qkv + 4096);
          l.v->run(kernel, normed, qkv + 5120);
        }
      }
      const decode::Rotate rotate{.dtype = DType::kBF16,
                                  .tokens = 1,
                                  .heads = heads,
                                  .kv_heads = kv_heads,
                                  .head_dim = d,
                                  .capacity = capacity,
                                  .stride = 6144,
                                  .q = qkv,
                                  .k = qkv + 4096,
                                  .v = qkv + 5120,
                                  .cos = cs,
                                  .sin = cs,
                                  .keys = keys[i],
                                  .values = values[i],
                                  .position = state + 1};
      attend.keys = keys[i];
      attend.values = values[i];
      if (w.attend && w.fused) {
        decode::kCuda.rotate_and_attend(rotate, attend, st);
      } else if (w.attend) {
        decode::kCuda.rotate(rotate, st);
        decode::kCuda.attend(attend, st);
      }
      if (w.linears) l.o->run(kernel, attended, delta);
      if (w.norms) normalize(hidden, delta, hidden, normed);
      if (w.linears) {
        if (w.joined) {
          l.gate_up->run(kernel, normed, gate_up);
        } else {
          l.gate->run(kernel, normed, gate_up);
          l.up->run(kernel, normed, gate_up + kInner);
        }
      }
      if (w.activate)
        decode::kCuda.activate({.dtype = DType::kBF16,
                                .count = kInner,
                                .gate = gate_up,
                                .up = gate_up + kInner,
                                .out = active},
                               st);
      if (w.linears) l.down->run(kernel, active, delta);
    }
    if (w.norms) normalize(hidden, delta, nullptr, normed);
    if (w.head) {
      head->run(&linear_dense::kStream, normed, logits);
      decode::kCuda.widen({.dtype = DType::kBF16,
                           .count = kVocab,
                           .logits = logits,
                           .wide = wide,
                           .best = state,
                           .workspace = widen_workspace},
                          st);
    }
  };
  struct Run {
    std::string name;
    Graph graph;
  };
  std::vector<Run> runs;
  auto add = [&](const std::string& name, const Without& w) {
    Graph g;
    cudaGraph_t graph;
    CK(cudaStreamBeginCapture(st, cudaStreamCaptureModeRelaxed));
    sequence(w);
    CK(cudaStreamEndCapture(st, &graph));
    CK(cudaGraphInstantiate(&g.exec, graph, 0));
    cudaGraphDestroy(graph);
    g.nodes = 1;
    g.reps = 3;
    CK(cudaGraphLaunch(g.exec, st));
    CK(cudaStreamSynchronize(st));
    int best;
    CK(cudaMemcpy(&best, state, 4, cudaMemcpyDeviceToHost));
    runs.push_back({name + " -> " + std::to_string(best), std::move(g)});
  };
  add("all", {});
  add("apart", {.joined = false});
  add("no norms", {.norms = false});
  add("rotate, then attend", {.fused = false});
  add("no attend", {.attend = false});
  add("no activate", {.activate = false});
  add("linears alone", {.norms = false, .attend = false, .activate = false});
  add("no linears, no head", {.linears = false, .head = false});
  add("no head", {.head = false});
  for (int q = 0; q < 5; q++)
    for (Run& r : runs) r.graph.times.push_back(replay(r.graph));
  printf("%s %.2f: %.2f GB, %.0f us at 4.28 TB/s\n", kind, sparsity, bytes / 1e9, bytes / 4.28e6);
  for (Run& r : runs) {
    const Time t = median(r.graph);
    printf("  %-28s %8.1f us  (%.1f .. %.1f)\n", r.name.c_str(), t.us, t.low, t.high);
  }
  fflush(stdout);
}

static void gemv(const char* csv_name) {
  FILE* csv = fopen(csv_name, "w");
  fprintf(csv, "n,k,dense,dense_us,graph_us,pdl_us,error\n");
  std::vector<Shape> shapes(kShapes, kShapes + 6);
  shapes.push_back({kVocab, kHidden});
  shapes.push_back({1024, 4096});
  shapes.push_back({576, 1536});
  shapes.push_back({1000, 1000});
  for (const Shape& s : shapes) {
    const size_t one = (size_t)s.n * s.k;
    const int copies = std::max(4, (int)(1.2e9 / (2. * one)) + 1);
    vector<bf16*> w(copies);
    std::vector<std::unique_ptr<Weight>> mine;
    bf16* tmp;
    CK(cudaMalloc(&tmp, one * 2));
    for (int i = 0; i < std::min(copies, 160); i++) {
      gen_weights<<<2048, 256, 0, st>>>(tmp, one, 0, 0, 77 + i);
      mine.push_back(std::make_unique<Weight>(&linear_dense::kStream, tmp, s.n, s.k));
    }
    w.resize(mine.size());
    for (size_t i = 0; i < w.size(); i++) w[i] = (bf16*)mine[i]->packed;
    bf16 *x, *y;
    double *ref, *mag;
    float* ref32;
    CK(cudaMalloc(&x, s.k * 2));
    CK(cudaMalloc(&y, s.n * 2 + 256));
    CK(cudaMalloc(&ref, s.n * 8));
    CK(cudaMalloc(&mag, s.n * 8));
    CK(cudaMalloc(&ref32, s.n * 4));
    gen_x<<<16, 256, 0, st>>>(x, s.k, 3);
    reference64<<<dim3(s.n, 1), 128, 0, st>>>(w[0], x, ref, mag, s.n, s.k, 1);
    CK(cudaMemsetAsync(y, 0xff, s.n * 2, st));
    mine[0]->run(&linear_dense::kStream, x, y);
    const double error = norm_error(y, ref, s.n);
    vector<double> host(s.n);
    CK(cudaMemcpy(host.data(), ref, s.n * 8, cudaMemcpyDeviceToHost));
    vector<float> narrow(host.begin(), host.end());
    CK(cudaMemcpy(ref32, narrow.data(), s.n * 4, cudaMemcpyHostToDevice));
    auto rivals = dense_rivals(w, x, y, ref32, s.n, s.k, 1);
    const double guess = one * 2 / 4e6 + 3;
    auto launch = [&](int overlap) {
      return capture(
          [&, overlap](int i) {
            return (cudaError_t)linear_dense::kStream.run(
                &mine[i]->layout, &mine[i]->plan, mine[i]->packed, x, y, nullptr, overlap, st);
          },
          (int)w.size(), guess, 3000);
    };
    Graph plain = launch(0), pdl = launch(1);
    vector<Graph*> all = {&plain, &pdl};
    for (auto& r : rivals) all.push_back(&r.graph);
    interleave(all, 5);
    double best = 1e30;
    std::string name;
    for (auto& r : rivals) {
      const double us = median(r.graph).us;
      if (us < best) best = us, name = r.name;
    }
    const double a = median(plain).us, b = median(pdl).us;
    printf(
        "%dx%d: %s %.2f us, ours %.2f (%.2fx, %.0f GB/s), overlapping %.2f (%.2fx, %.0f GB/s), "
        "error %.2e\n",
        s.n, s.k, name.c_str(), best, a, best / a, one * 2 / a / 1e3, b, best / b,
        one * 2 / b / 1e3, error);
    fprintf(csv, "%d,%d,%s,%.3f,%.3f,%.3f,%.3e\n", s.n, s.k, name.c_str(), best, a, b, error);
    fflush(stdout);
    for (void* p : {(void*)tmp, (void*)x, (void*)y, (void*)ref, (void*)mag, (void*)ref32})
      cudaFree(p);
  }
  fclose(csv);
}

int main(int argc, char** argv) {
  setup_device();
  setup_dense();
  const std::string mode = argc > 1 ? argv[1] : "step";
  if (mode == "gemv") gemv(argv[2]);
  if (mode == "step") step(argv[2], argc > 3 ? atof(argv[3]) : 0);
  return 0;
}
