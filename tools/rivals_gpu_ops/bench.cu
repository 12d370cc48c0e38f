// One product of a decode step on a GPU: our kernels beside cuBLAS, cuBLASLt, cuSPARSELt, cuSPARSE
// and the public kernels (peers.h), in one process, taking turns.
//   bench LIBRARY OUT.csv SHAPES TS WHO [MASKS [COMMENT...]]
// LIBRARY: our liblacuna_cuda.so. SHAPES: digits, indices into kShapes. TS: e.g. 1,4,8,16,32,64.
// WHO: any of dense,ours,cusparselt,cusparse,macko,spinfer,flash_llm,sparse_marlin; "real": with
// masks of real pruning too, from the folder MASKS (real_masks.py), "real_peers": for the public
// kernels as well. COMMENT: lines of OUT.csv's head. Public kernels take part up to 64 tokens.
//
// Times are medians of CUDA graph replays (cuSPARSE: of launches in a stream), the weights of each
// contender rotated over more than 1 GB, plain nodes without overlap. The output of everyone is
// compared with the float32 product of the same weight before it is timed (where x is rounded to
// codes, of the rounded x); who is wrong or refuses isn't timed, and its row says why. build.sh
// says how to build it, tables.py makes docs/results/h200.md's tables of OUT.csv.
#include <cusparse.h>
#include <cusparseLt.h>
#include <dlfcn.h>

#include <chrono>
#include <ctime>
#include <fstream>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "cuda_linear_coded/codes.h"
#include "lacuna/kernels/gpu_abi.h"
#include "peers.h"

namespace lk = lacuna::kernels;

static const lk::GpuTable* library;
static cusparseHandle_t cs;
static cusparseLtHandle_t cslt;
static FILE* csv;
static std::string g_who;
static bool with(const char* who) {
  return ("," + g_who + ",").find(std::string(",") + who + ",") != std::string::npos;
}
static cudaError_t as_error(bool fine) { return fine ? cudaSuccess : cudaErrorUnknown; }
static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// ---------- clocks ----------
// The clock of the SMs while something runs, by NVML, which needs no build against it.
class Clock {
 public:
  Clock() {
    void* nvml = dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!nvml) return;
    const auto init = (int (*)())dlsym(nvml, "nvmlInit_v2");
    const auto handle = (int (*)(unsigned, void**))dlsym(nvml, "nvmlDeviceGetHandleByIndex_v2");
    const auto text = (int (*)(char*, unsigned))dlsym(nvml, "nvmlSystemGetDriverVersion");
    read_ = (int (*)(void*, int, unsigned*))dlsym(nvml, "nvmlDeviceGetClockInfo");
    if (!init || !handle || !text || !read_ || init() != 0 || handle(0, &device_) != 0) return;
    char version[96] = "";
    if (text(version, sizeof version) == 0) driver_ = version;
    thread_ = std::thread([this] {
      while (!ends_) {
        unsigned mhz = 0;
        constexpr int kSm = 1;
        if (read_(device_, kSm, &mhz) == 0) {
          const std::lock_guard<std::mutex> lock(mutex_);
          seen_.push_back(mhz);
        }
        std::this_thread::sleep_for(std::chrono::milliseconds(10));
      }
    });
  }
  Clock(const Clock&) = delete;
  ~Clock() {
    ends_ = true;
    if (thread_.joinable()) thread_.join();
  }
  void start() {
    const std::lock_guard<std::mutex> lock(mutex_);
    seen_.clear();
  }
  /// The median in MHz since start(), 0: unknown.
  unsigned median() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (seen_.empty()) return 0;
    std::sort(seen_.begin(), seen_.end());
    return seen_[seen_.size() / 2];
  }
  const std::string& driver() const { return driver_; }

 private:
  int (*read_)(void*, int, unsigned*) = nullptr;
  void* device_ = nullptr;
  std::string driver_ = "unknown";
  std::atomic<bool> ends_{false};
  std::mutex mutex_;
  vector<unsigned> seen_;
  std::thread thread_;
};
static std::unique_ptr<Clock> g_clock;

// ---------- weights ----------
// Each weight is kept with probability 1 - percent / 100; what is dropped is +0, whole blocks where
// `block` is more than 1.
__global__ void gen_weight(bf16* w, int n, int k, float scale, unsigned long long seed,
                           float percent, int block) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k;
       i += (size_t)gridDim.x * blockDim.x) {
    const size_t unit = block > 1 ? (i / k / block) * (k / block) + i % k / block : i;
    const float u = (float)(mix(mix(unit + 17) + seed * 0x1000003ull) >> 40) * 0x1p-24f;
    float v = normal(mix(i + seed * 0x5000011ull)) * scale;
    if (fabsf(v) < 1e-3f * scale) v = 1e-3f * scale;  // nothing that fp16 would lose
    w[i] = __float2bfloat16(u < percent * 0.01f ? 0.f : v);
  }
}
// Two random places of each group of four.
__global__ void gen_two_of_four(bf16* w, size_t groups, float scale, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < groups;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
    const int pair = pairs[h % 6];
    for (int j = 0; j < 4; ++j) w[4 * i + j] = __float2bfloat16(0.f);
    w[4 * i + (pair & 15)] = __float2bfloat16(normal(mix(h ^ 0x1111)) * scale);
    w[4 * i + (pair >> 4)] = __float2bfloat16(normal(mix(h ^ 0x2222)) * scale);
  }
}
__global__ void drop(bf16* w, size_t count, float percent) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    if ((float)(mix(mix(i + 17) + 7) >> 40) * 0x1p-24f < percent * 0.01f)
      w[i] = __float2bfloat16(0.f);
}
// Codes of 4 bits at two random places of each group of four, and what they stand for. Scales are
// powers of two, one for 128 columns, so that the product of both is exact in bf16 and in fp16.
constexpr int kInt4Group = 128, kOurInt4Group = 64;
__host__ __device__ inline float int4_scale(int row, int group) {
  return ldexpf(1.f, -6 - (row * 5 + group * 3) % 4);
}
__global__ void gen_int4(bf16* codes, bf16* w, int n, int k, unsigned long long seed) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k / 4;
       i += (size_t)gridDim.x * blockDim.x) {
    const unsigned long long h = mix(i + seed * 0x1000003ull);
    const int pairs[6] = {0x10, 0x20, 0x30, 0x21, 0x31, 0x32};
    const int pair = pairs[h % 6];
    const float scale = int4_scale(4 * i / k, 4 * i % k / kInt4Group);
    for (int j = 0; j < 4; ++j) {
      const bool kept = j == (pair & 15) || j == pair >> 4;
      const float code = kept ? int(mix(h ^ (0x1111 * (j + 1))) >> 20 & 15) - 8 : 0;
      codes[4 * i + j] = __float2bfloat16(code);
      w[4 * i + j] = __float2bfloat16(code * scale);
    }
  }
}
__global__ void gen_int4_scales(bf16* s, int n, int groups, int columns) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * groups;
       i += (size_t)gridDim.x * blockDim.x)
    s[i] = __float2bfloat16(int4_scale(i / groups, i % groups * columns / kInt4Group));
}
// A mask of bits, row by row, laid out side by side over W.
__global__ void apply_mask(bf16* w, int n, int k, const unsigned char* bits, int rows,
                           int columns) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * k;
       i += (size_t)gridDim.x * blockDim.x) {
    const size_t at = i / k % rows * columns + i % k % columns;
    if ((bits[at / 8] >> (7 - at % 8) & 1) == 0) w[i] = __float2bfloat16(0.f);
  }
}
__global__ void count_zeros(const bf16* w, size_t count, unsigned long long* zeros) {
  unsigned long long mine = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    mine += __bfloat162float(w[i]) == 0.f;
  atomicAdd(zeros, mine);
}
__global__ void tenths(bf16* x, size_t count) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    x[i] = __float2bfloat16(rintf(__bfloat162float(x[i]) * 0.1f));
}
__global__ void transpose(const bf16* x, bf16* out, int t, int k) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)t * k;
       i += (size_t)gridDim.x * blockDim.x)
    out[(i % k) * t + i / k] = x[i];
}
// @param tokens  their scales, or null
__global__ void scale_float_rows(const float* from, float* to, int n, size_t count,
                                 const float* tokens) {
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < count;
       i += (size_t)gridDim.x * blockDim.x)
    to[i] = from[i] * scale_of(i % n) * (tokens ? tokens[i / n] : 1.f);
}
// x rounded by the rule of kernels/quantize_token, a block a token: codes as numbers.
__global__ void round_reference(const bf16* x, bf16* codes, float* scales, int k, bool fp8) {
  __shared__ float most[256];
  const bf16* row = x + (size_t)blockIdx.x * k;
  float largest = 0;
  for (int i = threadIdx.x; i < k; i += 256) largest = fmaxf(largest, fabsf((float)row[i]));
  most[threadIdx.x] = largest;
  __syncthreads();
  for (int d = 128; d; d /= 2) {
    if (threadIdx.x < d) most[threadIdx.x] = fmaxf(most[threadIdx.x], most[threadIdx.x + d]);
    __syncthreads();
  }
  const float scale = fmaxf(most[0] / (fp8 ? 448.f : 127.f), 0x1p-126f), inverse = 1.f / scale;
  if (threadIdx.x == 0) scales[blockIdx.x] = scale;
  for (int i = threadIdx.x; i < k; i += 256) {
    const float v = (float)row[i] * inverse;
    codes[(size_t)blockIdx.x * k + i] = __float2bfloat16(fp8 ? float(__nv_fp8_e4m3(v)) : rintf(v));
  }
}
// y [t,n], or [n,t] where `by_row`.
template <class Y>
__global__ void differences(const Y* y, const float* ref, int n, int t, bool by_row, double* sums) {
  double d = 0, r = 0;
  for (size_t i = blockIdx.x * (size_t)blockDim.x + threadIdx.x; i < (size_t)n * t;
       i += (size_t)gridDim.x * blockDim.x) {
    const double want = ref[i], got = (float)y[by_row ? (i % n) * t + i / n : i];
    d += got == got ? (got - want) * (got - want) : 1e30;
    r += want * want;
  }
  atomicAdd(sums, d);
  atomicAdd(sums + 1, r);
}

