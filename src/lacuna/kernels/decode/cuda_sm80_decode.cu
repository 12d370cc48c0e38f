// The operations of a decode step on a GPU. None of them moves more than a few hundred KiB, so what
// counts is how soon each is done: one block for a row, a thread for a few elements, and attention
// split over the positions so that every multiprocessor takes part.
//
//   attend   block (split, key head, token)   4 warps, a position each in turn; a lane holds
//            head_dim / 32 elements of q, of every query head that shares the key head
//            -> largest score, sum, weighted values of the split, in float32
//   combine  block (head, token)              splits in their order: the same bits at every run
//
// Positions and ids come from device memory, so that a recorded step serves every token. Every
// kernel lets the next one be launched early: a linear operation fetches its first weights while
// the small kernel before it runs.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "lacuna/kernels/decode/cuda_sm80_decode.h"

namespace lacuna::kernels::decode {
namespace {

constexpr int kWarp = 32;

__device__ float widened(float v) { return v; }
__device__ float widened(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ float widened(__half v) { return __half2float(v); }
template <class T>
__device__ T narrowed(float v);
template <>
__device__ float narrowed<float>(float v) {
  return v;
}
template <>
__device__ __nv_bfloat16 narrowed<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ __half narrowed<__half>(float v) {
  return __float2half_rn(v);
}
/// A value as it comes back from memory of this type.
template <class T>
__device__ float rounded(float v) {
  return widened(narrowed<T>(v));
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f(float{});
    case DType::kBF16:
      return f(__nv_bfloat16{});
    default:
      return f(__half{});
  }
}

/// First of every kernel. The next one of the stream may be launched now, to fetch its weights
/// while this one still runs (programmatic dependent launch); what the one before has written is
/// there from here on. All of them wait here, so whoever is complete has everything before it
/// complete.
__device__ void follow() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

template <class F>
__device__ float over_warp(float v, F&& f) {
  for (int step = kWarp / 2; step > 0; step /= 2) v = f(v, __shfl_xor_sync(~0u, v, step));
  return v;
}
__device__ float warp_sum(float v) {
  return over_warp(v, [](float a, float b) { return a + b; });
}

/// The sum of `v` over the block, in every thread. `shared` holds a float for each warp.
__device__ float block_sum(float v, float* shared) {
  v = warp_sum(v);
  __syncthreads();
  if (threadIdx.x % kWarp == 0) shared[threadIdx.x / kWarp] = v;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < static_cast<int>(blockDim.x) / kWarp; ++warp) sum += shared[warp];
  return sum;
}

template <class T>
__global__ void gather_kernel(Gather g) {
  follow();
  const int64_t t = blockIdx.x;
  const int64_t row = g.ids != nullptr ? g.ids[t] : *g.position + g.offset + t;
  const T* from = static_cast<const T*>(g.table) + row * g.width;
  T* to = static_cast<T*>(g.out) + t * g.width;
  for (int64_t i = threadIdx.x; i < g.width; i += blockDim.x)
    to[i] = g.add ? narrowed<T>(widened(to[i]) + widened(from[i])) : from[i];
}

/// kCount neighbours that move in one access; kCount elements are at most 16 bytes.
template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Neighbours {
  T of[kCount];
};

/// Row by row; a thread holds kVectors vectors of kCount elements, from `threadIdx` on in steps of
/// the block.
template <class T, int kCount, int kVectors>
__global__ void normalize_kernel(Normalize n) {
  using Vector = Neighbours<T, kCount>;
  __shared__ float shared[kWarp];
  const int64_t vectors = n.width / kCount, first = int64_t{blockIdx.x} * vectors;
  const auto each = [&](auto&& f) {
#pragma unroll
    for (int j = 0; j < kVectors; ++j) {
      const int64_t v = threadIdx.x + int64_t{j} * blockDim.x;
      if (v < vectors) f(j, v);
    }
  };
  // What nobody writes is fetched before the kernel ahead is done.
  Vector weight[kVectors], bias[kVectors];
  each([&](int j, int64_t v) {
    if (n.weight != nullptr) weight[j] = static_cast<const Vector*>(n.weight)[v];
    if (n.bias != nullptr) bias[j] = static_cast<const Vector*>(n.bias)[v];
  });
  follow();

  float held[kVectors][kCount];
  float total = 0, squares = 0;
  each([&](int j, int64_t v) {
    const Vector x = static_cast<const Vector*>(n.x)[first + v];
    Vector kept = x;
    if (n.delta != nullptr) {
      const Vector delta = static_cast<const Vector*>(n.delta)[first + v];
#pragma unroll
      for (int i = 0; i < kCount; ++i)
        kept.of[i] = narrowed<T>(widened(x.of[i]) + widened(delta.of[i]));
    }
    if (n.sum != nullptr) static_cast<Vector*>(n.sum)[first + v] = kept;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      held[j][i] = widened(kept.of[i]);
      total += held[j][i];
      squares += held[j][i] * held[j][i];
    }
  });
  if (n.out == nullptr) return;
  const auto width = static_cast<float>(n.width);
  float mean = 0;
  if (n.bias != nullptr) {
    mean = block_sum(total, shared) / width;
    squares = 0;
    each([&](int j, int64_t) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) squares += (held[j][i] - mean) * (held[j][i] - mean);
    });
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, shared) / width + n.epsilon);
  each([&](int j, int64_t v) {
    Vector out;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float centered = (held[j][i] - mean) * scale, w = widened(weight[j].of[i]);
      out.of[i] = n.bias != nullptr ? narrowed<T>(centered * w + widened(bias[j].of[i]))
                                    : narrowed<T>(w * rounded<T>(centered));
    }
    static_cast<Vector*>(n.out)[first + v] = out;
  });
}

