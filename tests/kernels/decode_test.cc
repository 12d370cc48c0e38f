// The operations of a decode step against float64, in every instruction set of this machine.
#include "lacuna/kernels/decode/decode.h"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <vector>

#include "lacuna/core/random.h"
#include "lacuna/format/element.h"

namespace lacuna::kernels::decode {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

/// Elements of a type between two canaries, NaN until written, at an odd multiple of the element.
class Array {
 public:
  Array(DType dtype, int64_t size)
      : dtype_(dtype), size_(size), bytes_(static_cast<size_t>((size + 2 * kEdge) * width())) {
    for (int64_t i = -kEdge; i < size + kEdge; ++i) set(i, kNaN);
    for (int64_t i = 0; i < kEdge; ++i) set(-1 - i, kCanary), set(size + i, kCanary);
  }
  static Array random(DType dtype, int64_t size, uint64_t seed, double scale = 1) {
    Array array(dtype, size);
    for (int64_t i = 0; i < size; ++i)
      array.set(i, static_cast<float>(scale *
                                      (2 * random_uniform(seed, 3, static_cast<uint64_t>(i)) - 1)));
    return array;
  }
  void* data() { return bytes_.data() + kEdge * width(); }
  double operator[](int64_t i) const {
    return format::read_float(bytes_.data(), dtype_, i + kEdge);
  }
  void set(int64_t i, float value) { format::write_float(bytes_.data(), dtype_, i + kEdge, value); }
  int64_t size() const { return size_; }
  bool edges_whole() const {
    for (int64_t i = 0; i < kEdge; ++i)
      if ((*this)[-1 - i] != kCanary || (*this)[size_ + i] != kCanary) return false;
    return true;
  }
  bool operator==(const Array& other) const { return bytes_ == other.bytes_; }