// ---------- what is timed ----------
// Enough copies of one packed weight that no cache serves them.
struct Copies {
  char* base = nullptr;
  size_t stride = 0;
  int count = 0;
  Copies() = default;
  Copies(size_t bytes) : stride((bytes + 255) / 256 * 256) {
    count = (int)std::max<size_t>(3, (size_t)(1.05e9 / bytes) + 1);
    CK(cudaMalloc(&base, stride * count));
  }
  Copies(const Copies&) = delete;
  ~Copies() { cudaFree(base); }
  char* at(int i) const { return base + (size_t)i * stride; }
  void repeat_first() const {
    for (int i = 1; i < count; i++)
      CK(cudaMemcpyAsync(at(i), base, stride, cudaMemcpyDeviceToDevice, st));
  }
};
using CopiesPtr = std::shared_ptr<Copies>;

enum class Out { kBf16, kHalf, kInt, kFloat };
struct Contender {
  std::string who, pattern, values;
  double sparsity, bytes;  // that one product reads of the weight
  Launch run;
  int copies;
  Out out = Out::kBf16;
  bool by_row = false, in_stream = false;
  std::string note;
  double error = -1;
  std::unique_ptr<Graph> graph = std::make_unique<Graph>();
};

static bf16 *d_x, *d_xt, *d_xr;  // xr: rounded, codes as numbers
static half* d_xh;
static void *d_x8[2], *d_y, *d_split;
static float *d_ref, *d_scaled, *d_rounded, *d_token_scales;
static double* d_sums;
static int g_max_t;
constexpr int kManyTokens = 128, kMeasurements = 5;
constexpr double kTargetUs = 1500;

static double error_of(const Contender& c, const float* ref, int n, int t) {
  CK(cudaMemsetAsync(d_sums, 0, 16, st));
  if (c.out == Out::kBf16)
    differences<<<512, 256, 0, st>>>((bf16*)d_y, ref, n, t, c.by_row, d_sums);
  if (c.out == Out::kHalf)
    differences<<<512, 256, 0, st>>>((half*)d_y, ref, n, t, c.by_row, d_sums);
  if (c.out == Out::kFloat)
    differences<<<512, 256, 0, st>>>((float*)d_y, ref, n, t, c.by_row, d_sums);
  if (c.out == Out::kInt) differences<<<512, 256, 0, st>>>((int*)d_y, ref, n, t, c.by_row, d_sums);
  double sums[2];
  CK(cudaMemcpyAsync(sums, d_sums, 16, cudaMemcpyDeviceToHost, st));
  CK(cudaStreamSynchronize(st));
  return sqrt(sums[0] / sums[1]);
}
// Runs it on a poisoned output and on another copy than the first. What is wrong with it, or "".
static std::string fault(Contender& c, const float* ref, int n, int t) {
  CK(cudaMemsetAsync(d_y, 0xff, (size_t)n * std::max(t, 16) * 4, st));
  const cudaError_t e = c.run(c.copies - 1);
  if (e != cudaSuccess) {
    cudaGetLastError();
    return e == cudaErrorUnknown ? "refused by the library"
                                 : std::string("refused: ") + cudaGetErrorString(e);
  }
  c.error = error_of(c, ref, n, t);
  if (c.error < 1e-2) return "";
  char text[64];
  snprintf(text, sizeof text, "wrong: relative error %.2g", c.error);
  return text;
}
// As capture() of cuda_harness.h, but where a product is long not through all copies.
static Graph record(const Launch& f, int copies, double guess_us) {
  if (guess_us < 150) return capture(f, copies, guess_us, kTargetUs);
  return capture_products(f, copies,
                          std::max(3, std::min(copies, (int)(2 * kTargetUs / guess_us))));
}
static double in_stream_us(const Contender& c) {
  float ms;
  CK(cudaEventRecord(e0, st));
  for (int i = 0; i < c.copies; i++) c.run(i);
  CK(cudaEventRecord(e1, st));
  CK(cudaEventSynchronize(e1));
  CK(cudaEventElapsedTime(&ms, e0, e1));
  return ms * 1e3 / c.copies;
}