template <class T>
__global__ void rotate_kernel(Rotate r) {
  follow();
  const int64_t d = r.head_dim, half = d / 2, all = r.heads + r.kv_heads;
  const int64_t t = blockIdx.x / all, h = blockIdx.x % all;
  const bool is_key = h >= r.heads;
  const int64_t head = is_key ? h - r.heads : h, position = *r.position + t;
  const T* from = is_key ? static_cast<const T*>(r.k) + (t * r.kv_heads + head) * d
                         : static_cast<const T*>(r.q) + (t * r.heads + head) * d;
  const int64_t slot = (head * r.capacity + position) * d;
  T* to = is_key ? static_cast<T*>(r.keys) + slot : static_cast<T*>(r.q) + (t * r.heads + head) * d;
  const T* cos = static_cast<const T*>(r.cos) + position * d;
  const T* sin = static_cast<const T*>(r.sin) + position * d;
  for (int64_t i = threadIdx.x; i < half; i += blockDim.x) {
    const float low = widened(from[i]), high = widened(from[half + i]);
    if (r.cos != nullptr) {
      to[i] = narrowed<T>(rounded<T>(low * widened(cos[i])) + rounded<T>(-high * widened(sin[i])));
      to[half + i] = narrowed<T>(rounded<T>(high * widened(cos[half + i])) +
                                 rounded<T>(low * widened(sin[half + i])));
    }
  }
  if (!is_key) return;
  const T* v = static_cast<const T*>(r.v) + (t * r.kv_heads + head) * d;
  T* values = static_cast<T*>(r.values) + slot;
  for (int64_t i = threadIdx.x; i < d; i += blockDim.x) {
    if (r.cos == nullptr) to[i] = from[i];
    values[i] = v[i];
  }
}

constexpr int kAttendWarps = 4;
constexpr int kAtOnce = 4;  // positions that a warp has under way
constexpr int64_t kSplits = 64;
constexpr int kMostShared = 8;  // query heads of a key head that a block takes at once

/// One split's share of a head: the largest score, the sum of the weights, and head_dim weighted
/// values.
__host__ __device__ int64_t partial_floats(int64_t head_dim) { return head_dim + 2; }

/// What a token sees, and how it is split: whole rounds of all warps, as few splits as that gives.
struct Seen {
  int64_t begin, end, each, splits;
  __device__ Seen(const Attend& a, int64_t token) {
    constexpr int64_t kRound = kAttendWarps * kAtOnce;
    end = *a.position + token + 1;
    begin = a.window > 0 && end > a.window ? end - a.window : 0;
    each = ((end - begin + kSplits - 1) / kSplits + kRound - 1) / kRound * kRound;
    splits = (end - begin + each - 1) / each;
  }
};

