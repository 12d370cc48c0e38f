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

template <class T>
__global__ void normalize_kernel(Normalize n) {
  follow();
  __shared__ float shared[kWarp];
  const int64_t first = int64_t{blockIdx.x} * n.width;
  const T* x = static_cast<const T*>(n.x) + first;
  const T* delta = n.delta != nullptr ? static_cast<const T*>(n.delta) + first : nullptr;
  T* sum = n.sum != nullptr ? static_cast<T*>(n.sum) + first : nullptr;
  constexpr int kHeld = 16;  // elements of a thread that stay in registers
  float held[kHeld];
  float total = 0, squares = 0;
  const auto value = [&](int64_t i) {
    return delta != nullptr ? rounded<T>(widened(x[i]) + widened(delta[i])) : widened(x[i]);
  };
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int64_t i = threadIdx.x + int64_t{j} * blockDim.x;
    held[j] = i < n.width ? value(i) : 0.0f;
    if (i < n.width && sum != nullptr) sum[i] = narrowed<T>(held[j]);
    total += held[j];
    squares += held[j] * held[j];
  }
  if (n.out == nullptr) return;
  const auto width = static_cast<float>(n.width);
  float mean = 0;
  if (n.bias != nullptr) {
    mean = block_sum(total, shared) / width;
    squares = 0;
#pragma unroll
    for (int j = 0; j < kHeld; ++j) {
      const int64_t i = threadIdx.x + int64_t{j} * blockDim.x;
      if (i < n.width) squares += (held[j] - mean) * (held[j] - mean);
    }
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, shared) / width + n.epsilon);
  const T* weight = static_cast<const T*>(n.weight);
  const T* bias = static_cast<const T*>(n.bias);
  T* out = static_cast<T*>(n.out) + first;
#pragma unroll
  for (int j = 0; j < kHeld; ++j) {
    const int64_t i = threadIdx.x + int64_t{j} * blockDim.x;
    if (i >= n.width) continue;
    const float centered = (held[j] - mean) * scale;
    out[i] = bias != nullptr ? narrowed<T>(centered * widened(weight[i]) + widened(bias[i]))
                             : narrowed<T>(widened(weight[i]) * rounded<T>(centered));
  }
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
    } else if (is_key) {
      to[i] = from[i];
      to[half + i] = from[half + i];
    }
    if (is_key) {
      const T* v = static_cast<const T*>(r.v) + (t * r.kv_heads + head) * d;
      T* values = static_cast<T*>(r.values) + slot;
      values[i] = v[i];
      values[half + i] = v[half + i];
    }
  }
}

constexpr int kAttendWarps = 4;
constexpr int64_t kSplits = 32;
constexpr int kMostShared = 8;  // query heads of a key head that a block takes at once

/// One split's share of a head: the largest score, the sum of the weights, and head_dim weighted
/// values.
__host__ __device__ int64_t partial_floats(int64_t head_dim) { return head_dim + 2; }

template <class T, int kPer>
__global__ void attend_kernel(Attend a) {
  follow();
  const int64_t split = blockIdx.x, t = blockIdx.z;
  const int64_t group = a.heads / a.kv_heads, chunks = (group + kMostShared - 1) / kMostShared;
  const int64_t kv_head = blockIdx.y / chunks, first_of_group = blockIdx.y % chunks * kMostShared;
  const int shared_heads = static_cast<int>(
      group - first_of_group < kMostShared ? group - first_of_group : int64_t{kMostShared});
  const int64_t d = a.head_dim;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t end = *a.position + t + 1;
  const int64_t begin = a.window > 0 && end > a.window ? end - a.window : 0;
  const int64_t each = (end - begin + kSplits - 1) / kSplits;
  const int64_t first = begin + split * each, last = first + each < end ? first + each : end;

  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  float q[kMostShared][kPer], acc[kMostShared][kPer], top[kMostShared], sum[kMostShared];
#pragma unroll
  for (int g = 0; g < kMostShared; ++g) {
    top[g] = -FLT_MAX;
    sum[g] = 0;
    const int64_t head = kv_head * group + first_of_group + g;
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int64_t i = lane * kPer + j;
      acc[g][j] = 0;
      q[g][j] = g < shared_heads && i < d
                    ? scale * widened(static_cast<const T*>(a.q)[(t * a.heads + head) * d + i])
                    : 0.0f;
    }
  }
  const T* keys = static_cast<const T*>(a.keys) + kv_head * a.capacity * d;
  const T* values = static_cast<const T*>(a.values) + kv_head * a.capacity * d;
  for (int64_t s = first + warp; s < last; s += kAttendWarps) {
    float k[kPer], v[kPer];
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      const int64_t i = lane * kPer + j;
      k[j] = i < d ? widened(keys[s * d + i]) : 0.0f;
      v[j] = i < d ? widened(values[s * d + i]) : 0.0f;
    }
#pragma unroll
    for (int g = 0; g < kMostShared; ++g) {
      if (g >= shared_heads) break;
      float dot = 0;
#pragma unroll
      for (int j = 0; j < kPer; ++j) dot += q[g][j] * k[j];
      dot = warp_sum(dot);
      const float larger = fmaxf(top[g], dot);
      const float fade = expf(top[g] - larger), weight = expf(dot - larger);
      top[g] = larger;
      sum[g] = sum[g] * fade + weight;
#pragma unroll
      for (int j = 0; j < kPer; ++j) acc[g][j] = acc[g][j] * fade + weight * v[j];
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
      const float fade = expf(share[0] - largest);
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
  const int64_t head = blockIdx.x, t = blockIdx.y, floats = partial_floats(a.head_dim);
  const float* splits =
      static_cast<const float*>(a.workspace) + (t * a.heads + head) * kSplits * floats;
  float largest = -FLT_MAX;
  for (int64_t s = 0; s < kSplits; ++s) largest = fmaxf(largest, splits[s * floats]);
  float sum = 0;
  for (int64_t s = 0; s < kSplits; ++s)
    sum += splits[s * floats + 1] * expf(splits[s * floats] - largest);
  for (int64_t i = threadIdx.x; i < a.head_dim; i += blockDim.x) {
    float value = 0;
    for (int64_t s = 0; s < kSplits; ++s)
      value += splits[s * floats + 2 + i] * expf(splits[s * floats] - largest);
    static_cast<T*>(a.out)[(t * a.heads + head) * a.head_dim + i] = narrowed<T>(value / sum);
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

void normalize(const Normalize& n, void* queue) {
  // A thread holds 16 elements at most; narrow rows (one head) take one warp.
  const int64_t threads = std::clamp<int64_t>((n.width + 7) / 8, kWarp, 1024);
  with_dtype(n.dtype, [&](auto element) {
    launch(normalize_kernel<decltype(element)>, count(n.rows), threads, 0, queue, n);
  });
}

void rotate(const Rotate& r, void* queue) {
  with_dtype(r.dtype, [&](auto element) {
    launch(rotate_kernel<decltype(element)>, count(r.tokens * (r.heads + r.kv_heads)),
           r.head_dim / 2, 0, queue, r);
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