// ---------- one weight ----------
enum class Kind { kBf16, kFp8, kInt8, kInt4 };
static const char* kKindNames[] = {"bf16", "fp8", "int8", "int4"};
// By the end of a kernel's name.
static Kind kind_of(const std::string& name) {
  for (Kind kind : {Kind::kFp8, Kind::kInt8, Kind::kInt4}) {
    const std::string end = std::string("_") + kKindNames[(int)kind];
    if (name.size() > end.size() && name.substr(name.size() - end.size()) == end) return kind;
  }
  return Kind::kBf16;
}
static std::string g_masks;

struct Structured;
struct Weight {
  std::string pattern;  // dense, 2:4, unstructured, block64x64; of real masks real, real-2:4
  Kind kind;
  int percent, n, k;
  bf16* dense;            // codes of 8 bits as numbers; of 4 bits what they stand for
  bf16* codes = nullptr;  // of 4 bits
  bf16* scales = nullptr;
  std::string note;
  struct Ours {
    const lk::GpuLinearKernel* kernel;
    lk::GpuLayout layout;
    CopiesPtr copies;
  };
  vector<Ours> ours;
  struct Foreign {
    const rivals::Peer* peer;
    vector<size_t> offsets;
    size_t bytes;
    CopiesPtr copies;
    std::map<int, std::pair<int, std::string>> splits;  // of padded tokens: the best, a remark
    std::string refused;
  };
  vector<Foreign> peers;
  CopiesPtr plain;                                              // W as it is, or its codes in bytes
  CopiesPtr structured;                                         // cuSPARSELt's
  std::map<int, std::shared_ptr<Structured>> structured_plans;  // of padded tokens
  vector<cusparseSpMatDescr_t> csr;
  CopiesPtr csr_copies;
  size_t csr_bytes = 0;

  Weight(const std::string& p, Kind kd, int pc, Shape s)
      : pattern(p), kind(kd), percent(pc), n(s.n), k(s.k) {
    const size_t count = (size_t)n * k;
    CK(cudaMalloc(&dense, count * 2));
    const float scale = 1.f / sqrtf(k * (1 - percent * 0.01f));
    const bool real = pattern.rfind("real", 0) == 0;
    if (kind == Kind::kInt4) {
      CK(cudaMalloc(&codes, count * 2));
      CK(cudaMalloc(&scales, count / kOurInt4Group * 2));
      gen_int4<<<2048, 256, 0, st>>>(codes, dense, n, k, 77);
      gen_int4_scales<<<512, 256, 0, st>>>(scales, n, k / kOurInt4Group, kOurInt4Group);
    } else if (kind != Kind::kBf16) {
      gen_codes<<<2048, 256, 0, st>>>(dense, count / 4, 77, pattern == "2:4", kind == Kind::kFp8);
      if (pattern == "unstructured") drop<<<2048, 256, 0, st>>>(dense, count, percent);
      CK(cudaMalloc(&scales, n * 2));
      gen_scales<<<64, 256, 0, st>>>(scales, n);
    } else if (pattern == "2:4") {
      gen_two_of_four<<<2048, 256, 0, st>>>(dense, count / 4, scale, 77);
    } else {
      gen_weight<<<2048, 256, 0, st>>>(dense, n, k, scale, 77, real ? 0 : percent,
                                       pattern == "block64x64" ? 64 : 1);
    }
    if (real) drop_by_mask();
    if (with("ours")) pack_ours();
    if (pattern == "dense" && with("dense")) pack_plain();
    if (kind == Kind::kBf16 && form() == "unstructured" && (!real || with("real_peers"))) {
      pack_peers();
      if (with("cusparse") && !real && (percent == 50 || percent == 80)) pack_csr();
    }
    if (kind == Kind::kInt4 && with("sparse_marlin")) pack_sparse_marlin();
  }
  Weight(const Weight&) = delete;
  ~Weight() {
    for (auto& m : csr) cusparseDestroySpMat(m);
    cudaFree(dense);
    cudaFree(codes);
    cudaFree(scales);
  }
  std::string form() const {
    return pattern == "real" ? "unstructured" : pattern == "real-2:4" ? "2:4" : pattern;
  }
  bool codes_of_8_bits() const { return kind == Kind::kFp8 || kind == Kind::kInt8; }

