// The operations of a decode step on a GPU. None of them moves more than a few hundred KiB, so what
// counts is how soon each is done: one block for a row, a thread for a few elements, and attention
// split over the positions so that every multiprocessor takes part.
//
//   attend   block (split, key head, token)   8 warps, of which each has one query head of the key
//            head and a part of the split's positions, four at a time: 8 lanes a position, a lane
//            holds head_dim / 8 elements. It turns q and the key of this step itself.
//            -> largest score, sum, weighted values of the split, in float32; the last block of
//            them to be done adds up the splits in their order: the same bits at every run
//
// Instructions are cold at every launch, so short code counts more than few operations: the same
// work with query heads in a loop, unrolled, took twice as long, and so did clusters of splits
// summed in shared memory.
//
// Positions and ids come from device memory, so that a recorded step serves every token. Every
// kernel lets the next one be launched early: a linear operation fetches its first weights while
// the small kernel before it runs. What earlier steps have left (keys, values, angles) is fetched
// before the kernel ahead is done.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cfloat>
#include <type_traits>

#include "lacuna/kernels/decode/cuda_sm80_decode.h"

#include "lacuna/kernels/cuda/sm80_follow.cuh"

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
  __syncthreads();
  if (threadIdx.x == 0) {
    unsigned before;  // the barriers carry the order over to all threads
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(counter)
                 : "memory");
    last = before == blocks - 1;
    if (last) *counter = 0;
  }
  __syncthreads();
  return last;
}

template <class T>
__global__ void gather_kernel(Gather g) {
  cuda::follow();
  const int64_t t = blockIdx.x;
  const int64_t row = g.ids != nullptr  ? g.ids[t]
                      : g.own_sequences ? g.position[t] + g.offset
                                        : *g.position + g.offset + t;
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
  cuda::follow();

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
  const bool own = r.sequence_stride > 0;
  const int64_t head = is_key ? h - r.heads : h;
  const int64_t position = own ? r.position[t] : *r.position + t;
  const int64_t q_stride = r.stride > 0 ? r.stride : r.heads * d;
  const int64_t kv_stride = r.stride > 0 ? r.stride : r.kv_heads * d;
  const T* from = is_key ? static_cast<const T*>(r.k) + t * kv_stride + head * d
                         : static_cast<const T*>(r.q) + t * q_stride + head * d;
  const int64_t slot = (own ? t * r.sequence_stride : 0) + (head * r.capacity + position) * d;
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
  cuda::follow();
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
constexpr int kSplits = 32;
constexpr int kGroupLanes = 8;  // of a position
constexpr int kGroups = kWarp / kGroupLanes;

constexpr int kMostTokens = 64;  // of a step

/// What attend_kernel reads and writes. Without `cos` q has been turned, and the keys and values of
/// this step are in the cache; else the kernel turns q and k and puts k and v into the cache.
struct Attention {
  const void *q, *k, *v, *cos, *sin;
  void *keys, *values, *out;
  const int32_t* position;
  unsigned* counters;  // [kMostTokens][blocks of a token], at the same place for every `tokens`
  float* workspace;    // headers [token][head][split], values [token][head][split][d]
  int64_t sequence_stride;
  int tokens, heads, kv_heads, d, capacity, window, q_stride, kv_stride;
  int shared, chunks;  // query heads of a key head that a block takes, blocks for all of them
  __host__ __device__ int64_t shares() const { return int64_t{tokens} * heads * kSplits; }
  int64_t counter_count() const { return int64_t{kMostTokens} * kv_heads * chunks; }
};

/// Element i of a row that lies in words.
template <class T>
__device__ float element(const unsigned* words, int i) {
  if constexpr (sizeof(T) == 4) {
    return __uint_as_float(words[i]);
  } else {
    const unsigned word = words[i / 2];
    if constexpr (std::is_same_v<T, __nv_bfloat16>)
      return __uint_as_float(i % 2 != 0 ? word & 0xffff0000u : word << 16);
    else
      return __half2float(__ushort_as_half(static_cast<unsigned short>(word >> (i % 2 * 16))));
  }
}
/// Two elements rounded into a word.
template <class T>
__device__ unsigned packed(float low, float high) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const unsigned*>(&both);
  }
}
__device__ unsigned bits_of(float v) { return __float_as_uint(v); }
__device__ unsigned bits_of(__nv_bfloat16 v) { return __bfloat16_as_ushort(v); }
__device__ unsigned bits_of(__half v) { return __half_as_ushort(v); }