 private:
  static constexpr int64_t kEdge = 33;
  static constexpr float kCanary = 77;
  int64_t width() const { return static_cast<int64_t>(size_bytes(dtype_)); }
  DType dtype_;
  int64_t size_;
  std::vector<std::byte> bytes_;
};

/// One rounding of the type.
double unit(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kBF16 ? 0x1p-8 : 0x1p-11;
}

/// Half the distance of the smallest numbers of the type.
double smallest(DType dtype) { return dtype == DType::kF16 ? 0x1p-25 : 0; }

double as(DType dtype, double value) {
  float out = 0;
  format::write_float(&out, dtype, 0, static_cast<float>(value));
  return format::read_float(&out, dtype, 0);
}

struct Case {
  const Operations* operations;
  DType dtype;
};

class Decode : public ::testing::TestWithParam<Case> {
 protected:
  const Operations& run() const { return *GetParam().operations; }
  DType dtype() const { return GetParam().dtype; }
  /// |got - expected| <= roundings * unit * size + what float32 sums of `terms` lose.
  void expect_near(double got, double expected, double roundings, double size, double terms,
                   const std::string& where) const {
    ASSERT_LE(std::abs(got - expected),
              size * (roundings * unit(dtype()) + (terms + 8) * 0x1p-23) + 1e-7)
        << where << ": " << got << " for " << expected;
  }
  ThreadPool pool_{3};
  Executor executor_ = pool_.executor();
};

TEST_P(Decode, GathersRowsAndAddsThem) {
  for (const int64_t width : {1, 15, 16, 17, 33, 64}) {
    Array table = Array::random(dtype(), 9 * width, 1);
    const std::vector<int32_t> ids = {8, 0, 3};
    const int32_t position = 4;
    Array out(dtype(), 3 * width);
    run().gather({.dtype = dtype(),
                  .tokens = 3,
                  .width = width,
                  .table = table.data(),
                  .ids = ids.data(),
                  .out = out.data()},
                 &executor_);
    for (int64_t t = 0; t < 3; ++t)
      for (int64_t i = 0; i < width; ++i)
        ASSERT_EQ(out[t * width + i], table[ids[static_cast<size_t>(t)] * width + i]);
    const Array before = out;
    run().gather({.dtype = dtype(),
                  .tokens = 3,
                  .width = width,
                  .table = table.data(),
                  .position = &position,
                  .offset = 2,
                  .add = true,
                  .out = out.data()},
                 &executor_);
    for (int64_t t = 0; t < 3; ++t)
      for (int64_t i = 0; i < width; ++i)
        ASSERT_EQ(out[t * width + i],
                  as(dtype(), before[t * width + i] + table[(6 + t) * width + i]));
    EXPECT_TRUE(out.edges_whole());
  }
}

TEST_P(Decode, NormalizesWhatIsLeftOfTheResidual) {
  for (const int64_t width : {1, 2, 15, 16, 17, 31, 64, 100, 576})
    for (const int64_t rows : {1, 3, 40})
      for (const bool layer : {false, true}) {
        const double epsilon = 1e-5;
        Array x = Array::random(dtype(), rows * width, 1, 3), sum = x;
        Array delta = Array::random(dtype(), rows * width, 2);
        Array weight = Array::random(dtype(), width, 3), bias = Array::random(dtype(), width, 4);
        Array out(dtype(), rows * width);
        run().normalize({.dtype = dtype(),
                         .rows = rows,
                         .width = width,
                         .x = sum.data(),
                         .delta = delta.data(),
                         .sum = sum.data(),
                         .weight = weight.data(),
                         .bias = layer ? bias.data() : nullptr,
                         .epsilon = static_cast<float>(epsilon),
                         .out = out.data()},
                        &executor_);
        // In place, without a sum to keep: the same result.
        Array in_place = x;
        run().normalize({.dtype = dtype(),
                         .rows = rows,
                         .width = width,
                         .x = in_place.data(),
                         .delta = delta.data(),
                         .weight = weight.data(),
                         .bias = layer ? bias.data() : nullptr,
                         .epsilon = static_cast<float>(epsilon),
                         .out = in_place.data()},
                        &executor_);
        EXPECT_TRUE(in_place == out);
        EXPECT_TRUE(out.edges_whole() && sum.edges_whole());
        for (int64_t row = 0; row < rows; ++row) {
          double mean = 0, squares = 0;
          for (int64_t i = 0; i < width; ++i) {
            const int64_t at = row * width + i;
            ASSERT_EQ(sum[at], as(dtype(), x[at] + delta[at]));
            mean += sum[at] / static_cast<double>(width);
          }
          for (int64_t i = 0; i < width; ++i) {
            const double v = sum[row * width + i] - (layer ? mean : 0);
            squares += v * v / static_cast<double>(width);
          }
          const double scale = 1 / std::sqrt(squares + epsilon);
          for (int64_t i = 0; i < width; ++i) {
            const double v = (sum[row * width + i] - (layer ? mean : 0)) * scale;
            const double expected = v * weight[i] + (layer ? bias[i] : 0);
            // A mean is known to the roundings of its terms, which the scale enlarges.
            expect_near(out[row * width + i], expected, 2,
                        std::abs(v * weight[i]) + (layer ? 1 + 4 * scale : 0), 10,
                        fmt::format("width {} row {} element {}", width, row, i));
          }
        }
      }
}

TEST_P(Decode, AddsWithoutANorm) {
  Array x = Array::random(dtype(), 50, 1), delta = Array::random(dtype(), 50, 2);
  Array sum(dtype(), 50);
  run().normalize({.dtype = dtype(),
                   .rows = 2,
                   .width = 25,
                   .x = x.data(),
                   .delta = delta.data(),
                   .sum = sum.data()},
                  &executor_);
  for (int64_t i = 0; i < 50; ++i) ASSERT_EQ(sum[i], as(dtype(), x[i] + delta[i]));
}

TEST_P(Decode, RotatesAndKeepsKeysAndValues) {
  for (const int64_t d : {2, 8, 30, 32, 34, 64})
    for (const bool turns : {true, false}) {
      const int64_t tokens = 3, heads = 4, kv_heads = 2, capacity = 11;
      const int32_t position = 6;
      Array q = Array::random(dtype(), tokens * heads * d, 1);
      const Array q_before = q;
      Array k = Array::random(dtype(), tokens * kv_heads * d, 2);
      Array v = Array::random(dtype(), tokens * kv_heads * d, 3);
      Array cos = Array::random(dtype(), capacity * d, 4);
      Array sin = Array::random(dtype(), capacity * d, 5);
      Array keys(dtype(), kv_heads * capacity * d), values(dtype(), kv_heads * capacity * d);
      run().rotate({.dtype = dtype(),
                    .tokens = tokens,
                    .heads = heads,
                    .kv_heads = kv_heads,
                    .head_dim = d,
                    .capacity = capacity,
                    .q = q.data(),
                    .k = k.data(),
                    .v = v.data(),
                    .cos = turns ? cos.data() : nullptr,
                    .sin = turns ? sin.data() : nullptr,
                    .keys = keys.data(),
                    .values = values.data(),
                    .position = &position},
                   &executor_);
      const auto turned = [&](const Array& x, int64_t first, int64_t i, int64_t at) {
        if (!turns) return x[first + i];
        const double other = i < d / 2 ? -x[first + i + d / 2] : x[first + i - d / 2];
        return as(dtype(), as(dtype(), x[first + i] * cos[at * d + i]) +
                               as(dtype(), other * sin[at * d + i]));
      };
      // In float32 a fused multiply-add saves the rounding of a product of up to 1.
      const double bound = dtype() == DType::kF32 ? 0x1p-23 : 0;
      for (int64_t t = 0; t < tokens; ++t)
        for (int64_t i = 0; i < d; ++i) {
          for (int64_t h = 0; h < heads; ++h) {
            const int64_t first = (t * heads + h) * d;
            ASSERT_NEAR(q[first + i], turned(q_before, first, i, position + t), bound);
          }
          for (int64_t h = 0; h < kv_heads; ++h) {
            const int64_t first = (t * kv_heads + h) * d;
            const int64_t to = (h * capacity + position + t) * d + i;
            ASSERT_NEAR(keys[to], turned(k, first, i, position + t), bound);
            ASSERT_EQ(values[to], v[first + i]);
          }
        }
      for (int64_t h = 0; h < kv_heads; ++h)
        for (int64_t s = 0; s < capacity; ++s)
          if (s < position || s >= position + tokens) {
            EXPECT_TRUE(std::isnan(keys[(h * capacity + s) * d]));
            EXPECT_TRUE(std::isnan(values[(h * capacity + s) * d]));
          }
      EXPECT_TRUE(q.edges_whole() && keys.edges_whole() && values.edges_whole());
    }
}

// What one product of q, k and v leaves: each token's side by side.
TEST_P(Decode, RotatesAttendsAndActivatesRowsOfOneProduct) {
  const int64_t d = 20, tokens = 3, heads = 4, kv_heads = 2, capacity = 11;
  const int64_t width = (heads + 2 * kv_heads) * d;
  const int32_t position = 6;
  Array all = Array::random(dtype(), tokens * width, 1);
  Array q(dtype(), tokens * heads * d), k(dtype(), tokens * kv_heads * d),
      v(dtype(), tokens * kv_heads * d);
  for (int64_t t = 0; t < tokens; ++t) {
    const auto split = [&](Array& to, int64_t first, int64_t count) {
      for (int64_t i = 0; i < count; ++i) to.set(t * count + i, all[t * width + first + i]);
    };
    split(q, 0, heads * d);
    split(k, heads * d, kv_heads * d);
    split(v, (heads + kv_heads) * d, kv_heads * d);
  }
  Array cos = Array::random(dtype(), capacity * d, 4),
        sin = Array::random(dtype(), capacity * d, 5);
  const auto attended = [&](void* q_at, void* k_at, void* v_at, int64_t stride) {
    Array keys = Array::random(dtype(), kv_heads * capacity * d, 6);
    Array values = Array::random(dtype(), kv_heads * capacity * d, 7);
    Array out(dtype(), tokens * heads * d);
    std::vector<double> result;
    run().rotate_and_attend({.dtype = dtype(),
                             .tokens = tokens,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = d,
                             .capacity = capacity,
                             .stride = stride,
                             .q = q_at,
                             .k = k_at,
                             .v = v_at,
                             .cos = cos.data(),
                             .sin = sin.data(),
                             .keys = keys.data(),
                             .values = values.data(),
                             .position = &position},
                            {.dtype = dtype(),
                             .tokens = tokens,
                             .heads = heads,
                             .kv_heads = kv_heads,
                             .head_dim = d,
                             .capacity = capacity,
                             .q_stride = stride,
                             .q = q_at,
                             .keys = keys.data(),
                             .values = values.data(),
                             .position = &position,
                             .out = out.data()},
                            &executor_);
    for (int64_t i = 0; i < tokens * heads * d; ++i) result.push_back(out[i]);
    for (int64_t i = 0; i < kv_heads * capacity * d; ++i) result.push_back(keys[i] + values[i]);
    return result;
  };
  auto* first = static_cast<std::byte*>(all.data());
  const auto bytes = static_cast<int64_t>(size_bytes(dtype()));
  EXPECT_EQ(
      attended(first, first + heads * d * bytes, first + (heads + kv_heads) * d * bytes, width),
      attended(q.data(), k.data(), v.data(), 0));

  const int64_t inner = 9000;  // more than one task
  Array both = Array::random(dtype(), 2 * 2 * inner, 8), out(dtype(), 2 * inner);
  run().activate({.dtype = dtype(),
                  .count = 2 * inner,
                  .width = inner,
                  .stride = 2 * inner,
                  .gate = both.data(),
                  .up = static_cast<std::byte*>(both.data()) + inner * bytes,
                  .out = out.data()},
                 &executor_);
  for (int64_t row = 0; row < 2; ++row) {
    Array one(dtype(), inner);
    auto* gate = static_cast<std::byte*>(both.data()) + row * 2 * inner * bytes;
    run().activate({.dtype = dtype(),
                    .count = inner,
                    .gate = gate,
                    .up = gate + inner * bytes,
                    .out = one.data()},
                   &executor_);
    for (int64_t i = 0; i < inner; ++i) ASSERT_EQ(out[row * inner + i], one[i]);
  }
}

TEST_P(Decode, AttendsToWhatItMaySee) {
  struct Shape {
    int64_t d, heads, kv_heads, tokens, window;
    int32_t position;
  };
  const std::vector<Shape> shapes = {
      {64, 9, 3, 1, 0, 0},   {64, 9, 3, 1, 0, 15},   {64, 9, 3, 1, 0, 16},    {64, 4, 4, 1, 0, 127},
      {64, 4, 4, 1, 0, 128}, {64, 8, 2, 16, 0, 300}, {128, 4, 1, 2, 0, 257},  {16, 2, 2, 3, 0, 40},
      {20, 2, 1, 3, 0, 140}, {80, 4, 2, 1, 0, 33},   {96, 2, 2, 1, 0, 200},   {256, 2, 1, 1, 0, 50},
      {8, 2, 1, 17, 0, 5},   {1, 1, 1, 2, 0, 3},     {64, 4, 2, 1, 100, 300}, {64, 4, 2, 5, 3, 7},
      {64, 4, 2, 5, 129, 0}};
  for (const Shape& s : shapes) {
    const int64_t capacity = s.position + s.tokens + 5;
    Array q = Array::random(dtype(), s.tokens * s.heads * s.d, 1, 2);
    Array keys = Array::random(dtype(), s.kv_heads * capacity * s.d, 2, 2);
    Array values = Array::random(dtype(), s.kv_heads * capacity * s.d, 3);
    for (int64_t h = 0; h < s.kv_heads; ++h)  // never written: must not be read
      for (int64_t i = (s.position + s.tokens) * s.d; i < capacity * s.d; ++i) {
        keys.set(h * capacity * s.d + i, kNaN);
        values.set(h * capacity * s.d + i, kNaN);
      }
    Array out(dtype(), s.tokens * s.heads * s.d);
    const Attend problem{.dtype = dtype(),
                         .tokens = s.tokens,
                         .heads = s.heads,
                         .kv_heads = s.kv_heads,
                         .head_dim = s.d,
                         .capacity = capacity,
                         .window = s.window,
                         .q = q.data(),
                         .keys = keys.data(),
                         .values = values.data(),
                         .position = &s.position,
                         .out = out.data()};
    run().attend(problem, &executor_);
    EXPECT_TRUE(out.edges_whole());
    Array alone(dtype(), s.tokens * s.heads * s.d);
    Attend serial = problem;
    serial.out = alone.data();
    Executor one = Executor::serial();
    run().attend(serial, &one);
    EXPECT_TRUE(alone == out) << "the same bits on any number of threads";
    for (int64_t t = 0; t < s.tokens; ++t)
      for (int64_t h = 0; h < s.heads; ++h) {
        const int64_t base = h / (s.heads / s.kv_heads) * capacity * s.d;
        const int64_t end = s.position + t + 1;
        const int64_t begin = s.window > 0 ? std::max<int64_t>(0, end - s.window) : 0;
        std::vector<double> weight;
        double sum = 0;
        for (int64_t p = begin; p < end; ++p) {
          double dot = 0;
          for (int64_t i = 0; i < s.d; ++i)
            dot += q[(t * s.heads + h) * s.d + i] * keys[base + p * s.d + i];
          weight.push_back(std::exp(dot / std::sqrt(static_cast<double>(s.d))));
          sum += weight.back();
        }
        for (int64_t i = 0; i < s.d; ++i) {
          double expected = 0;
          for (int64_t p = begin; p < end; ++p)
            expected += weight[static_cast<size_t>(p - begin)] / sum * values[base + p * s.d + i];
          // A score is a sum of d products of up to 4, its error the relative one of a weight.
          expect_near(out[(t * s.heads + h) * s.d + i], expected, 1, 1,
                      8 * std::sqrt(static_cast<double>(s.d)),
                      fmt::format("d {} token {} head {} element {}", s.d, t, h, i));
        }
      }
  }
}

TEST_P(Decode, AttendsThroughScoresOfAnySize) {
  const int64_t d = 16, positions = 400;
  const int32_t position = positions - 1;
  Array q(dtype(), d), keys(dtype(), positions * d), values(dtype(), positions * d),
      out(dtype(), d);
  for (int64_t i = 0; i < d; ++i) q.set(i, 8);
  for (int64_t p = 0; p < positions; ++p)
    for (int64_t i = 0; i < d; ++i) {
      keys.set(p * d + i, p == 211 ? 8.0f : -8.0f);  // scores of 256 and -256
      values.set(p * d + i, static_cast<float>(p));
    }
  run().attend({.dtype = dtype(),
                .tokens = 1,
                .heads = 1,
                .kv_heads = 1,
                .head_dim = d,
                .capacity = positions,
                .q = q.data(),
                .keys = keys.data(),
                .values = values.data(),
                .position = &position,
                .out = out.data()},
               &executor_);
  for (int64_t i = 0; i < d; ++i) ASSERT_EQ(out[i], as(dtype(), 211));
}

double exact(Activation activation, double x) {
  switch (activation) {
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::numbers::sqrt2));
    case Activation::kGeluTanh:
      return 0.5 * x *
             (1 + std::tanh(std::sqrt(2 / std::numbers::pi) * (x + 0.044715 * x * x * x)));
    case Activation::kRelu:
      return x > 0 ? x : 0;
    case Activation::kRelu2:
      return x > 0 ? x * x : 0;
  }
  return 0;
}