  // The mask of the pruned matrix whose place in a block this shape has.
  void drop_by_mask() {
    const std::string matrix = k > n       ? "down_proj"
                               : n <= 6144 ? "q_proj"
                                           : "gate_proj",
                      file = g_masks + "/" + matrix + "-" +
                             (pattern == "real" ? std::to_string(percent) : "2of4") + ".mask";
    std::ifstream in(file, std::ios::binary);
    int rows = 0, columns = 0;
    if (in) in >> rows >> columns;
    in.get();  // the end of the line
    vector<char> bits(((size_t)rows * columns + 7) / 8);
    if (!in.read(bits.data(), bits.size()) || bits.empty()) {
      printf("no mask in %s\n", file.c_str());
      exit(2);
    }
    Buffer<char> on_device(bits);
    Buffer<unsigned long long> zeros(vector<unsigned long long>{0});
    apply_mask<<<2048, 256, 0, st>>>(dense, n, k, (unsigned char*)on_device.p, rows, columns);
    count_zeros<<<512, 256, 0, st>>>(dense, (size_t)n * k, zeros.p);
    CK(cudaStreamSynchronize(st));
    char text[96];
    snprintf(text, sizeof text, "%s; %.4f zeros", matrix.c_str(),
             zeros.read()[0] / ((double)n * k));
    note = text;
  }
  void pack_ours() {
    const char* operation = form() == "dense"          ? "linear_dense"
                            : form() == "2:4"          ? "linear_nm"
                            : form() == "unstructured" ? "linear_bitmap"
                                                       : "linear_bsr";
    const bf16* from = codes ? codes : dense;
    for (int i = 0; i < library->linear_count; i++) {
      const lk::GpuLinearKernel* kernel = library->linear[i];
      if (std::string(kernel->operation) != operation || kind_of(kernel->name) != kind) continue;
      if (std::string(kernel->name).ends_with("_f16")) continue;  // as their bf16 twins
      Ours o{kernel, {}, nullptr};
      void *scratch, *report;
      CK(cudaMalloc(&scratch, kernel->scratch_bytes(n, k) + 16));
      CK(cudaMalloc(&report, sizeof(lk::GpuPackReport)));
      CK((cudaError_t)kernel->measure(from, n, k, scratch, &o.layout, st));
      o.copies = std::make_shared<Copies>(o.layout.packed_bytes > 0 ? o.layout.packed_bytes
                                                                    : (size_t)n * k * 2);
      if (o.layout.packed_bytes > 0) {
        CK(cudaMemsetAsync(report, 0, sizeof(lk::GpuPackReport), st));
        CK((cudaError_t)kernel->pack(&o.layout, from, scratch, o.copies->base,
                                     (lk::GpuPackReport*)report, st));
        if (scales) CK((cudaError_t)kernel->pack_scales(&o.layout, scales, o.copies->base, st));
      } else {
        CK(cudaMemcpyAsync(o.copies->base, dense, (size_t)n * k * 2, cudaMemcpyDeviceToDevice, st));
      }
      o.copies->repeat_first();
      CK(cudaStreamSynchronize(st));
      cudaFree(scratch);
      cudaFree(report);
      ours.push_back(std::move(o));
    }
  }
  void to_bytes(void* to) const {
    const size_t count = (size_t)n * k;
    if (kind == Kind::kFp8) convert<<<2048, 256, 0, st>>>(dense, (__nv_fp8_e4m3*)to, count);
    if (kind == Kind::kInt8) convert<<<2048, 256, 0, st>>>(dense, (signed char*)to, count);
    if (kind == Kind::kBf16)
      CK(cudaMemcpyAsync(to, dense, count * 2, cudaMemcpyDeviceToDevice, st));
  }
  size_t plain_bytes() const { return (size_t)n * k * (kind == Kind::kBf16 ? 2 : 1); }
  void pack_plain() {
    plain = std::make_shared<Copies>(plain_bytes());
    to_bytes(plain->base);
    plain->repeat_first();
  }
  void pack_peers() {
    const rivals::Peer* all[] = {&rivals::kMacko, &rivals::kSpInfer, &rivals::kFlashLlm};
    vector<half> host;
    for (const rivals::Peer* peer : all) {
      if (!with(peer->name)) continue;
      if (host.empty()) {
        half* on_device;
        CK(cudaMalloc(&on_device, (size_t)n * k * 2));
        convert<<<2048, 256, 0, st>>>(dense, on_device, (size_t)n * k);
        host.resize((size_t)n * k);
        CK(cudaStreamSynchronize(st));
        CK(cudaMemcpy(host.data(), on_device, host.size() * 2, cudaMemcpyDeviceToHost));
        cudaFree(on_device);
      }
      add_peer(peer, peer->pack(host.data(), n, k));
    }
    CK(cudaStreamSynchronize(st));
  }
  void add_peer(const rivals::Peer* peer, const rivals::Form& packed) {
    Foreign f{peer, {}, packed.bytes, nullptr, {}, packed.refused};
    if (!f.refused.empty()) {
      peers.push_back(std::move(f));
      return;
    }
    size_t all_bytes = 0;
    for (const auto& part : packed.parts) {
      f.offsets.push_back(all_bytes);
      all_bytes += (part.size() + 255) / 256 * 256;
    }
    f.copies = std::make_shared<Copies>(all_bytes);
    for (size_t i = 0; i < packed.parts.size(); i++)
      CK(cudaMemcpy(f.copies->base + f.offsets[i], packed.parts[i].data(), packed.parts[i].size(),
                    cudaMemcpyHostToDevice));
    f.copies->repeat_first();
    peers.push_back(std::move(f));
  }
  void pack_sparse_marlin() {
    Buffer<signed char> bytes((size_t)n * k);
    convert<<<2048, 256, 0, st>>>(codes, bytes.p, (size_t)n * k);
    CK(cudaStreamSynchronize(st));
    const int groups = k / kInt4Group;
    vector<float> group_scales((size_t)groups * n);
    for (int g = 0; g < groups; g++)
      for (int r = 0; r < n; r++) group_scales[(size_t)g * n + r] = int4_scale(r, g);
    add_peer(&rivals::kSparseMarlin,
             rivals::pack_sparse_marlin(bytes.read().data(), group_scales.data(), n, k));
    CK(cudaStreamSynchronize(st));
  }
  void pack_csr() {
    cusparseDnMatDescr_t from;
    cusparseSpMatDescr_t to;
    void *rows, *buffer;
    size_t need = 0;
    int64_t r, c, count;
    CK(cudaMalloc(&rows, (size_t)(n + 1) * 4));
    CB(cusparseCreateDnMat(&from, n, k, k, dense, CUDA_R_16BF, CUSPARSE_ORDER_ROW));
    CB(cusparseCreateCsr(&to, n, k, 0, rows, nullptr, nullptr, CUSPARSE_INDEX_32I,
                         CUSPARSE_INDEX_32I, CUSPARSE_INDEX_BASE_ZERO, CUDA_R_16BF));
    CB(cusparseDenseToSparse_bufferSize(cs, from, to, CUSPARSE_DENSETOSPARSE_ALG_DEFAULT, &need));
    CK(cudaMalloc(&buffer, need + 16));
    CB(cusparseDenseToSparse_analysis(cs, from, to, CUSPARSE_DENSETOSPARSE_ALG_DEFAULT, buffer));
    CB(cusparseSpMatGetSize(to, &r, &c, &count));
    const size_t row_bytes = ((size_t)(n + 1) * 4 + 255) / 256 * 256,
                 column_bytes = ((size_t)count * 4 + 255) / 256 * 256;
    csr_bytes = (size_t)(n + 1) * 4 + (size_t)count * 6;
    csr_copies = std::make_shared<Copies>(row_bytes + column_bytes + (size_t)count * 2);
    char* base = csr_copies->base;
    CB(cusparseCsrSetPointers(to, rows, base + row_bytes, base + row_bytes + column_bytes));
    CB(cusparseDenseToSparse_convert(cs, from, to, CUSPARSE_DENSETOSPARSE_ALG_DEFAULT, buffer));
    CK(cudaMemcpyAsync(base, rows, (size_t)(n + 1) * 4, cudaMemcpyDeviceToDevice, st));
    csr_copies->repeat_first();
    CK(cudaStreamSynchronize(st));
    for (int i = 0; i < csr_copies->count; i++) {
      char* p = csr_copies->at(i);
      cusparseSpMatDescr_t m;
      CB(cusparseCreateCsr(&m, n, k, count, p, p + row_bytes, p + row_bytes + column_bytes,
                           CUSPARSE_INDEX_32I, CUSPARSE_INDEX_32I, CUSPARSE_INDEX_BASE_ZERO,
                           CUDA_R_16BF));
      csr.push_back(m);
    }
    cusparseDestroySpMat(to);
    cusparseDestroyDnMat(from);
    cudaFree(rows);
    cudaFree(buffer);
  }
  Contender contender(const std::string& who, double bytes, Launch run, int copies,
                      const std::string& remark = "") const {
    Contender c;
    c.who = who;
    c.pattern = pattern;
    c.values = kKindNames[(int)kind];
    c.sparsity = percent * 0.01;
    c.bytes = bytes;
    c.run = std::move(run);
    c.copies = copies;
    c.note = note.empty() || remark.empty() ? note + remark : note + "; " + remark;
    return c;
  }
};
using WeightPtr = std::unique_ptr<Weight>;