/// kPer elements of a row for this lane; those past `d` are 0.
template <class T, int kPer>
__device__ void load_lane(const T* row, int lane, int64_t d, float (&out)[kPer]) {
  if (d == kPer * kWarp) {
    constexpr int kCount = sizeof(T) * kPer > 16 ? 16 / sizeof(T) : kPer;
#pragma unroll
    for (int j = 0; j < kPer; j += kCount) {
      const auto part = *reinterpret_cast<const Neighbours<T, kCount>*>(row + lane * kPer + j);
#pragma unroll
      for (int i = 0; i < kCount; ++i) out[j + i] = widened(part.of[i]);
    }
    return;
  }
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const int64_t i = lane * kPer + j;
    out[j] = i < d ? widened(row[i]) : 0.0f;
  }
}

template <class T, int kPer>
__global__ void attend_kernel(Attend a) {
  follow();
  const int64_t split = blockIdx.x, t = blockIdx.z;
  const Seen seen(a, t);
  if (split >= seen.splits) return;
  const int64_t group = a.heads / a.kv_heads, chunks = (group + kMostShared - 1) / kMostShared;
  const int64_t kv_head = blockIdx.y / chunks, first_of_group = blockIdx.y % chunks * kMostShared;
  const int shared_heads = static_cast<int>(
      group - first_of_group < kMostShared ? group - first_of_group : int64_t{kMostShared});
  const int64_t d = a.head_dim;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = seen.begin + split * seen.each;
  const int64_t last = first + seen.each < seen.end ? first + seen.each : seen.end;
  const T* keys = static_cast<const T*>(a.keys) + kv_head * a.capacity * d;
  const T* values = static_cast<const T*>(a.values) + kv_head * a.capacity * d;

  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  float q[kMostShared][kPer], acc[kMostShared][kPer], top[kMostShared], sum[kMostShared];
#pragma unroll
  for (int g = 0; g < kMostShared; ++g) {
    top[g] = -FLT_MAX;
    sum[g] = 0;
    if (g < shared_heads) {
      const int64_t head = kv_head * group + first_of_group + g;
      load_lane<T, kPer>(static_cast<const T*>(a.q) + (t * a.heads + head) * d, lane, d, q[g]);
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      acc[g][j] = 0;
      q[g][j] *= scale;
    }
  }
  for (int64_t s = first + warp * kAtOnce; s < last; s += kAttendWarps * kAtOnce) {
    float k[kAtOnce][kPer], v[kAtOnce][kPer];
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {  // past the last: it again, with no weight
      const int64_t row = (s + p < last ? s + p : last - 1) * d;
      load_lane<T, kPer>(keys + row, lane, d, k[p]);
      load_lane<T, kPer>(values + row, lane, d, v[p]);
    }
#pragma unroll
    for (int g = 0; g < kMostShared; ++g) {
      if (g >= shared_heads) break;
      float score[kAtOnce], larger = top[g];
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        score[p] = 0;
#pragma unroll
        for (int j = 0; j < kPer; ++j) score[p] += q[g][j] * k[p][j];
      }
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        score[p] = warp_sum(score[p]);
        if (s + p >= last) score[p] = -FLT_MAX;
        larger = fmaxf(larger, score[p]);
      }
      const float fade = __expf(top[g] - larger);
      top[g] = larger;
      sum[g] *= fade;
#pragma unroll
      for (int j = 0; j < kPer; ++j) acc[g][j] *= fade;
#pragma unroll
      for (int p = 0; p < kAtOnce; ++p) {
        const float weight = s + p < last ? __expf(score[p] - larger) : 0.0f;
        sum[g] += weight;
#pragma unroll
        for (int j = 0; j < kPer; ++j) acc[g][j] += weight * v[p][j];
      }
    }
  }

  // The four warps' shares, added in their order.
  extern __shared__ float shares[];  // [warps][kMostShared][d + 2]
  const int64_t floats = partial_floats(d);