/// A lane's kPer elements of a row, as they lie in memory; those past `d` are 0. With kWhole there
/// are none.
template <class T, int kPer, bool kWhole>
struct Piece {
  static constexpr int kOfWord = 4 / sizeof(T), kWords = kPer / kOfWord;
  alignas(16) unsigned words[kWords];
  __device__ void load(const T* row, int part, int d) {
    if constexpr (kWhole) {
#pragma unroll
      for (int j = 0; j < kWords; j += 4) {
        const uint4 four = *reinterpret_cast<const uint4*>(row + part * kPer + j * kOfWord);
        words[j] = four.x;
        words[j + 1] = four.y;
        words[j + 2] = four.z;
        words[j + 3] = four.w;
      }
    } else {
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        words[j] = 0;
#pragma unroll
        for (int i = 0; i < kOfWord; ++i) {
          const int place = part * kPer + j * kOfWord + i;
          if (place < d) words[j] |= bits_of(row[place]) << (i * 16);
        }
      }
    }
  }
  __device__ void store(T* row, int part) const {  // a whole row
#pragma unroll
    for (int j = 0; j < kWords; j += 4)
      *reinterpret_cast<uint4*>(row + part * kPer + j * kOfWord) =
          make_uint4(words[j], words[j + 1], words[j + 2], words[j + 3]);
  }
  __device__ float at(int i) const { return element<T>(words, i); }
  /// The row turned; the partner of element i lies half the lanes away. All lanes call it.
  __device__ void turn(const Piece& cos, const Piece& sin, int part) {
    const float sign = part < kGroupLanes / 2 ? -1.0f : 1.0f;
#pragma unroll
    for (int j = 0; j < kWords; ++j) {
      const unsigned partners = __shfl_xor_sync(~0u, words[j], kGroupLanes / 2);
      const int i = j * kOfWord;
      const float other = sign * element<T>(&partners, 0);
      if constexpr (kOfWord == 1) {
        words[j] =
            __float_as_uint(__fadd_rn(__fmul_rn(at(i), cos.at(i)), __fmul_rn(other, sin.at(i))));
      } else {
        const float other1 = sign * element<T>(&partners, 1);
        const unsigned own = packed<T>(at(i) * cos.at(i), at(i + 1) * cos.at(i + 1));
        const unsigned turned = packed<T>(other * sin.at(i), other1 * sin.at(i + 1));
        words[j] = packed<T>(element<T>(&own, 0) + element<T>(&turned, 0),
                             element<T>(&own, 1) + element<T>(&turned, 1));
      }
    }
  }
};