// ---------- cuSPARSELt ----------
struct Structured {
  cusparseLtMatDescriptor_t w, x, y;
  cusparseLtMatmulDescriptor_t op;
  cusparseLtMatmulAlgSelection_t selection;
  cusparseLtMatmulPlan_t plan;
  size_t bytes = 0, buffer = 0, need = 0;
  std::string refused;  // at which step and why
  Structured(Kind kind, int n, int k, int t) {
    const cudaDataType in = kind == Kind::kBf16  ? CUDA_R_16BF
                            : kind == Kind::kFp8 ? CUDA_R_8F_E4M3
                                                 : CUDA_R_8I,
                       out = kind == Kind::kInt8 ? CUDA_R_32I : CUDA_R_16BF;
    const auto sums = kind == Kind::kInt8 ? CUSPARSE_COMPUTE_32I : CUSPARSE_COMPUTE_32F;
    step("descriptor of W", [&] {
      return cusparseLtStructuredDescriptorInit(&cslt, &w, n, k, k, 16, in, CUSPARSE_ORDER_ROW,
                                                CUSPARSELT_SPARSITY_50_PERCENT);
    });
    step("descriptor of x", [&] {
      return cusparseLtDenseDescriptorInit(&cslt, &x, t, k, k, 16, in, CUSPARSE_ORDER_ROW);
    });
    step("descriptor of y", [&] {
      return cusparseLtDenseDescriptorInit(&cslt, &y, n, t, n, 16, out, CUSPARSE_ORDER_COL);
    });
    step("descriptor", [&] {
      return cusparseLtMatmulDescriptorInit(&cslt, &op, CUSPARSE_OPERATION_NON_TRANSPOSE,
                                            CUSPARSE_OPERATION_TRANSPOSE, &w, &x, &y, &y, sums);
    });
    step("algorithm", [&] {
      return cusparseLtMatmulAlgSelectionInit(&cslt, &selection, &op,
                                              CUSPARSELT_MATMUL_ALG_DEFAULT);
    });
    step("plan", [&] { return cusparseLtMatmulPlanInit(&cslt, &plan, &op, &selection); });
    step("size", [&] { return cusparseLtSpMMACompressedSize(&cslt, &plan, &bytes, &buffer); });
  }
  template <class F>
  void step(const char* name, F f) {
    if (!refused.empty()) return;
    const cusparseStatus_t e = f();
    if (e != 0) refused = std::string("refused: ") + name + ": " + cusparseLtGetErrorString(e);
  }
  void search(const void* packed, const void* from) {
    const float one = 1, zero = 0;
    step("search", [&] {
      return cusparseLtMatmulSearch(&cslt, &plan, &one, packed, from, &zero, d_y, d_y, d_ws, &st,
                                    1);
    });
    step("workspace", [&] { return cusparseLtMatmulGetWorkspace(&cslt, &plan, &need); });
    if (refused.empty() && need > kWs) refused = "refused: wants more workspace";
  }
  cudaError_t run(const void* packed, const void* from) {
    const float one = 1, zero = 0;
    return as_error(
        cusparseLtMatmul(&cslt, &plan, &one, packed, from, &zero, d_y, d_y, d_ws, &st, 1) == 0);
  }
};

// ---------- who takes part in one number of tokens ----------
// A row without a time, and why.
static void row(const Contender& c, int n, int k, int t, const std::string& why) {
  printf("  %s %s %s %d%% T=%d: %s\n", c.who.c_str(), c.values.c_str(), c.pattern.c_str(),
         int(c.sparsity * 100 + 0.5), t, why.c_str());
  fprintf(csv, "%d,%d,%d,%s,%s,%.2f,%s,,,,%.0f,%.3g,,%s%s%s\n", n, k, t, c.values.c_str(),
          c.pattern.c_str(), c.sparsity, c.who.c_str(), c.bytes, c.error, why.c_str(),
          c.note.empty() ? "" : "; ", c.note.c_str());
}
using All = vector<Contender>;
static void add(All& all, Contender c, const float* ref, int n, int k, int t) {
  const std::string why = fault(c, ref, n, t);
  if (why.empty())
    all.push_back(std::move(c));
  else
    row(c, n, k, t, why);
}

