// The operations of a decode step in vectors of 16 floats, which the compiler turns into the
// registers of the instruction set that a file is compiled for: one of 512 bits, two of 256, four
// of 128. The order of every sum is that of the lanes.
//
//   attend, one head and token:   q |d0..15|d16..31| ...       in registers
//     scores of 16 positions      K |s: d0..15|d16..31| ...    16 sums of 16 lanes, added up by a
//                                   |s+1: ...                  tree of shuffles into one vector
//     blocks of 128 positions     softmax with a running maximum: acc and sum are scaled down when
//                                 a block brings a larger one (https://arxiv.org/abs/1805.02867)
//     acc += p[s] V[s]            64 elements of the head at a time stay in registers
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "lacuna/core/half.h"
#include "lacuna/kernels/decode/cpu.h"

namespace lacuna::kernels::decode {
namespace {

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));

#define LACUNA_INLINE static inline __attribute__((always_inline))

LACUNA_INLINE Floats all(float value) { return Floats{} + value; }
template <class To, class From>
LACUNA_INLINE To bits(From from) {
  return std::bit_cast<To>(from);
}
LACUNA_INLINE Floats select(Ints where, Floats yes, Floats no) { return where ? yes : no; }
LACUNA_INLINE Floats larger(Floats a, Floats b) { return select(a > b, a, b); }

// --- elements ------------------------------------------------------------------------------------

/// How elements of a type become floats and back.
template <DType dtype>
struct Element;

template <>
struct Element<DType::kF32> {
  using Stored = float;
  LACUNA_INLINE Floats widen(Floats v) { return v; }
  LACUNA_INLINE Floats narrow(Floats v) { return v; }
  using Vector = Floats;
};

template <>
struct Element<DType::kBF16> {
  using Stored = uint16_t;
  using Vector = Halves;
  LACUNA_INLINE Floats widen(Halves v) {
    return bits<Floats>(__builtin_convertvector(v, Words) << 16);
  }
  LACUNA_INLINE Halves narrow(Floats v) {
    const Words w = bits<Words>(v);
    const Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
    const Ints nan = bits<Ints>(w & 0x7fffffffu) > 0x7f800000;
    const Words kept = nan ? (w >> 16) | 0x40u : rounded;
    return __builtin_convertvector(kept, Halves);
  }
};

template <>
struct Element<DType::kF16> {
  using Stored = uint16_t;
  using Vector = Halves;
  LACUNA_INLINE Floats widen(Halves v) {
    const Words w = __builtin_convertvector(v, Words);
    const Words magnitude = (w & 0x7fffu) << 13;
    const Ints special = bits<Ints>(magnitude) >= 0x0f800000;
    const Words scaled = bits<Words>(bits<Floats>(magnitude) * 0x1p112f);
    return bits<Floats>(scaled | (bits<Words>(special) & 0x7f800000u) | ((w & 0x8000u) << 16));
  }
  LACUNA_INLINE Halves narrow(Floats v) {
    Halves out;
    for (int64_t i = 0; i < kLanes; ++i) out[i] = float_to_f16(v[i]);
    return out;
  }
};

/// A matrix of elements behind a plain pointer.
template <DType dtype>
struct Elements {
  using E = Element<dtype>;
  using Stored = typename E::Stored;
  Stored* data = nullptr;

  explicit Elements(const void* at) : data(static_cast<Stored*>(const_cast<void*>(at))) {}
  explicit operator bool() const { return data != nullptr; }

  /// Elements i .. i+15, of which only the first `count` are read; the others are 0.
  __attribute__((always_inline)) Floats load(int64_t i, int64_t count = kLanes) const {
    typename E::Vector v{};
    if (count >= kLanes)
      std::memcpy(&v, data + i, sizeof(v));
    else
      std::memcpy(&v, data + i, static_cast<size_t>(count) * sizeof(Stored));
    return E::widen(v);
  }
  __attribute__((always_inline)) void store(int64_t i, Floats value, int64_t count = kLanes) const {
    const typename E::Vector v = E::narrow(value);
    if (count >= kLanes)
      std::memcpy(data + i, &v, sizeof(v));
    else
      std::memcpy(data + i, &v, static_cast<size_t>(count) * sizeof(Stored));
  }
};