/// The sum over the lanes of one position.
__device__ float group_sum(float v) {
#pragma unroll
  for (int step = kGroupLanes / 2; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

/// The shares of all splits for the heads first .. first + count - 1 of a token, added up in their
/// order.
template <class T>
__device__ void combine(const Attention& a, int t, int first, int count, int splits) {
  __shared__ float weights[kAttendWarps][kSplits];
  constexpr int kAhead = 20;  // shares asked for at once
  const int warp = threadIdx.x / kWarp, lane = threadIdx.x % kWarp, d = a.d;
  const int64_t share = (int64_t{t} * a.heads + first) * kSplits;
  const float* const values = a.workspace + 2 * a.shares() + share * d;
  float ahead[kAhead];
  const auto ask = [&](int i) {
    const float* from = values + (i / d * (kSplits - 1) * d + i);
#pragma unroll
    for (int s = 0; s < kAhead; ++s) ahead[s] = s < splits ? __ldcg(from + s * d) : 0.0f;
  };
  int i = threadIdx.x;
  if (i < count * d) ask(i);
  const float* header = a.workspace + 2 * (share + min(warp, count - 1) * kSplits + lane);
  const float top = lane < splits ? __ldcg(header) : -FLT_MAX;  // a warp a head, a lane a split
  const float sum = lane < splits ? __ldcg(header + 1) : 0.0f;
  const float largest = over_warp(top, [](float x, float y) { return fmaxf(x, y); });
  const float fade = __expf(top - largest);
  weights[warp][lane] = fade / warp_sum(sum * fade);
  __syncthreads();
#pragma unroll 1
  while (i < count * d) {
    const int g = i / d;
    float value = 0;
#pragma unroll
    for (int s = 0; s < kAhead; ++s) value += weights[g][s] * ahead[s];
#pragma unroll 1
    for (int s = kAhead; s < splits; ++s)
      value += weights[g][s] * __ldcg(values + (g * (kSplits - 1) * d + i) + s * d);
    static_cast<T*>(a.out)[(int64_t{t} * a.heads + first) * d + i] = narrowed<T>(value);
    i += kAttendWarps * kWarp;
    if (i < count * d) ask(i);
  }
}

template <class T, int kPer, bool kWhole, bool kTurns>
__global__ void __launch_bounds__(kAttendWarps* kWarp, kPer * sizeof(T) <= 32 ? 2 : 1)
    attend_kernel(const Attention a) {
  using Row = Piece<T, kPer, kWhole>;
  constexpr int kRounds = sizeof(Row) >= 128 ? 1 : sizeof(Row) >= 64 ? 2 : 4;  // loads under way
  static_assert(kSplits == kWarp);
  const int warp = __shfl_sync(~0u, threadIdx.x / kWarp, 0), lane = threadIdx.x % kWarp;
  const int group = lane / kGroupLanes, part = lane % kGroupLanes;
  const int split = blockIdx.x, t = blockIdx.z, d = a.d;
  // The first token of this one's sequence in this step, and how many come after that one.
  const int first = a.sequence_stride > 0 ? t : 0, after = t - first;
  // Positions before `old` are of earlier steps; those from there on, `fresh` of them, of this one.
  // (Shuffled, as the warp's number is, so that the compiler knows them to be the same in all
  // lanes.)
  const int old = __shfl_sync(~0u, a.position[first], 0), end = old + after + 1;
  const int begin = a.window > 0 && end > a.window ? end - a.window : 0;
  const int parts = kAttendWarps / a.shared, round = parts * (kGroups * kRounds);
  const int cached = old > begin ? old - begin : 0;
  const int each = ((cached + kSplits - 1) / kSplits + round - 1) / round * round;
  const int splits = each > 0 ? (cached + each - 1) / each : 1;
  if (split >= splits) return;
  const int chunk = blockIdx.y % a.chunks, kv_head = blockIdx.y / a.chunks;
  const int group_heads = a.heads / a.kv_heads, first_of_group = chunk * a.shared;
  const int count = min(group_heads - first_of_group, a.shared);  // heads of this block
  const int first_head = kv_head * group_heads + first_of_group;
  // A warp too many does the last head's work again, or nothing, and nobody reads it.
  const int w_part = warp / a.shared, g = min(warp - w_part * a.shared, count - 1);
  const int last = w_part < parts ? min(begin + (split + 1) * each, begin + cached) : 0;
  const int64_t head_at = first * a.sequence_stride + int64_t{kv_head} * a.capacity * d;
  const T* const keys = static_cast<const T*>(a.keys) + head_at;
  const T* const values = static_cast<const T*>(a.values) + head_at;

  Row k[kRounds], v[kRounds];
  int s = begin + split * each + w_part * (kGroups * kRounds);  // of the warp's first lanes
  const auto load = [&] {
#pragma unroll
    for (int r = 0; r < kRounds; ++r) {
      // Past the last: it again.
      const int64_t at = int64_t{min(s + group + r * kGroups, last - 1)} * d;
      k[r].load(keys + at, part, d);
      v[r].load(values + at, part, d);
    }
  };
  if (s < last) load();
  Row cos, sin;
  const auto load_angles = [&](int place) {
    cos.load(static_cast<const T*>(a.cos) + int64_t{place} * d, part, d);
    sin.load(static_cast<const T*>(a.sin) + int64_t{place} * d, part, d);
  };
  if constexpr (kTurns) load_angles(old + after);
  cuda::follow();

  float top = -FLT_MAX, sum = 0, q[kPer], acc[kPer];
  const auto absorb = [&](const Row* key, const Row* value, auto rounds, int at, int until) {
    constexpr int kCount = decltype(rounds)::value;
    float score[kCount], larger = top;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      score[r] = 0;
#pragma unroll
      for (int i = 0; i < kPer; ++i) score[r] += q[i] * key[r].at(i);
    }
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      score[r] = group_sum(score[r]);
      if (at + r * kGroups < until) larger = fmaxf(larger, score[r]);
    }
    const float fade = __expf(top - larger);
    top = larger;
    sum *= fade;
#pragma unroll
    for (int i = 0; i < kPer; ++i) acc[i] *= fade;
#pragma unroll
    for (int r = 0; r < kCount; ++r) {
      const float weight = at + r * kGroups < until ? __expf(score[r] - larger) : 0.0f;
      sum += weight;
#pragma unroll
      for (int i = 0; i < kPer; ++i) acc[i] += weight * value[r].at(i);
    }
  };
  Row asked, key, value;
  asked.load(static_cast<const T*>(a.q) + int64_t{t} * a.q_stride + (first_head + g) * d, part, d);
  // The positions of this step go to the first warps of the last split.
  const auto load_fresh = [&](int place) {
    if constexpr (kTurns) {
      const int64_t from = int64_t{first + place - old} * a.kv_stride + kv_head * d;
      key.load(static_cast<const T*>(a.k) + from, part, d);
      value.load(static_cast<const T*>(a.v) + from, part, d);
    } else {
      key.load(keys + int64_t{place} * d, part, d);
      value.load(values + int64_t{place} * d, part, d);
    }
  };
  int fresh = split == splits - 1 && w_part == 0 ? max(begin, old) : end;
  if (fresh < end) load_fresh(min(fresh + group, end - 1));
  if constexpr (kTurns) asked.turn(cos, sin, part);
  const float scale = rsqrtf(static_cast<float>(d));
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    q[i] = asked.at(i) * scale;
    acc[i] = 0;
  }