#pragma unroll
  for (int g = 0; g < kMostShared; ++g) {
    if (g >= shared_heads) break;
    float* mine = shares + (warp * kMostShared + g) * floats;
    if (lane == 0) {
      mine[0] = top[g];
      mine[1] = sum[g];
    }
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int64_t i = lane * kPer + j;
      if (i < d) mine[2 + i] = acc[g][j];
    }
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < shared_heads * d; i += blockDim.x) {
    const int64_t g = i / d, element = i % d;
    float largest = -FLT_MAX, all = 0, value = 0;
    for (int w = 0; w < kAttendWarps; ++w)
      largest = fmaxf(largest, shares[(w * kMostShared + g) * floats]);
    for (int w = 0; w < kAttendWarps; ++w) {
      const float* share = shares + (w * kMostShared + g) * floats;
      const float fade = __expf(share[0] - largest);
      all += share[1] * fade;
      value += share[2 + element] * fade;
    }
    const int64_t head = kv_head * group + first_of_group + g;
    float* out =
        static_cast<float*>(a.workspace) + ((t * a.heads + head) * kSplits + split) * floats;
    out[2 + element] = value;
    if (element == 0) {
      out[0] = largest;
      out[1] = all;
    }
  }
}

template <class T>
__global__ void combine_kernel(Attend a) {
  follow();
  __shared__ float weights[kSplits];
  const int64_t head = blockIdx.x, t = blockIdx.y, floats = partial_floats(a.head_dim);
  const Seen seen(a, t);
  const float* parts =
      static_cast<const float*>(a.workspace) + (t * a.heads + head) * kSplits * floats;
  if (threadIdx.x < kWarp) {  // a lane weighs two splits
    float top[2], sum[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t split = threadIdx.x + i * kWarp;
      top[i] = split < seen.splits ? parts[split * floats] : -FLT_MAX;
      sum[i] = split < seen.splits ? parts[split * floats + 1] : 0.0f;
    }
    const float largest =
        over_warp(fmaxf(top[0], top[1]), [](float x, float y) { return fmaxf(x, y); });
    const float fade[2] = {__expf(top[0] - largest), __expf(top[1] - largest)};
    const float all = warp_sum(sum[0] * fade[0] + sum[1] * fade[1]);
#pragma unroll
    for (int i = 0; i < 2; ++i) weights[threadIdx.x + i * kWarp] = fade[i] / all;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
    float value = 0;
#pragma unroll 8
    for (int64_t s = 0; s < seen.splits; ++s) value += weights[s] * parts[s * floats + 2 + i];
    static_cast<T*>(a.out)[(t * a.heads + head) * a.head_dim + i] = narrowed<T>(value);
  }
}

__device__ float activated(Activation activation, float x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + expf(-x));
    case Activation::kGelu:
      return 0.5f * x * (1.0f + erff(x * 0.70710678f));
    case Activation::kGeluTanh:
      return 0.5f * x * (1.0f + tanhf(0.79788456f * (x + 0.044715f * x * x * x)));
    case Activation::kRelu:
      return x < 0.0f ? 0.0f : x;
    case Activation::kRelu2:
      return x < 0.0f ? 0.0f : x * x;
  }
  return x;
}

template <class T>
__global__ void activate_kernel(Activate a) {
  follow();
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= a.count) return;
  const float up = widened(static_cast<const T*>(a.up)[i]);
  static_cast<T*>(a.out)[i] = narrowed<T>(
      a.gate == nullptr
          ? activated(a.activation, up)
          : rounded<T>(activated(a.activation, widened(static_cast<const T*>(a.gate)[i]))) * up);
}

template <class T>
__global__ void widen_kernel(Widen w) {
  follow();
  __shared__ float values[kWarp];
  __shared__ int places[kWarp];
  __shared__ int odd;
  if (threadIdx.x == 0) odd = 0;
  __syncthreads();
  float best = -FLT_MAX;
  int place = INT_MAX;
  bool finite = true;
  const auto better = [&](float value, int at) {
    if (value > best || (value == best && at < place)) {
      best = value;
      place = at;
    }
  };
  for (int64_t i = threadIdx.x; i < w.count; i += blockDim.x) {
    const float value = widened(static_cast<const T*>(w.logits)[i]);
    w.wide[i] = value;
    finite &= fabsf(value) <= FLT_MAX;
    better(value, static_cast<int>(i));
  }
  if (!finite) atomicOr(&odd, 1);
  for (int step = kWarp / 2; step > 0; step /= 2)
    better(__shfl_xor_sync(~0u, best, step), __shfl_xor_sync(~0u, place, step));
  if (threadIdx.x % kWarp == 0) {
    values[threadIdx.x / kWarp] = best;
    places[threadIdx.x / kWarp] = place;
  }
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
    better(values[warp], places[warp]);
  *w.best = odd ? -1 : place;
}

