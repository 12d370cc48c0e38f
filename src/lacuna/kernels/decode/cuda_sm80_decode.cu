// The operations of a decode step on a GPU. None of them moves more than a few hundred KiB, so what
// counts is how soon each is done: one block for a row, a thread for a few elements, and attention
// split over the positions so that every multiprocessor takes part.
//
//   attend   block (split, key heads, token)  8 warps, four positions each in turn; a lane holds
//            head_dim / 32 elements of q, of every query head that shares the key head, and turns
//            them itself, as it does the keys of this step
//            -> largest score, sum, weighted values of the split, in float32
//            on compute capability 9.0 eight blocks are a cluster and add up their splits in
//            shared memory; what several clusters (or all blocks elsewhere) have found, the last
//            of them to be done adds up. Always in their order: the same bits at every run
//
// Positions and ids come from device memory, so that a recorded step serves every token. Every
// kernel lets the next one be launched early: a linear operation fetches its first weights while
// the small kernel before it runs. What earlier steps have left (keys, values, angles) is fetched
// before the kernel ahead is done.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>

#include "lacuna/kernels/cuda/sm90_async.h"
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

/// Whether this block is the last of `blocks` to come here; what the others have written before is
/// there for it. The counter starts at 0 and is left so.
__device__ bool is_last(unsigned* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(counter, 1u) == blocks - 1;
    if (last) *counter = 0;
    __threadfence();
  }
  __syncthreads();
  return last;
}

template <class T>
__global__ void gather_kernel(Gather g) {
  follow();
  const int64_t t = blockIdx.x;
  const int64_t row = g.ids != nullptr ? g.ids[t] : *g.position + g.offset + t;
  const T* from = static_cast<const T*>(g.table) + row * g.width;
  T* to = static_cast<T*>(g.out) + t * g.width;
  for (int64_t i = int64_t{blockIdx.y} * blockDim.x + threadIdx.x; i < g.width;
       i += int64_t{gridDim.y} * blockDim.x)
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
  const int64_t d = r.head_dim, half = d / 2, all = r.heads + r.kv_heads;
  const int64_t t = blockIdx.x / all, h = blockIdx.x % all;
  const bool is_key = h >= r.heads;
  const int64_t head = is_key ? h - r.heads : h, position = *r.position + t;
  const int64_t q_stride = r.stride > 0 ? r.stride : r.heads * d;
  const int64_t kv_stride = r.stride > 0 ? r.stride : r.kv_heads * d;
  const T* from = is_key ? static_cast<const T*>(r.k) + t * kv_stride + head * d
                         : static_cast<const T*>(r.q) + t * q_stride + head * d;
  const int64_t slot = (head * r.capacity + position) * d;
  T* to = is_key ? static_cast<T*>(r.keys) + slot : static_cast<T*>(r.q) + t * q_stride + head * d;
  const T* cos = static_cast<const T*>(r.cos) + position * d;
  const T* sin = static_cast<const T*>(r.sin) + position * d;
  const int64_t i = threadIdx.x;  // the block has as many threads as half a head has elements
  const bool turns = r.cos != nullptr && i < half;
  float angle[4] = {};
  if (turns) {
    angle[0] = widened(cos[i]);
    angle[1] = widened(sin[i]);
    angle[2] = widened(cos[half + i]);
    angle[3] = widened(sin[half + i]);
  }
  follow();
  if (turns) {
    const float low = widened(from[i]), high = widened(from[half + i]);
    to[i] = narrowed<T>(rounded<T>(low * angle[0]) + rounded<T>(-high * angle[1]));
    to[half + i] = narrowed<T>(rounded<T>(high * angle[2]) + rounded<T>(low * angle[3]));
  }
  if (!is_key) return;
  const T* v = static_cast<const T*>(r.v) + t * kv_stride + head * d;
  T* values = static_cast<T*>(r.values) + slot;
  for (int64_t j = i; j < d; j += blockDim.x) {
    if (r.cos == nullptr) to[j] = from[j];
    values[j] = v[j];
  }
}

constexpr int kAttendWarps = 8;
constexpr int kAtOnce = 4;  // positions that a warp has under way
constexpr int64_t kSplits = 32;
constexpr int kCluster = 8;     // splits of a cluster, where there are clusters
constexpr int kMostShared = 8;  // query heads of a key head that a block takes at once

/// One split's share of a head: the largest score, the sum of the weights, and head_dim weighted
/// values.
__host__ __device__ int64_t partial_floats(int64_t head_dim) { return head_dim + 2; }