#pragma unroll 1
  while (s < last) {
    absorb(k, v, std::integral_constant<int, kRounds>(), s + group, last);
    s += round;
    if (s < last) load();
  }
#pragma unroll 1
  while (fresh < end) {
    const int at = fresh + group, place = min(at, end - 1);
    if constexpr (kTurns) {
      if (after > 0) load_angles(place);  // with one token they are those of q
      key.turn(cos, sin, part);
      if (at == old + after && warp == 0 && chunk == 0) {  // each row has one writer
        const int64_t to = head_at + int64_t{place} * d;
        key.store(static_cast<T*>(a.keys) + to, part);
        value.store(static_cast<T*>(a.values) + to, part);
      }
    }
    absorb(&key, &value, std::integral_constant<int, 1>(), at, end);
    fresh += kGroups;
    if (fresh < end) load_fresh(min(fresh + group, end - 1));
  }

  // The four positions of a warp, then the warps of a head, become one share.
  extern __shared__ float warps[];  // [warp][d + 2]
  float largest = top;
#pragma unroll
  for (int step = kGroupLanes; step < kWarp; step *= 2)
    largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, step));
  const float fade = __expf(top - largest);
  sum *= fade;
#pragma unroll
  for (int step = kGroupLanes; step < kWarp; step *= 2) sum += __shfl_xor_sync(~0u, sum, step);
  float* const mine = warps + warp * (d + 2);