// As a model reads a prompt: codes of W and of x, cuBLASLt's product of both, its first answer that
// is there. fp8: scales in the product, int8: after it.
struct CodesProduct {
  const Weight& w;
  const Weight::Ours& ours;
  const bool fp8;
  const int t;
  Buffer<unsigned char> codes, x;
  Buffer<float> x_scales, row_scales;
  Buffer<int> sums;
  cublasLtMatmulDesc_t op;
  cublasLtMatrixLayout_t la, lb, lc;
  cublasLtMatmulHeuristicResult_t heuristic;
  int found = 0;
  CodesProduct(const Weight& weight, const Weight::Ours& o, int tokens)
      : w(weight),
        ours(o),
        fp8(weight.kind == Kind::kFp8),
        t(tokens),
        codes((size_t)w.n * w.k),
        x((size_t)t * w.k),
        x_scales(t),
        row_scales(w.n),
        sums(fp8 ? 1 : (size_t)t * w.n) {
    vector<float> scale(w.n);
    for (int i = 0; i < w.n; i++) scale[i] = scale_of(i);
    CK(cudaMemcpy(row_scales.p, scale.data(), (size_t)w.n * 4, cudaMemcpyHostToDevice));
    const cudaDataType in = fp8 ? CUDA_R_8F_E4M3 : CUDA_R_8I, out = fp8 ? CUDA_R_16BF : CUDA_R_32I;
    const cublasOperation_t tr = CUBLAS_OP_T;
    CB(cublasLtMatmulDescCreate(&op, fp8 ? CUBLAS_COMPUTE_32F : CUBLAS_COMPUTE_32I,
                                fp8 ? CUDA_R_32F : CUDA_R_32I));
    CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_TRANSA, &tr, sizeof tr));
    if (fp8) {
      const int8_t fast = 1;
      const int mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
      CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_FAST_ACCUM, &fast, sizeof fast));
      for (auto a : {CUBLASLT_MATMUL_DESC_A_SCALE_MODE, CUBLASLT_MATMUL_DESC_B_SCALE_MODE})
        CB(cublasLtMatmulDescSetAttribute(op, a, &mode, sizeof mode));
      CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, &row_scales.p,
                                        sizeof row_scales.p));
      CB(cublasLtMatmulDescSetAttribute(op, CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, &x_scales.p,
                                        sizeof x_scales.p));
    }
    CB(cublasLtMatrixLayoutCreate(&la, in, w.k, w.n, w.k));
    CB(cublasLtMatrixLayoutCreate(&lb, in, w.k, t, w.k));
    CB(cublasLtMatrixLayoutCreate(&lc, out, w.n, t, w.n));
    cublasLtMatmulPreference_t pref;
    CB(cublasLtMatmulPreferenceCreate(&pref));
    CB(cublasLtMatmulPreferenceSetAttribute(pref, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &kWs,
                                            sizeof kWs));
    cublasLtMatmulAlgoGetHeuristic(lt, op, la, lb, lc, lc, pref, 1, &heuristic, &found);
    cublasLtMatmulPreferenceDestroy(pref);
  }
  CodesProduct(const CodesProduct&) = delete;
  ~CodesProduct() {
    cublasLtMatrixLayoutDestroy(la);
    cublasLtMatrixLayoutDestroy(lb);
    cublasLtMatrixLayoutDestroy(lc);
    cublasLtMatmulDescDestroy(op);
  }
  cudaError_t run(int i) {
    if (found == 0) return cudaErrorUnknown;
    const lk::GpuRounding rounding = {t, w.k, fp8, d_x, x.p, x_scales.p};
    int e = ours.kernel->unpack_codes(&ours.layout, ours.copies->at(i), codes.p, st);
    if (e == 0) e = library->round_tokens(&rounding, st);
    if (e != 0) return (cudaError_t)e;
    const float onef = 1, zerof = 0;
    const int onei = 1, zeroi = 0;
    void* y = fp8 ? d_y : sums.p;
    if (cublasLtMatmul(lt, op, fp8 ? (const void*)&onef : &onei, codes.p, la, x.p, lb,
                       fp8 ? (const void*)&zerof : &zeroi, y, lc, y, lc, &heuristic.algo, d_ws, kWs,
                       st) != CUBLAS_STATUS_SUCCESS)
      return cudaErrorUnknown;
    if (fp8) return cudaSuccess;
    const lk::GpuScaling scaling = {t, w.n, sums.p, x_scales.p, row_scales.p, d_y};
    return (cudaError_t)library->scale_sums(&scaling, st);
  }
};
static void add_ours(All& all, const Weight& w, int t) {
  const float* ref = w.codes_of_8_bits() ? d_scaled : d_ref;
  bool taken = false;
  float* rounded = nullptr;
  const auto rounded_reference = [&] {
    if (rounded) return rounded;
    round_reference<<<t, 256, 0, st>>>(d_x, d_xr, d_token_scales, w.k, w.kind == Kind::kFp8);
    CB(gemm_ex(w.dense, d_xr, d_rounded, CUDA_R_32F, w.n, w.k, t));
    scale_float_rows<<<512, 256, 0, st>>>(d_rounded, d_rounded, w.n, (size_t)w.n * t,
                                          d_token_scales);
    return rounded = d_rounded;
  };
  const auto bytes_of = [&](const Weight::Ours& o) {
    return o.layout.packed_bytes > 0 ? o.layout.packed_bytes : (double)w.n * w.k * 2;
  };
  const auto name_of = [](const Weight::Ours& o) {
    return std::string(o.kernel->operation) + ":" + o.kernel->name;
  };
  for (const Weight::Ours& o : w.ours) {
    const lk::GpuLayout& layout = o.layout;
    const int64_t few = o.kernel->max_tokens(&layout), many = o.kernel->many_tokens(&layout);
    const int64_t from = o.kernel->rounded_from ? o.kernel->rounded_from(&layout) : 0;
    const auto planned = [&](auto make, const std::string& name, const float* want) {
      auto plan = std::make_shared<lk::GpuPlan>();
      if (const int e = make(&layout, t, plan.get()); e != 0) {
        row(w.contender(name, bytes_of(o), {}, 1), w.n, w.k, t,
            std::string("refused: no plan: ") + library->error_text(e));
        return;
      }
      auto workspace =
          std::make_shared<Buffer<char>>(o.kernel->workspace_bytes(&layout, plan.get()) + 16);
      add(all,
          w.contender(
              name, bytes_of(o),
              [&w, &o, plan, workspace](int i) {
                return (cudaError_t)o.kernel->run(&o.layout, plan.get(), o.copies->at(i), d_x, d_y,
                                                  workspace->p, 0, st);
              },
              o.copies->count),
          want, w.n, w.k, t);
    };
    if (t <= few || (many > 0 && t >= many)) {
      taken = true;
      planned(o.kernel->plan, name_of(o), ref);
    }
    if (from > 0 && t >= from)
      planned(o.kernel->plan_rounded, name_of(o) + " rounded", rounded_reference());
  }
  if (taken || w.pattern == "dense") return;
  static std::shared_ptr<Buffer<bf16>> scratch;
  if (!scratch || scratch->n < (size_t)w.n * w.k)
    scratch = std::make_shared<Buffer<bf16>>((size_t)w.n * w.k);
  auto held = scratch;
  for (const Weight::Ours& o : w.ours) {
    // As a model runs it: expanded into a scratch, then the dense product.
    add(all,
        w.contender(
            name_of(o) + " expanded", bytes_of(o),
            [&w, &o, held, t](int i) {
              const int e = o.kernel->unpack(&o.layout, o.copies->at(i), held->p, st);
              return e != 0 ? (cudaError_t)e
                            : as_error(gemm_ex(held->p, d_x, d_y, CUDA_R_16BF, w.n, w.k, t) == 0);
            },
            o.copies->count),
        ref, w.n, w.k, t);
    if (!o.kernel->unpack_codes) continue;
    auto product = std::make_shared<CodesProduct>(w, o, t);
    add(all,
        w.contender(
            name_of(o) + " codes", bytes_of(o), [product](int i) { return product->run(i); },
            o.copies->count),
        rounded_reference(), w.n, w.k, t);
  }
}
static void add_dense(All& all, const Weight& w, int t) {
  vector<Rival> rivals;
  if (w.kind == Kind::kBf16) {
    vector<bf16*> copies;
    for (int i = 0; i < w.plain->count; i++) copies.push_back((bf16*)w.plain->at(i));
    rivals = dense_rivals(copies, d_x, (bf16*)d_y, d_ref, w.n, w.k, t);
  } else {
    vector<void*> copies;
    for (int i = 0; i < w.plain->count; i++) copies.push_back(w.plain->at(i));
    rivals = lt_rivals(w.kind == Kind::kFp8, copies, d_x8[w.kind == Kind::kInt8], d_y, d_ref, w.n,
                       w.k, t);
  }
  bool lt_found = false;
  for (Rival& r : rivals) {  // those were compared there
    const bool ex = r.name == "GemmEx";
    lt_found = lt_found || !ex;
    Contender c =
        w.contender(ex ? "cublas" : "cublaslt", w.plain_bytes(), {}, w.plain->count, r.name);
    c.graph = std::make_unique<Graph>(std::move(r.graph));
    all.push_back(std::move(c));
  }
  if (!lt_found)
    row(w.contender("cublaslt", w.plain_bytes(), {}, 1), w.n, w.k, t,
        "refused or wrong: every heuristic answer");
}
static void add_structured(All& all, Weight& w, int t) {
  const int step = w.kind == Kind::kBf16 ? 8 : 16, padded = (t + step - 1) / step * step;
  const void* x = w.kind == Kind::kBf16 ? (void*)d_x : d_x8[w.kind == Kind::kInt8];
  auto& s = w.structured_plans[padded];
  if (!s) {
    s = std::make_shared<Structured>(w.kind, w.n, w.k, padded);
    if (s->refused.empty() && !w.structured) {
      Buffer<char> bytes(w.plain_bytes()), scratch(s->buffer + 16);
      w.to_bytes(bytes.p);
      w.structured = std::make_shared<Copies>(s->bytes);
      s->step("compress", [&] {
        return cusparseLtSpMMACompress(&cslt, &s->plan, bytes.p, w.structured->base, scratch.p, st);
      });
      w.structured->repeat_first();
      CK(cudaStreamSynchronize(st));
    }
    if (s->refused.empty()) s->search(w.structured->base, x);
  }
  const std::string remark = "searched; padded to " + std::to_string(padded);
  if (!s->refused.empty()) {
    row(w.contender("cusparselt", s->bytes, {}, 1, remark), w.n, w.k, t, s->refused);
    return;
  }
  Contender c = w.contender(
      "cusparselt", s->bytes, [&w, s, x](int i) { return s->run(w.structured->at(i), x); },
      w.structured->count, remark);
  if (w.kind == Kind::kInt8) c.out = Out::kInt;
  add(all, std::move(c), d_ref, w.n, w.k, t);
}
static void add_peers(All& all, Weight& w, int t) {
  for (Weight::Foreign& f : w.peers) {
    if (!f.refused.empty()) {
      row(w.contender(f.peer->name, f.bytes, {}, 1), w.n, w.k, t, "refused: " + f.refused);
      continue;
    }
    if (t > f.peer->most) {
      if (f.peer->most == 1)
        row(w.contender(f.peer->name, f.bytes, {}, 1), w.n, w.k, t, "takes one token only");
      continue;
    }
    const int padded = (t + f.peer->tokens - 1) / f.peer->tokens * f.peer->tokens;
    const auto made = [&w, &f, padded](const rivals::Peer* peer, int split,
                                       const std::string& remark) {
      Contender c = w.contender(
          peer->name, f.bytes,
          [&w, &f, padded, peer, split](int i) {
            char* parts[8];
            for (size_t p = 0; p < f.offsets.size(); p++) parts[p] = f.copies->at(i) + f.offsets[p];
            return peer->run(st, parts, d_xh, (half*)d_y, w.n, w.k, padded, split, d_split);
          },
          f.copies->count, remark);
      c.out = Out::kHalf;
      return c;
    };
    if (!f.peer->splits) {
      add(all, made(f.peer, 1, "as published"), d_ref, w.n, w.k, t);
      if (f.peer == &rivals::kMacko)
        for (const rivals::Peer* p :
             {&rivals::kMackoRows4, &rivals::kMackoRows8, &rivals::kMackoRows16})
          add(all, made(p, 1, "fewer rows a block"), d_ref, w.n, w.k, t);
      continue;
    }
    if (f.splits.count(padded) == 0) {
      double least = 1e30;
      int best = 0, wrong = 0, tried = 0;
      for (int split : {1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16}) {
        const int tiles = w.k / 64, each = (tiles - 1) / split + 1;
        if (each * split - tiles >= each) continue;
        Contender c = made(f.peer, split, "");
        tried++;
        if (!fault(c, d_ref, w.n, t).empty()) {
          wrong++;
          continue;
        }
        const double us = time_graph(c.run, c.copies, f.bytes / 2.5e6 + 5, 1, 300).us;
        if (us < least) least = us, best = split;
      }
      f.splits[padded] = {best ? best : 1, "split " + std::to_string(best) + "; wrong with " +
                                               std::to_string(wrong) + " of " +
                                               std::to_string(tried) + " splits; padded to " +
                                               std::to_string(padded)};
    }
    const auto& [split, remark] = f.splits[padded];
    add(all, made(f.peer, split, remark), d_ref, w.n, w.k, t);
  }
}
// y in float32: cuSPARSE's own bf16 outputs are sums of rounded parts, 1 to 2 % off in norm.
static void add_csr(All& all, const Weight& w, int t) {
  if (w.csr.empty()) return;
  static void* buffer = nullptr;
  constexpr size_t kBuffer = 256u << 20;
  if (!buffer) CK(cudaMalloc(&buffer, kBuffer));
  transpose<<<512, 256, 0, st>>>(d_x, d_xt, t, w.k);
  static const float one = 1, zero = 0;
  const auto keep = [&](const std::string& name, Launch run, bool by_row) {
    Contender c = w.contender("cusparse", w.csr_bytes, std::move(run), (int)w.csr.size(), name);
    c.by_row = by_row;
    c.in_stream = true;
    c.out = Out::kFloat;
    add(all, std::move(c), d_ref, w.n, w.k, t);
  };
  size_t need = 0;
  if (t == 1) {
    cusparseDnVecDescr_t x, y;
    CB(cusparseCreateDnVec(&x, w.k, d_x, CUDA_R_16BF));
    CB(cusparseCreateDnVec(&y, w.n, d_y, CUDA_R_32F));
    for (auto a : {CUSPARSE_SPMV_CSR_ALG1, CUSPARSE_SPMV_CSR_ALG2}) {
      if (cusparseSpMV_bufferSize(cs, CUSPARSE_OPERATION_NON_TRANSPOSE, &one, w.csr[0], x, &zero, y,
                                  CUDA_R_32F, a, &need) != 0 ||
          need > kBuffer) {
        row(w.contender("cusparse", w.csr_bytes, {}, 1, "SpMV"), w.n, w.k, t,
            "refused: no buffer size or too large a one");
        continue;
      }
      keep(
          a == CUSPARSE_SPMV_CSR_ALG1 ? "SpMV CSR 1" : "SpMV CSR 2",
          [&w, x, y, a](int i) {
            return as_error(cusparseSpMV(cs, CUSPARSE_OPERATION_NON_TRANSPOSE, &one, w.csr[i], x,
                                         &zero, y, CUDA_R_32F, a, buffer) == 0);
          },
          false);
    }
    return;
  }
  struct Way {
    cusparseSpMMAlg_t algorithm;
    bool by_row;
    const char* name;
  };
  for (const Way& v : {Way{CUSPARSE_SPMM_CSR_ALG1, false, "SpMM CSR 1"},
                       Way{CUSPARSE_SPMM_CSR_ALG2, true, "SpMM CSR 2; by row"},
                       Way{CUSPARSE_SPMM_CSR_ALG3, true, "SpMM CSR 3; by row"}}) {
    cusparseDnMatDescr_t x, y;
    const auto order = v.by_row ? CUSPARSE_ORDER_ROW : CUSPARSE_ORDER_COL;
    CB(cusparseCreateDnMat(&x, w.k, t, v.by_row ? t : w.k, v.by_row ? d_xt : d_x, CUDA_R_16BF,
                           order));
    CB(cusparseCreateDnMat(&y, w.n, t, v.by_row ? t : w.n, d_y, CUDA_R_32F, order));
    const auto plain = CUSPARSE_OPERATION_NON_TRANSPOSE;
    const auto a = v.algorithm;
    if (cusparseSpMM_bufferSize(cs, plain, plain, &one, w.csr[0], x, &zero, y, CUDA_R_32F, a,
                                &need) != 0 ||
        need > kBuffer) {
      row(w.contender("cusparse", w.csr_bytes, {}, 1, v.name), w.n, w.k, t,
          "refused: no buffer size or too large a one");
      continue;
    }
    keep(
        v.name,
        [&w, x, y, a, plain](int i) {
          return as_error(cusparseSpMM(cs, plain, plain, &one, w.csr[i], x, &zero, y, CUDA_R_32F, a,
                                       buffer) == 0);
        },
        v.by_row);
  }
}