/// How query heads are dealt out: those of a key head in chunks of at most kMostShared.
struct Shared {
  int64_t group, chunks;
  __host__ __device__ explicit Shared(const Attend& a)
      : group(a.heads / a.kv_heads), chunks((group + kMostShared - 1) / kMostShared) {}
  __host__ __device__ int64_t most() const { return group < kMostShared ? group : kMostShared; }
};

/// Of the workspace: the shares of all splits, then a counter for each chunk of heads.
__host__ __device__ int64_t share_floats(const Attend& a) {
  return a.tokens * a.heads * kSplits * partial_floats(a.head_dim);
}

/// What a token sees, and how it is split: as few clusters (or splits) as have enough to do.
struct Seen {
  int64_t begin, end, each, splits;
  __device__ Seen(const Attend& a, int64_t token, int cluster) {
    end = *a.position + token + 1;
    begin = a.window > 0 && end > a.window ? end - a.window : 0;
    const int64_t count = end - begin, enough = cluster > 1 ? 1024 : kAttendWarps * kAtOnce;
    splits = (count + enough - 1) / enough * cluster;
    if (splits > kSplits) splits = kSplits;
    each = (count + splits - 1) / splits;
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

/// Where the shares of the heads from `head` on lie in the workspace: [head][split][d + 2].
__device__ float* shares_of(const Attend& a, int64_t t, int64_t head) {
  return static_cast<float*>(a.workspace) +
         (t * a.heads + head) * kSplits * partial_floats(a.head_dim);
}

/// `parts` shares for the heads first .. first + count - 1 of a token, added up in their order.
template <class T>
__device__ void combine(const Attend& a, int64_t t, int64_t first, int count, int64_t parts) {
  __shared__ float weights[kMostShared][kSplits];
  static_assert(kSplits == kWarp && kAttendWarps >= kMostShared);
  const int64_t floats = partial_floats(a.head_dim), d = a.head_dim;
  const float* shares = shares_of(a, t, first);
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  if (warp < count) {  // a warp a head, a lane a share
    const float* share = shares + (warp * kSplits + lane) * floats;
    const float top = lane < parts ? __ldcg(share) : -FLT_MAX;
    const float sum = lane < parts ? __ldcg(share + 1) : 0.0f;
    const float largest = over_warp(top, [](float x, float y) { return fmaxf(x, y); });
    const float fade = __expf(top - largest);
    weights[warp][lane] = fade / warp_sum(sum * fade);
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < count * d; i += blockDim.x) {
    const int64_t g = i / d, element = i % d;
    const float* share = shares + g * kSplits * floats + 2 + element;
    float value = 0;
#pragma unroll 8
    for (int64_t s = 0; s < parts; ++s) value += weights[g][s] * __ldcg(share + s * floats);
    static_cast<T*>(a.out)[(t * a.heads + first + g) * d + element] = narrowed<T>(value);
  }
}

/// Several shares of one element as one: f(i, 0 or 1 or 2 + element) reads share i.
template <int kCount, class F>
__device__ void merge(int64_t element, float& top, float& sum, float& value, F&& f) {
  float tops[kCount], sums[kCount], values[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    tops[i] = f(i, 0);
    sums[i] = f(i, 1);
    values[i] = f(i, 2 + element);
  }
  top = tops[0];
#pragma unroll
  for (int i = 1; i < kCount; ++i) top = fmaxf(top, tops[i]);
  sum = value = 0;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float fade = __expf(tops[i] - top);
    sum += sums[i] * fade;
    value += values[i] * fade;
  }
}

/// A row of a head in the registers of a warp, kPer elements a lane, turned; all lanes call it.
/// head_dim is kPer * 32, so that element i's partner lies 16 lanes away.
template <class T, int kPer>
__device__ void turn(const T* cos, const T* sin, int lane, float (&x)[kPer]) {
  float c[kPer], s[kPer];
  load_lane<T, kPer>(cos, lane, kPer * kWarp, c);
  load_lane<T, kPer>(sin, lane, kPer * kWarp, s);
#pragma unroll
  for (int j = 0; j < kPer; ++j) {
    const float partner = __shfl_xor_sync(~0u, x[j], kWarp / 2);
    x[j] = rounded<T>(rounded<T>(x[j] * c[j]) +
                      rounded<T>((lane < kWarp / 2 ? -partner : partner) * s[j]));
  }
}

struct Attention {
  Attend a;
  Rotate r;  // where the kernel turns q and k itself
  int cluster;
};

/// kTurns: q, and k and v of this step, come as they were multiplied, and the kernel puts the
/// latter two into the cache; else they have been turned and are there.
template <class T, int kPer, int kShared, bool kTurns>
__global__ void attend_kernel(const Attention all) {
  const Attend& a = all.a;
  const int64_t split = blockIdx.x, t = blockIdx.z;
  const Seen seen(a, t, all.cluster);
  if (split >= seen.splits) return;  // a whole cluster
  const Shared share(a);
  const int64_t kv_head = blockIdx.y / share.chunks;
  const int64_t first_of_group = blockIdx.y % share.chunks * kMostShared;
  const int shared_heads = static_cast<int>(
      share.group - first_of_group < kShared ? share.group - first_of_group : int64_t{kShared});
  const int64_t d = a.head_dim;
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp;
  const int64_t first = seen.begin + split * seen.each;
  const int64_t last = first + seen.each < seen.end ? first + seen.each : seen.end;
  const int64_t first_head = kv_head * share.group + first_of_group;
  const T* keys = static_cast<const T*>(a.keys) + kv_head * a.capacity * d;
  const T* values = static_cast<const T*>(a.values) + kv_head * a.capacity * d;
  const T *cos = static_cast<const T*>(all.r.cos), *sin = static_cast<const T*>(all.r.sin);

  // Positions of earlier steps need no waiting; those of this one were written just before.
  float k[kAtOnce][kPer], v[kAtOnce][kPer];
  const int64_t old = *a.position;
  const auto load_new = [&](int64_t at, float(&key)[kPer], float(&value)[kPer]) {
    if constexpr (kTurns) {
      const int64_t kv_stride = all.r.stride > 0 ? all.r.stride : a.kv_heads * d;
      const int64_t from = (at - old) * kv_stride + kv_head * d;
      load_lane<T, kPer>(static_cast<const T*>(all.r.k) + from, lane, d, key);
      load_lane<T, kPer>(static_cast<const T*>(all.r.v) + from, lane, d, value);
      turn<T, kPer>(cos + at * d, sin + at * d, lane, key);
      if (at - old != t || first_of_group != 0) return;  // each row has one writer
      const int64_t to = (kv_head * a.capacity + at) * d + lane * kPer;
#pragma unroll
      for (int j = 0; j < kPer; ++j) {
        static_cast<T*>(all.r.keys)[to + j] = narrowed<T>(key[j]);
        static_cast<T*>(all.r.values)[to + j] = narrowed<T>(value[j]);
      }
    } else {
      load_lane<T, kPer>(keys + at * d, lane, d, key);
      load_lane<T, kPer>(values + at * d, lane, d, value);
    }
  };
  const auto load = [&](int64_t s, bool before, bool after) {
#pragma unroll
    for (int p = 0; p < kAtOnce; ++p) {  // past the last: it again, with no weight
      const int64_t at = s + p < last ? s + p : last - 1;
      if (at < old) {
        if (!before) continue;
        load_lane<T, kPer>(keys + at * d, lane, d, k[p]);
        load_lane<T, kPer>(values + at * d, lane, d, v[p]);
      } else if (after) {
        load_new(at, k[p], v[p]);
      }
    }
  };
  int64_t s = first + warp * kAtOnce;
  if (s < last) load(s, true, false);
  follow();

  const float scale = 1.0f / sqrtf(static_cast<float>(d));
  float q[kShared][kPer], acc[kShared][kPer], top[kShared], sum[kShared];
  const int64_t q_stride = a.q_stride > 0 ? a.q_stride : a.heads * d;
#pragma unroll
  for (int g = 0; g < kShared; ++g) {
    top[g] = -FLT_MAX;
    sum[g] = 0;
    if (g < shared_heads)
      load_lane<T, kPer>(static_cast<const T*>(a.q) + t * q_stride + (first_head + g) * d, lane, d,
                         q[g]);
  }
  if (s < last) load(s, false, true);
#pragma unroll
  for (int g = 0; g < kShared; ++g) {
    if constexpr (kTurns) turn<T, kPer>(cos + (old + t) * d, sin + (old + t) * d, lane, q[g]);
#pragma unroll
    for (int j = 0; j < kPer; ++j) {
      acc[g][j] = 0;
      q[g][j] *= scale;
    }
  }
  while (s < last) {
#pragma unroll
    for (int g = 0; g < kShared; ++g) {
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
    s += kAttendWarps * kAtOnce;
    if (s < last) load(s, true, true);
  }

  // The warps' shares, merged into the block's, which stands behind them.
  extern __shared__ float shares[];  // [warps + 1][most heads of a block][d + 2]
  const int64_t floats = partial_floats(d), most = share.most();
#pragma unroll
  for (int g = 0; g < kShared; ++g) {
    if (g >= shared_heads) break;
    float* mine = shares + (warp * most + g) * floats;
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
  float* const merged = shares + kAttendWarps * most * floats;
  for (int64_t i = threadIdx.x; i < shared_heads * d; i += blockDim.x) {
    const int64_t g = i / d, element = i % d;
    float* out = merged + g * floats;
    float largest, total, value;
    merge<kAttendWarps>(element, largest, total, value,
                        [&](int w, int64_t at) { return shares[(w * most + g) * floats + at]; });
    out[2 + element] = value;
    if (element == 0) {
      out[0] = largest;
      out[1] = total;
    }
  }
  // Then the cluster's, of which every block makes a part.
  const auto put = [&](int64_t part, int64_t parts, int64_t g, int64_t element, float largest,
                       float total, float value) {
    if (parts == 1) {
      static_cast<T*>(a.out)[(t * a.heads + first_head + g) * d + element] =
          narrowed<T>(value / total);
      return;
    }
    float* out = shares_of(a, t, first_head + g) + part * floats;
    out[2 + element] = value;
    if (element == 0) {
      out[0] = largest;
      out[1] = total;
    }
  };
  int64_t parts = seen.splits;
#if __CUDA_ARCH__ >= 900
  if (all.cluster == kCluster) {
    parts /= kCluster;
    const unsigned here = cuda::shared_address(merged);
    cuda::cluster_arrive();
    cuda::cluster_wait();
    for (int64_t i = split % kCluster * blockDim.x + threadIdx.x; i < shared_heads * d;
         i += kCluster * blockDim.x) {
      const int64_t g = i / d, element = i % d;
      float largest, total, value;
      merge<kCluster>(element, largest, total, value, [&](int rank, int64_t at) {
        return cuda::load_cluster(cuda::cluster_address(
            here + static_cast<unsigned>(g * floats + at) * sizeof(float), rank));
      });
      put(split / kCluster, parts, g, element, largest, total, value);
    }
    cuda::cluster_arrive();
    cuda::cluster_wait();  // nobody leaves whose memory is still read
  } else
#endif
  {
    __syncthreads();
    for (int64_t i = threadIdx.x; i < shared_heads * d; i += blockDim.x) {
      const int64_t g = i / d, element = i % d;
      const float* own = merged + g * floats;
      put(split, parts, g, element, own[0], own[1], own[2 + element]);
    }
  }
  if (parts == 1) return;
  auto* counters = reinterpret_cast<unsigned*>(static_cast<float*>(a.workspace) + share_floats(a));
  if (is_last(counters + t * gridDim.y + blockIdx.y, static_cast<unsigned>(seen.splits)))
    combine<T>(a, t, first_head, shared_heads, parts);
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
  const int64_t from = a.stride > 0 ? i / a.width * a.stride + i % a.width : i;
  const float up = widened(static_cast<const T*>(a.up)[from]);
  static_cast<T*>(a.out)[i] = narrowed<T>(
      a.gate == nullptr
          ? activated(a.activation, up)
          : rounded<T>(activated(a.activation, widened(static_cast<const T*>(a.gate)[from]))) * up);
}

/// The largest logit so far.
struct Best {
  float value = -FLT_MAX;
  int place = INT_MAX;
  int odd = 0;  // whether a logit is not a finite number
  __device__ void take(float other, int at) {
    if (other > value || (other == value && at < place)) {
      value = other;
      place = at;
    }
  }
  /// That of the block, in its first thread.
  __device__ void over_block() {
    __shared__ float values[kWarp];
    __shared__ int places[kWarp];
    for (int step = kWarp / 2; step > 0; step /= 2)
      take(__shfl_xor_sync(~0u, value, step), __shfl_xor_sync(~0u, place, step));
    __syncthreads();
    if (threadIdx.x % kWarp == 0) {
      values[threadIdx.x / kWarp] = value;
      places[threadIdx.x / kWarp] = place;
    }
    odd = __syncthreads_or(odd);
    if (threadIdx.x == 0)
      for (int warp = 1; warp < static_cast<int>(blockDim.x) / kWarp; ++warp)
        take(values[warp], places[warp]);
  }
};

constexpr int kWidenThreads = 256;
constexpr int64_t kWidenBlocks =
    kWidenWorkspaceBytes / sizeof(Best) - 1;  // the last holds a counter

template <class T>
__global__ void widen_kernel(Widen w) {
  follow();
  Best best;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < w.count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float value = widened(static_cast<const T*>(w.logits)[i]);
    w.wide[i] = value;
    best.odd |= !(fabsf(value) <= FLT_MAX);
    best.take(value, static_cast<int>(i));
  }
  best.over_block();
  auto* all = static_cast<Best*>(w.workspace);
  if (threadIdx.x == 0) all[blockIdx.x] = best;
  if (!is_last(reinterpret_cast<unsigned*>(all + kWidenBlocks), gridDim.x)) return;
  best = Best();
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    best.take(__ldcg(&all[block].value), __ldcg(&all[block].place));
    best.odd |= __ldcg(&all[block].odd);
  }
  best.over_block();
  if (threadIdx.x == 0) *w.best = best.odd ? -1 : best.place;
}

/// Whether this device runs the code for compute capability 9.0, which launches a kernel before the
/// one ahead of it is complete and knows clusters; others run what is made from that for 8.0.
bool hopper() {
  static const bool is = [] {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return major == 9 && minor == 0;
  }();
  return is;
}

template <class Operands>
void launch(void (*kernel)(Operands), dim3 blocks, int64_t threads, size_t shared, void* queue,
            const Operands& operands, int cluster = 1) {
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>((threads + kWarp - 1) / kWarp * kWarp));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(queue);
  config.attrs = attributes;
  if (hopper()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  if (cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs++].val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  }
  cudaLaunchKernelEx(&config, kernel, operands);
}