#pragma unroll
  for (int i = 0; i < kPer; ++i) {
    acc[i] *= fade;
#pragma unroll
    for (int step = kGroupLanes; step < kWarp; step *= 2)
      acc[i] += __shfl_xor_sync(~0u, acc[i], step);
  }
  if (group == 0) {
#pragma unroll
    for (int i = 0; i < kPer; ++i)
      if (kWhole || part * kPer + i < d) mine[2 + part * kPer + i] = acc[i];
  }
  if (lane == 0) {
    mine[0] = largest;
    mine[1] = sum;
  }
  __syncthreads();
  const int64_t share = (int64_t{t} * a.heads + first_head) * kSplits + split;
#pragma unroll 1
  for (int i = threadIdx.x; i < count * d; i += kAttendWarps * kWarp) {
    const int h = i / d, element = i - h * d;
    float top_of_all = -FLT_MAX, total = 0, sum_of_all = 0;
#pragma unroll 1
    for (int w = h; w < parts * a.shared; w += a.shared)
      top_of_all = fmaxf(top_of_all, warps[w * (d + 2)]);
#pragma unroll 1
    for (int w = h; w < parts * a.shared; w += a.shared) {
      const float* one = warps + w * (d + 2);
      const float share_fade = __expf(one[0] - top_of_all);
      total += one[1] * share_fade;
      sum_of_all += one[2 + element] * share_fade;
    }
    if (splits == 1) {
      static_cast<T*>(a.out)[(int64_t{t} * a.heads + first_head) * d + i] =
          narrowed<T>(sum_of_all / total);
      continue;
    }
    const int64_t to = share + h * kSplits;
    a.workspace[2 * a.shares() + to * d + element] = sum_of_all;
    if (element == 0) {
      a.workspace[2 * to] = top_of_all;
      a.workspace[2 * to + 1] = total;
    }
  }
  if (splits == 1) return;
  if (is_last(a.counters + t * gridDim.y + blockIdx.y, static_cast<unsigned>(splits)))
    combine<T>(a, t, first_head, count, splits);
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
  cuda::follow();
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
  cuda::follow();
  Best best;
  const int64_t row = blockIdx.y, first = row * w.count;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < w.count;
       i += int64_t{gridDim.x} * blockDim.x) {
    const float value = widened(static_cast<const T*>(w.logits)[first + i]);
    w.wide[first + i] = value;
    best.odd |= !(fabsf(value) <= FLT_MAX);
    best.take(value, static_cast<int>(i));
  }
  best.over_block();
  auto* all = reinterpret_cast<Best*>(static_cast<char*>(w.workspace) + row * kWidenWorkspaceBytes);
  if (threadIdx.x == 0) all[blockIdx.x] = best;
  if (!is_last(reinterpret_cast<unsigned*>(all + kWidenBlocks), gridDim.x)) return;
  best = Best();
  for (unsigned block = threadIdx.x; block < gridDim.x; block += blockDim.x) {
    best.take(__ldcg(&all[block].value), __ldcg(&all[block].place));
    best.odd |= __ldcg(&all[block].odd);
  }
  best.over_block();
  if (threadIdx.x == 0) w.best[row] = best.odd ? -1 : best.place;
}