TEST_P(Decode, ActivatesWithAndWithoutAGate) {
  for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                      Activation::kRelu, Activation::kRelu2})
    for (const int64_t count : {1, 15, 16, 17, 1000, 40000}) {
      Array gate = Array::random(dtype(), count, 1, 12), up = Array::random(dtype(), count, 2);
      Array out(dtype(), count), plain = gate;
      const auto call = [&](void* gates, void* ups, void* to) {
        run().activate({.dtype = dtype(),
                        .activation = activation,
                        .count = count,
                        .gate = gates,
                        .up = ups,
                        .out = to},
                       &executor_);
      };
      call(gate.data(), up.data(), out.data());
      call(nullptr, plain.data(), plain.data());
      EXPECT_TRUE(out.edges_whole() && plain.edges_whole());
      for (int64_t i = 0; i < count; ++i) {
        const double value = exact(activation, gate[i]);
        // Near -12 a GELU is the small difference of two numbers near 1.
        const double lost = std::abs(gate[i]) * 0x1p-22 + 2 * smallest(dtype());
        ASSERT_LE(std::abs(plain[i] - value), std::abs(value) * (unit(dtype()) + 0x1p-20) + lost);
        ASSERT_LE(std::abs(out[i] - value * up[i]),
                  std::abs(value * up[i]) * (2.1 * unit(dtype()) + 0x1p-20) + lost + 1e-6);
      }
    }
}