unsigned count(int64_t blocks) { return static_cast<unsigned>(blocks); }

void gather(const Gather& g, void* queue) {
  with_dtype(g.dtype, [&](auto element) {
    launch(gather_kernel<decltype(element)>,
           dim3(count(g.tokens), count(std::min<int64_t>((g.width + 255) / 256, 65535))), 256, 0,
           queue, g);
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
  const int64_t counters = a.tokens * a.kv_heads * Shared(a).chunks;
  return static_cast<size_t>(share_floats(a) + counters) * sizeof(float);
}

template <class T, int kShared, bool kTurns>
void attend_of(const Attend& a, const Rotate& r, void* queue) {
  const Shared share(a);
  const dim3 blocks(count(kSplits), count(a.kv_heads * share.chunks), count(a.tokens));
  const auto shared =
      static_cast<size_t>((kAttendWarps + 1) * share.most() * partial_floats(a.head_dim)) *
      sizeof(float);  // 73 KiB for 8 heads of 256
  const auto kernel = a.head_dim <= 64    ? attend_kernel<T, 2, kShared, kTurns>
                      : a.head_dim <= 128 ? attend_kernel<T, 4, kShared, kTurns>
                                          : attend_kernel<T, 8, kShared, kTurns>;
  if (shared > 48 * 1024)
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                         static_cast<int>(shared));
  const int cluster = hopper() ? kCluster : 1;
  launch(kernel, blocks, kAttendWarps * kWarp, shared, queue, Attention{a, r, cluster}, cluster);
}

template <bool kTurns>
void attend_turned(const Attend& a, const Rotate& r, void* queue) {
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    Shared(a).most() <= 4 ? attend_of<T, 4, kTurns>(a, r, queue)
                          : attend_of<T, kMostShared, kTurns>(a, r, queue);
  });
}