template <class Operands>
void launch(void (*kernel)(Operands), dim3 blocks, int64_t threads, size_t shared, void* queue,
            const Operands& operands) {
  cuda::launch_following(kernel, operands, blocks,
                         static_cast<int>((threads + kWarp - 1) / kWarp * kWarp), shared,
                         /*overlap_previous=*/true, static_cast<cudaStream_t>(queue));
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

/// r: where the kernel turns q and k itself.
Attention attention_of(const Attend& a, const Rotate& r) {
  const int64_t group = a.heads / a.kv_heads;
  Attention all = {};
  all.q = a.q;
  all.k = r.k;
  all.v = r.v;
  all.cos = r.cos;
  all.sin = r.sin;
  all.keys = const_cast<void*>(a.keys);
  all.values = const_cast<void*>(a.values);
  all.out = a.out;
  all.position = a.position;
  all.tokens = static_cast<int>(a.tokens);
  all.heads = static_cast<int>(a.heads);
  all.kv_heads = static_cast<int>(a.kv_heads);
  all.d = static_cast<int>(a.head_dim);
  all.capacity = static_cast<int>(a.capacity);
  all.window = static_cast<int>(a.window);
  all.sequence_stride = a.sequence_stride;
  all.q_stride = static_cast<int>(a.q_stride > 0 ? a.q_stride : a.heads * a.head_dim);
  all.kv_stride = static_cast<int>(r.stride > 0 ? r.stride : a.kv_heads * a.head_dim);
  all.shared = static_cast<int>(std::min<int64_t>(group, kAttendWarps));
  all.chunks = static_cast<int>((group + all.shared - 1) / all.shared);
  all.counters = static_cast<unsigned*>(a.workspace);
  all.workspace = static_cast<float*>(a.workspace) + all.counter_count();
  return all;
}

size_t attend_workspace_bytes(const Attend& a) {
  const Attention all = attention_of(a, {});
  return static_cast<size_t>(all.counter_count() + all.shares() * (all.d + 2)) * sizeof(float);
}

template <class T, bool kWhole, bool kTurns>
void launch_attend(const Attention& a, void* queue) {
  const auto kernel = a.d <= 64    ? attend_kernel<T, 8, kWhole, kTurns>
                      : a.d <= 128 ? attend_kernel<T, 16, kWhole, kTurns>
                                   : attend_kernel<T, 32, kWhole, kTurns>;
  const auto shared = static_cast<size_t>(kAttendWarps * (a.d + 2)) * sizeof(float);
  launch(kernel, dim3(kSplits, count(a.kv_heads * a.chunks), count(a.tokens)), kAttendWarps * kWarp,
         shared, queue, a);
}

/// Whether rows of the cache and of `all` can be read 16 bytes at a time, by 8 lanes evenly.
bool whole_rows(const Attention& a, int64_t bytes) {
  if (a.d != 64 && a.d != 128 && a.d != 256) return false;
  for (const void* at : {a.q, a.k, a.v, a.cos, a.sin, static_cast<const void*>(a.keys),
                         static_cast<const void*>(a.values)})
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0) return false;
  return a.q_stride * bytes % 16 == 0 && a.kv_stride * bytes % 16 == 0;
}

void attend(const Attend& a, void* queue) {
  const Attention all = attention_of(a, {});
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    whole_rows(all, sizeof(T)) ? launch_attend<T, true, false>(all, queue)
                               : launch_attend<T, false, false>(all, queue);
  });
}

void rotate_and_attend(const Rotate& r, const Attend& a, void* queue) {
  const Attention all = attention_of(a, r);
  with_dtype(a.dtype, [&](auto element) {
    using T = decltype(element);
    if (r.cos != nullptr && whole_rows(all, sizeof(T)))
      return launch_attend<T, true, true>(all, queue);
    rotate(r, queue);
    attend(a, queue);
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
  with_dtype(w.dtype, [&](auto element) {
    const int64_t blocks = (w.count + 2 * kWidenThreads - 1) / (2 * kWidenThreads);
    launch(widen_kernel<decltype(element)>,
           dim3(count(std::clamp<int64_t>(blocks, 1, kWidenBlocks)), count(w.rows)), kWidenThreads,
           0, queue, w);
  });
}

}  // namespace

const Operations kCuda = {
    "cuda_sm80",       gather,   normalize, rotate, attend_workspace_bytes, attend,
    rotate_and_attend, activate, widen};

}  // namespace lacuna::kernels::decode