TEST_P(Decode, KeepsWhatIsNotANumber) {
  Array x(dtype(), 3), out(dtype(), 3);
  x.set(0, kNaN), x.set(1, kInfinity), x.set(2, -100);
  run().activate({.dtype = dtype(), .count = 3, .up = x.data(), .out = out.data()}, &executor_);
  EXPECT_TRUE(std::isnan(out[0]));
  EXPECT_EQ(out[1], kInfinity);
  EXPECT_NEAR(out[2], 0, 1e-30);
}

TEST_P(Decode, WidensLogitsAndFindsTheFirstOfTheLargest) {
  for (const int64_t count : {1, 2, 15, 16, 17, 50, 4099}) {
    Array logits = Array::random(dtype(), count, 1);
    const auto call = [&](std::vector<float>& wide) {
      int32_t best = -7;
      run().widen({.dtype = dtype(),
                   .count = count,
                   .logits = logits.data(),
                   .wide = wide.data(),
                   .best = &best},
                  &executor_);
      return best;
    };
    std::vector<float> wide(static_cast<size_t>(count), kNaN);
    const int64_t place = count / 3;
    logits.set(place, 5), logits.set(count - 1, 5);
    EXPECT_EQ(call(wide), place);
    for (int64_t i = 0; i < count; ++i) ASSERT_EQ(wide[static_cast<size_t>(i)], logits[i]);
    for (int64_t i = 0; i < count; ++i) logits.set(i, -2);
    EXPECT_EQ(call(wide), 0);
    for (const float odd : {kNaN, kInfinity, -kInfinity}) {
      logits.set(count - 1, odd);
      EXPECT_EQ(call(wide), -1);
    }
  }
}

std::vector<Case> cases() {
  std::vector<Case> all;
  for (const Operations* operations : cpu_operations())
    for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16})
      all.push_back({operations, dtype});
  return all;
}

INSTANTIATE_TEST_SUITE_P(Cpu, Decode, ::testing::ValuesIn(cases()), [](const auto& test) {
  return fmt::format("{}_{}", test.param.operations->name, safetensors_name(test.param.dtype));
});

}  // namespace
}  // namespace lacuna::kernels::decode