void attend(const Attend& a, void* queue) { attend_turned<false>(a, {}, queue); }

void rotate_and_attend(const Rotate& r, const Attend& a, void* queue) {
  const bool fits = a.head_dim == 64 || a.head_dim == 128 || a.head_dim == 256;
  if (fits && r.cos != nullptr) return attend_turned<true>(a, r, queue);
  rotate(r, queue);
  attend(a, queue);
}

void activate(const Activate& a, void* queue) {
  constexpr int64_t kThreads = 256;
  with_dtype(a.dtype, [&](auto element) {
    launch(activate_kernel<decltype(element)>, count((a.count + kThreads - 1) / kThreads), kThreads,
           0, queue, a);
  });
}

void widen(const Widen& w, void* queue) {
  with_dtype(w.dtype, [&](auto element) {
    const int64_t blocks = (w.count + 2 * kWidenThreads - 1) / (2 * kWidenThreads);
    launch(widen_kernel<decltype(element)>, count(std::clamp<int64_t>(blocks, 1, kWidenBlocks)),
           kWidenThreads, 0, queue, w);
  });
}

}  // namespace

const Operations kCuda = {
    "cuda_sm80",       gather,   normalize, rotate, attend_workspace_bytes, attend,
    rotate_and_attend, activate, widen};

}  // namespace lacuna::kernels::decode