static void report(All& all, Shape s, int t, unsigned mhz) {
  int kept = 0;
  for (Contender& c : all) {
    const Time m = median(*c.graph);
    if (m.us != m.us) {
      row(c, s.n, s.k, t, "refused: no graph of it");
      continue;
    }
    kept++;
    fprintf(csv, "%d,%d,%d,%s,%s,%.2f,%s,%.3f,%.3f,%.3f,%.0f,%.3g,%u,%s\n", s.n, s.k, t,
            c.values.c_str(), c.pattern.c_str(), c.sparsity, c.who.c_str(), m.us, m.low, m.high,
            c.bytes, c.error, mhz, c.note.c_str());
  }
  static const double start = seconds();
  printf("%dx%d T=%d: %d timed, %u MHz, %.1f s\n", s.n, s.k, t, kept, mhz, seconds() - start);
  fflush(stdout);
  fflush(csv);
}

static void reference(const Weight& w, int t) {
  CB(gemm_ex(w.dense, d_x, d_ref, CUDA_R_32F, w.n, w.k, t));
  if (w.codes_of_8_bits())
    scale_float_rows<<<512, 256, 0, st>>>(d_ref, d_scaled, w.n, (size_t)w.n * t, nullptr);
}
// Numbers for bf16 weights; for codes small whole numbers, the same in every type.
static void make_x(bool codes, int k) {
  const size_t count = (size_t)g_max_t * k;
  if (codes) {
    gen_codes<<<512, 256, 0, st>>>(d_x, count / 4, 5, false, false);
    tenths<<<512, 256, 0, st>>>(d_x, count);
    convert<<<512, 256, 0, st>>>(d_x, (__nv_fp8_e4m3*)d_x8[0], count);
    convert<<<512, 256, 0, st>>>(d_x, (signed char*)d_x8[1], count);
  } else {
    gen_x<<<512, 256, 0, st>>>(d_x, count, 5);
    convert<<<512, 256, 0, st>>>(d_x, d_xh, count);
  }
}