/// A value as it comes back from memory of this type.
template <DType dtype>
LACUNA_INLINE Floats rounded(Floats v) {
  return Element<dtype>::widen(Element<dtype>::narrow(v));
}

template <class F>
void with_dtype(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kF32:
      return f.template operator()<DType::kF32>();
    case DType::kBF16:
      return f.template operator()<DType::kBF16>();
    default:
      return f.template operator()<DType::kF16>();
  }
}

/// Calls f(first, count) for vectors that cover 0 .. total-1.
template <class F>
LACUNA_INLINE void for_vectors(int64_t total, F&& f) {
  int64_t i = 0;
  for (; i + kLanes <= total; i += kLanes) f(i, kLanes);
  if (i < total) f(i, total - i);
}

// --- arithmetic ----------------------------------------------------------------------------------

LACUNA_INLINE float sum_of(Floats v) {
  float lane[kLanes];
  std::memcpy(lane, &v, sizeof(v));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

LACUNA_INLINE float largest_of(Floats v) {
  float best = v[0];
  for (int64_t i = 1; i < kLanes; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

/// [sums of neighbours in a, sums of neighbours in b]
LACUNA_INLINE Floats pair_sums(Floats a, Floats b) {
  return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

/// Lane i = the sum of v[i].
LACUNA_INLINE Floats sums_of(const Floats (&v)[kLanes]) {
  Floats a[8], b[4];
  for (int i = 0; i < 8; ++i) a[i] = pair_sums(v[2 * i], v[2 * i + 1]);
  for (int i = 0; i < 4; ++i) b[i] = pair_sums(a[2 * i], a[2 * i + 1]);
  return pair_sums(pair_sums(b[0], b[1]), pair_sums(b[2], b[3]));
}

/// e^x within 2 units of the last place up to e^88, which stands for all that is larger; 0 stands
/// for what lies below e^-87, NaN stays.
LACUNA_INLINE Floats exponential(Floats x) {
  const Ints tiny = x < -87.0f;
  x = select(x > 88.0f, all(88.0f), select(tiny, all(-87.0f), x));
  const Floats shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to a whole number
  const Floats whole = shifted - 12582912.0f;
  const Floats rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats y = all(1.0f / 5040);
  for (const float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = y * rest + c;
  const Ints power = (bits<Ints>(shifted) << 23) + (127 << 23);
  return select(tiny, Floats{}, y * bits<Floats>(power));
}

// --- the operations ------------------------------------------------------------------------------

/// Work below which waking other threads takes longer than doing it.
constexpr int64_t kElementsOfATask = 8192;

const Executor& executor_of(void* queue) { return *static_cast<const Executor*>(queue); }

void gather(const Gather& g, void*) {
  with_dtype(g.dtype, [&]<DType kType>() {
    const Elements<kType> table(g.table), out(g.out);
    for (int64_t t = 0; t < g.tokens; ++t) {
      const int64_t row = g.ids != nullptr  ? g.ids[t]
                          : g.own_sequences ? g.position[t] + g.offset
                                            : *g.position + g.offset + t;
      for_vectors(g.width, [&](int64_t i, int64_t count) {
        Floats value = table.load(row * g.width + i, count);
        if (g.add) value += out.load(t * g.width + i, count);
        out.store(t * g.width + i, value, count);
      });
    }
  });
}

template <DType kType>
void normalize_row(const Normalize& n, int64_t row) {
  const Elements<kType> x(n.x), delta(n.delta), sum(n.sum), weight(n.weight), bias(n.bias),
      out(n.out);
  const int64_t first = row * n.width;
  const auto value = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    // What an earlier pass has kept is not added again, for `sum` may be x.
    const Floats v = x.load(first + i, count);
    return delta ? rounded<kType>(v + delta.load(first + i, count)) : v;
  };
  // In three passes over a row that stays in the nearest cache: the sum, the moments, the result.
  if (sum && (delta || n.sum != n.x)) {
    for_vectors(n.width,
                [&](int64_t i, int64_t count) { sum.store(first + i, value(i, count), count); });
  }
  if (!out) return;
  const auto kept = [&](int64_t i, int64_t count) __attribute__((always_inline)) {
    return sum ? sum.load(first + i, count) : value(i, count);
  };
  Floats total{}, squares{};
  for_vectors(n.width, [&](int64_t i, int64_t count) {
    const Floats v = kept(i, count);
    total += v;
    squares += v * v;
  });
  const auto width = static_cast<float>(n.width);
  if (!bias) {
    const Floats scale = all(1.0f / std::sqrt(sum_of(squares) / width + n.epsilon));
    for_vectors(n.width, [&](int64_t i, int64_t count) {
      out.store(first + i, weight.load(i, count) * rounded<kType>(kept(i, count) * scale), count);
    });
    return;
  }
  const float mean = sum_of(total) / width;
  Floats spread{};
  for_vectors(n.width, [&](int64_t i, int64_t count) {
    Floats distance = kept(i, count) - mean;
    for (int64_t lane = count; lane < kLanes; ++lane) distance[lane] = 0;
    spread += distance * distance;
  });
  const Floats scale = all(1.0f / std::sqrt(sum_of(spread) / width + n.epsilon));
  for_vectors(n.width, [&](int64_t i, int64_t count) {
    const Floats centered = (kept(i, count) - mean) * scale;
    out.store(first + i, centered * weight.load(i, count) + bias.load(i, count), count);
  });
}

void normalize(const Normalize& n, void* queue) {
  with_dtype(n.dtype, [&]<DType kType>() {
    const int64_t rows = std::max<int64_t>(1, kElementsOfATask / std::max<int64_t>(1, n.width));
    executor_of(queue).parallel_for((n.rows + rows - 1) / rows, [&](int64_t task) {
      for (int64_t row = task * rows; row < std::min(n.rows, (task + 1) * rows); ++row)
        normalize_row<kType>(n, row);
    });
  });
}

/// out = x cos + turned(x) sin for one head; the products are rounded before they are added.
template <DType kType>
void turn(const Elements<kType>& x, int64_t from, const Elements<kType>& cos,
          const Elements<kType>& sin, int64_t angles, int64_t head_dim, const Elements<kType>& out,
          int64_t to) {
  const int64_t half = head_dim / 2;
  for_vectors(half, [&](int64_t i, int64_t count) {
    const Floats low = x.load(from + i, count), high = x.load(from + half + i, count);
    const auto angle = [&](const Elements<kType>& of, int64_t at) {
      return of.load(angles + at, count);
    };
    out.store(to + i, rounded<kType>(low * angle(cos, i)) + rounded<kType>(-high * angle(sin, i)),
              count);
    out.store(
        to + half + i,
        rounded<kType>(high * angle(cos, half + i)) + rounded<kType>(low * angle(sin, half + i)),
        count);
  });
}

void rotate(const Rotate& r, void*) {
  with_dtype(r.dtype, [&]<DType kType>() {
    const Elements<kType> q(r.q), k(r.k), v(r.v), cos(r.cos), sin(r.sin), keys(r.keys),
        values(r.values);
    const int64_t d = r.head_dim;
    const int64_t q_stride = r.stride > 0 ? r.stride : r.heads * d;
    const int64_t kv_stride = r.stride > 0 ? r.stride : r.kv_heads * d;
    for (int64_t t = 0; t < r.tokens; ++t) {
      const bool own = r.sequence_stride > 0;
      const int64_t position = own ? r.position[t] : *r.position + t, angles = position * d;
      const int64_t sequence = own ? t * r.sequence_stride : 0;
      if (cos)
        for (int64_t h = 0; h < r.heads; ++h)
          turn(q, t * q_stride + h * d, cos, sin, angles, d, q, t * q_stride + h * d);
      for (int64_t h = 0; h < r.kv_heads; ++h) {
        const int64_t from = t * kv_stride + h * d;
        const int64_t to = sequence + (h * r.capacity + position) * d;
        const auto bytes = static_cast<size_t>(d) * sizeof(*k.data);
        if (cos)
          turn(k, from, cos, sin, angles, d, keys, to);
        else
          std::memcpy(keys.data + to, k.data + from, bytes);
        std::memcpy(values.data + to, v.data + from, bytes);
      }
    }
  });
}

constexpr int64_t kBlock = 128;  // positions of one softmax

template <DType kType>
void attend_head(const Attend& a, int64_t token, int64_t head) {
  const Elements<kType> queries(a.q), keys(a.keys), values(a.values), out(a.out);
  const int64_t d = a.head_dim, vectors = (d + kLanes - 1) / kLanes;
  const int64_t kv_head = head / (a.heads / a.kv_heads);
  const bool own = a.sequence_stride > 0;
  const int64_t base = kv_head * a.capacity * d + (own ? token * a.sequence_stride : 0);
  const int64_t place = (token * a.heads + head) * d;
  const int64_t asks = a.q_stride > 0 ? token * a.q_stride + head * d : place;
  const auto lanes = [&](int64_t vector) { return std::min(kLanes, d - vector * kLanes); };
  const float scale = 1.0f / std::sqrt(static_cast<float>(d));

  Floats query[kMaxHeadDim / kLanes], result[kMaxHeadDim / kLanes] = {};
  for (int64_t j = 0; j < vectors; ++j)
    query[j] = queries.load(asks + j * kLanes, lanes(j)) * scale;
  const int64_t end = own ? a.position[token] + 1 : *a.position + token + 1;
  const int64_t begin = a.window > 0 ? std::max<int64_t>(0, end - a.window) : 0;
  float highest = -std::numeric_limits<float>::infinity(), sum = 0;
  for (int64_t first = begin; first < end; first += kBlock) {
    const int64_t positions = std::min(kBlock, end - first);
    alignas(64) float weight[kBlock];
    Floats block_highest = all(-std::numeric_limits<float>::infinity());
    for (int64_t s = 0; s < positions; s += kLanes) {
      const int64_t count = std::min(kLanes, positions - s);
      Floats dot[kLanes] = {};
      for (int64_t i = 0; i < count; ++i) {
        const int64_t key = base + (first + s + i) * d;
        for (int64_t j = 0; j < vectors; ++j)
          dot[i] += query[j] * keys.load(key + j * kLanes, lanes(j));
      }
      Floats score = sums_of(dot);
      for (int64_t i = count; i < kLanes; ++i) score[i] = -std::numeric_limits<float>::infinity();
      std::memcpy(weight + s, &score, sizeof(score));
      block_highest = larger(block_highest, score);
    }
    const float top = std::max(highest, largest_of(block_highest));
    Floats block_sum{};
    for (int64_t s = 0; s < positions; s += kLanes) {
      Floats score;
      std::memcpy(&score, weight + s, sizeof(score));
      score = exponential(score - top);
      block_sum += score;
      std::memcpy(weight + s, &score, sizeof(score));
    }
    const float fade = first == begin ? 0.0f : exponential(all(highest - top))[0];
    sum = sum * fade + sum_of(block_sum);
    highest = top;
    constexpr int64_t kAtOnce = 4;  // vectors
    for (int64_t j = 0; j < vectors; j += kAtOnce) {
      const int64_t wide = std::min(kAtOnce, vectors - j);
      Floats part[kAtOnce];
      for (int64_t i = 0; i < kAtOnce; ++i) part[i] = i < wide ? result[j + i] * fade : Floats{};
      const int64_t from = base + first * d + j * kLanes;
      if (wide == kAtOnce && (j + kAtOnce) * kLanes <= d) {
        for (int64_t s = 0; s < positions; ++s)
          for (int64_t i = 0; i < kAtOnce; ++i)
            part[i] += weight[s] * values.load(from + s * d + i * kLanes);
      } else {
        for (int64_t s = 0; s < positions; ++s)
          for (int64_t i = 0; i < wide; ++i)
            part[i] += weight[s] * values.load(from + s * d + i * kLanes, lanes(j + i));
      }
      for (int64_t i = 0; i < wide; ++i) result[j + i] = part[i];
    }
  }
  const float share = 1.0f / sum;
  for (int64_t j = 0; j < vectors; ++j) out.store(place + j * kLanes, result[j] * share, lanes(j));
}

size_t attend_workspace_bytes(const Attend&) { return 0; }

void attend(const Attend& a, void* queue) {
  with_dtype(a.dtype, [&]<DType kType>() {
    const int64_t reads = (*a.position + a.tokens) * a.head_dim;  // of one head and token
    const int64_t heads = std::max<int64_t>(1, kElementsOfATask / std::max<int64_t>(1, reads));
    const int64_t total = a.tokens * a.heads;
    executor_of(queue).parallel_for((total + heads - 1) / heads, [&](int64_t task) {
      for (int64_t i = task * heads; i < std::min(total, (task + 1) * heads); ++i)
        attend_head<kType>(a, i / a.heads, i % a.heads);
    });
  });
}

void rotate_and_attend(const Rotate& r, const Attend& a, void* queue) {
  rotate(r, queue);
  attend(a, queue);
}

LACUNA_INLINE Floats activated(Activation activation, Floats x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1.0f + exponential(-x));
    case Activation::kRelu:
      return select(x < 0.0f, Floats{}, x);
    case Activation::kRelu2: {
      const Floats positive = select(x < 0.0f, Floats{}, x);
      return positive * positive;
    }
    case Activation::kGelu:
      for (int64_t i = 0; i < kLanes; ++i)
        x[i] = 0.5f * x[i] * (1.0f + std::erf(x[i] * 0.70710678f));
      return x;
    case Activation::kGeluTanh:
      for (int64_t i = 0; i < kLanes; ++i)
        x[i] =
            0.5f * x[i] * (1.0f + std::tanh(0.79788456f * (x[i] + 0.044715f * x[i] * x[i] * x[i])));
      return x;
  }
  return x;
}

void activate(const Activate& a, void* queue) {
  with_dtype(a.dtype, [&]<DType kType>() {
    const Elements<kType> gate(a.gate), up(a.up), out(a.out);
    const int64_t width = a.stride > 0 ? a.width : a.count;
    const int64_t rows = width > 0 ? a.count / width : 0;
    const int64_t tasks = (width + kElementsOfATask - 1) / kElementsOfATask;  // of a row
    executor_of(queue).parallel_for(rows * tasks, [&](int64_t task) {
      const int64_t row = task / tasks, first = task % tasks * kElementsOfATask;
      const int64_t from = row * a.stride + first, to = row * width + first;
      for_vectors(std::min(kElementsOfATask, width - first), [&](int64_t i, int64_t count) {
        const Floats u = up.load(from + i, count);
        const Floats value =
            gate ? rounded<kType>(activated(a.activation, gate.load(from + i, count))) * u
                 : activated(a.activation, u);
        out.store(to + i, value, count);
      });
    });
  });
}

void widen_row(const Widen& w) {
  with_dtype(w.dtype, [&]<DType kType>() {
    const Elements<kType> logits(w.logits);
    const Elements<DType::kF32> wide(w.wide);
    Floats highest = all(-std::numeric_limits<float>::infinity());
    Ints odd{};
    for_vectors(w.count, [&](int64_t i, int64_t count) {
      Floats v = logits.load(i, count);
      wide.store(i, v, count);
      odd |= bits<Ints>((bits<Words>(v) & 0x7f800000u) == 0x7f800000u);  // infinity or NaN
      for (int64_t lane = count; lane < kLanes; ++lane)
        v[lane] = -std::numeric_limits<float>::infinity();
      highest = larger(highest, v);
    });
    const float best = largest_of(highest);
    bool finite = true;
    for (int64_t lane = 0; lane < kLanes; ++lane) finite &= odd[lane] == 0;
    *w.best = -1;
    for (int64_t i = 0; finite && i < w.count; ++i)
      if (w.wide[i] == best) {
        *w.best = static_cast<int32_t>(i);
        break;
      }
  });
}

void widen(const Widen& w, void*) {
  for (int64_t row = 0; row < w.rows; ++row) {
    Widen one = w;
    one.logits = static_cast<const std::byte*>(w.logits) +
                 row * w.count * static_cast<int64_t>(size_bytes(w.dtype));
    one.wide += row * w.count;
    one.best += row;
    widen_row(one);
  }
}

constexpr Operations operations(const char* name) {
  return {name,     gather, normalize, rotate, attend_workspace_bytes, attend, rotate_and_attend,
          activate, widen};
}

}  // namespace
}  // namespace lacuna::kernels::decode