/// Whether this device launches a kernel before the one ahead of it is complete.
bool overlaps() {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  return major >= 9;
}

template <class Operands>
void launch(void (*kernel)(Operands), dim3 blocks, int64_t threads, size_t shared, void* queue,
            const Operands& operands) {
  static const bool early = overlaps();
  cudaLaunchAttribute attribute;
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>((threads + kWarp - 1) / kWarp * kWarp));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(queue);
  config.attrs = &attribute;
  config.numAttrs = early ? 1 : 0;
  cudaLaunchKernelEx(&config, kernel, operands);
}

unsigned count(int64_t blocks) { return static_cast<unsigned>(blocks); }

void gather(const Gather& g, void* queue) {
  with_dtype(g.dtype, [&](auto element) {
    launch(gather_kernel<decltype(element)>, count(g.tokens), 256, 0, queue, g);
  });
}

/// Whether rows of this width at these places can be read 16 bytes at a time.
bool in_vectors(const Normalize& n, int64_t bytes) {
  for (const void* at : {n.x, n.delta, static_cast<const void*>(n.sum), n.weight, n.bias,
                         static_cast<const void*>(n.out)})
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) return false;
  return n.width * bytes % 16 == 0;
}

void normalize(const Normalize& n, void* queue) {
  with_dtype(n.dtype, [&](auto element) {
    using T = decltype(element);
    constexpr int kCount = 16 / sizeof(T);
    if (!in_vectors(n, sizeof(T)))  // odd widths: 16 elements a thread
      return launch(normalize_kernel<T, 1, 16>, count(n.rows), std::min<int64_t>(n.width, 1024), 0,
                    queue, n);
    const int64_t vectors = n.width / kCount;
    if (vectors <= 512)
      launch(normalize_kernel<T, kCount, 1>, count(n.rows), vectors, 0, queue, n);
    else
      launch(normalize_kernel<T, kCount, 16 / kCount * 2>, count(n.rows),
             std::min<int64_t>((vectors + 1) / 2, 512), 0, queue, n);
  });
}

void rotate(const Rotate& r, void* queue) {
  with_dtype(r.dtype, [&](auto element) {
    launch(rotate_kernel<decltype(element)>, count(r.tokens * (r.heads + r.kv_heads)),
           std::max<int64_t>(1, r.head_dim / 2), 0, queue, r);
  });
}

size_t attend_workspace_bytes(const Attend& a) {
  return static_cast<size_t>(a.tokens * a.heads * kSplits * partial_floats(a.head_dim)) *
         sizeof(float);
}

void attend(const Attend& a, void* queue) {
  const int64_t group = a.heads / a.kv_heads, chunks = (group + kMostShared - 1) / kMostShared;
  const dim3 blocks(count(kSplits), count(a.kv_heads * chunks), count(a.tokens));
  const auto shared = static_cast<size_t>(kAttendWarps * kMostShared * partial_floats(a.head_dim)) *
                      sizeof(float);  // 33 KiB for heads of 256
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = a.head_dim <= 64    ? attend_kernel<T, 2>
                        : a.head_dim <= 128 ? attend_kernel<T, 4>
                                            : attend_kernel<T, 8>;
    launch(kernel, blocks, kAttendWarps * kWarp, shared, queue, a);
    launch(combine_kernel<T>, dim3(count(a.heads), count(a.tokens)), a.head_dim, 0, queue, a);
  });
}

void activate(const Activate& a, void* queue) {
  constexpr int64_t kThreads = 256;
  with_dtype(a.dtype, [&](auto element) {
    launch(activate_kernel<decltype(element)>, count((a.count + kThreads - 1) / kThreads), kThreads,
           0, queue, a);
  });
}

void widen(const Widen& w, void* queue) {
  with_dtype(w.dtype,
             [&](auto element) { launch(widen_kernel<decltype(element)>, 1, 1024, 0, queue, w); });
}

}  // namespace

const Operations kCuda = {"cuda_sm80", gather,   normalize, rotate, attend_workspace_bytes,
                          attend,      activate, widen};

}  // namespace lacuna::kernels::decode