// All of one shape and one type of x: weights stay, tokens change.
static void compare(Shape s, const vector<int>& ts, bool codes) {
  vector<WeightPtr> weights;
  const auto make = [&](const char* pattern, Kind kind, int percent) {
    weights.push_back(std::make_unique<Weight>(pattern, kind, percent, s));
  };
  const bool few = *std::min_element(ts.begin(), ts.end()) < kManyTokens;
  const vector<int> percents = few ? vector<int>{50, 60, 70, 80} : vector<int>{50, 80};
  for (Kind kind : codes ? vector<Kind>{Kind::kFp8, Kind::kInt8} : vector<Kind>{Kind::kBf16}) {
    make("dense", kind, 0);
    make("2:4", kind, 50);
    for (int percent : percents) make("unstructured", kind, percent);
    if (with("real") && few) {
      for (int percent : {50, 60, 70, 80}) make("real", kind, percent);
      make("real-2:4", kind, 50);
    }
  }
  if (!codes) {
    if (with("ours"))
      for (int percent : {80, 90}) make("block64x64", Kind::kBf16, percent);
    make("2:4", Kind::kInt4, 50);
  }
  make_x(codes, s.k);
  CK(cudaStreamSynchronize(st));
  for (int t : ts) {
    All all;
    for (WeightPtr& w : weights) {
      reference(*w, t);
      if (w->pattern == "dense" && with("dense")) add_dense(all, *w, t);
      if (w->pattern == "2:4" && w->kind != Kind::kInt4 && with("cusparselt"))
        add_structured(all, *w, t);
      add_ours(all, *w, t);
      add_peers(all, *w, t);
      if (t < kManyTokens) add_csr(all, *w, t);
    }
    vector<Graph*> graphs;
    for (Contender& c : all) {
      const double guess = c.bytes / 3.5e6 + 3 + 2.0 * t * s.n * s.k / 6e8;
      if (c.in_stream)
        for (int q = 0; q < 3; q++) c.graph->times.push_back(in_stream_us(c));
      else if (!c.graph->exec)
        c.graph = std::make_unique<Graph>(record(c.run, c.copies, guess));
      graphs.push_back(c.graph.get());
    }
    g_clock->start();
    interleave(graphs, kMeasurements);
    report(all, s, t, g_clock->median());
  }
}

static void write_head(int argc, char** argv) {
  cudaDeviceProp prop;
  CK(cudaGetDeviceProperties(&prop, 0));
  int runtime = 0, sparse = 0, structured = 0;
  cudaRuntimeGetVersion(&runtime);
  cusparseGetVersion(cs, &sparse);
  cusparseLtGetVersion(&cslt, &structured);
  char date[32];
  const std::time_t now = std::time(nullptr);
  std::strftime(date, sizeof date, "%Y-%m-%d", std::gmtime(&now));
  fprintf(csv, "# %s, %s, driver %s, CUDA runtime %d, cuBLASLt %zu, cuSPARSE %d, cuSPARSELt %d\n",
          date, prop.name, g_clock->driver().c_str(), runtime, cublasLtGetVersion(), sparse,
          structured);
  for (int i = 7; i < argc; i++) fprintf(csv, "# %s\n", argv[i]);
  fprintf(csv, "# shapes %s, tokens %s, %s; sm_mhz: median while this shape and T were timed\n",
          argv[3], argv[4], argv[5]);
  fprintf(csv, "n,k,t,values,pattern,sparsity,who,us,low,high,weight_bytes,error,sm_mhz,note\n");
}

int main(int argc, char** argv) {
  if (argc < 6) {
    printf("bench LIBRARY OUT.csv SHAPES TS WHO [MASKS [COMMENT...]]\n");
    return 2;
  }
  setup_device();
  void* opened = dlopen(argv[1], RTLD_NOW | RTLD_LOCAL);
  if (!opened) return printf("%s\n", dlerror()), 2;
  library = ((lk::GpuTableFunction)dlsym(opened, lk::kGpuTableSymbol))();
  if (library->version != lk::kGpuAbiVersion) return printf("another interface\n"), 2;
  g_who = argv[5];
  if (argc > 6) g_masks = argv[6];
  setup_dense();
  CB(cusparseCreate(&cs));
  CB(cusparseSetStream(cs, st));
  CB(cusparseLtInit(&cslt));
  g_clock = std::make_unique<Clock>();
  const vector<int> ts = numbers(argv[4]);
  g_max_t = std::max(64, *std::max_element(ts.begin(), ts.end()));
  const size_t x = (size_t)g_max_t * 14336, y = (size_t)g_max_t * 28672;
  for (bf16** p : {&d_x, &d_xt, &d_xr}) CK(cudaMalloc(p, x * 2));
  CK(cudaMalloc(&d_xh, x * 2));
  CK(cudaMalloc(&d_x8[0], x));
  CK(cudaMalloc(&d_x8[1], x));
  CK(cudaMalloc(&d_y, y * 4));
  for (float** p : {&d_ref, &d_scaled, &d_rounded}) CK(cudaMalloc(p, y * 4));
  CK(cudaMalloc(&d_token_scales, (size_t)g_max_t * 4));
  CK(cudaMalloc(&d_sums, 16));
  CK(cudaMalloc(&d_split, (size_t)16 * 64 * 28672 * 4));
  csv = fopen(argv[2], "w");
  if (!csv) return 2;
  write_head(argc, argv);
  for (const char* q = argv[3]; *q; q++)
    for (bool codes : {false, true}) compare(kShapes[*q - '0'], ts, codes);
  fclose(csv);
  CK(cudaDeviceSynchronize());
  g_clock.reset();
  printf("done\n");
  return 0;
}
