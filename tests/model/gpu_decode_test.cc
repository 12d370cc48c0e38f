// The operations of a decode step on a GPU against those of the CPU, which are held to float64
// elsewhere. Every test here needs a GPU.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>

#include "lacuna/kernels/decode/decode.h"
#include "lacuna/kernels/gpu_linear.h"
#include "model/models.h"

namespace lacuna::model {
namespace {

namespace decode = kernels::decode;

/// A buffer on both sides.
struct Pair {
  at::Tensor cpu, gpu;
  explicit Pair(at::Tensor values) : cpu(std::move(values)), gpu(cpu.to(at::kCUDA)) {}
};

class GpuDecode : public ::testing::TestWithParam<at::ScalarType> {
 protected:
  void SetUp() override {
    const auto device = open_device("cuda");
    if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
    if (!kernels::gpu_library().ok())
      GTEST_SKIP() << "needs the GPU kernels: " << kernels::gpu_library().error().message;
    at::manual_seed(5);
  }

  DType dtype() const { return dtype_of(GetParam()); }
  Pair random(at::IntArrayRef shape, double scale = 1) const {
    return Pair((at::randn(shape) * scale).to(GetParam()));
  }

  /// Runs `call` (problem maker, operations, queue) on both and compares `out`.
  template <class Call>
  void compare(Call call, const std::vector<const Pair*>& outs, const std::string& what) const {
    Executor executor = Executor::serial();
    call(/*gpu=*/false, *decode::cpu_operations().front(), &executor);
    call(/*gpu=*/true, *(*kernels::gpu_library())->decode, nullptr);
    const double bound = GetParam() == at::kFloat ? 4e-6 : GetParam() == at::kHalf ? 2e-3 : 1.6e-2;
    for (const Pair* out : outs) {
      const at::Tensor got = out->gpu.cpu().to(at::kDouble), expected = out->cpu.to(at::kDouble);
      EXPECT_TRUE(at::allclose(got, expected, bound, bound, /*equal_nan=*/true))
          << what << ": off by " << (got - expected).abs().max().item<double>();
    }
  }
};

void* at_of(const Pair& pair, bool gpu) { return (gpu ? pair.gpu : pair.cpu).mutable_data_ptr(); }

Pair ints(const std::vector<int32_t>& values) {
  return Pair(at::tensor(at::ArrayRef<int32_t>(values), at::kInt));
}
const int32_t* ints_at(const Pair& pair, bool gpu) {
  return (gpu ? pair.gpu : pair.cpu).const_data_ptr<int32_t>();
}

TEST_P(GpuDecode, GathersRowsAndAddsThem) {
  for (const int64_t width : {1, 33, 576}) {
    const Pair table = random({9, width}), out = random({3, width});
    const Pair ids = ints({8, 0, 3}), position = ints({4});
    for (const bool add : {false, true})
      compare(
          [&](bool gpu, const decode::Operations& run, void* queue) {
            run.gather({.dtype = dtype(),
                        .tokens = 3,
                        .width = width,
                        .table = at_of(table, gpu),
                        .ids = add ? nullptr : ints_at(ids, gpu),
                        .position = ints_at(position, gpu),
                        .offset = 2,
                        .add = add,
                        .out = at_of(out, gpu)},
                       queue);
          },
          {&out}, fmt::format("width {}", width));
  }
}

TEST_P(GpuDecode, Normalizes) {
  for (const int64_t width : {1, 31, 64, 576, 4096, 16384})
    for (const bool layer : {false, true})
      for (const bool keeps : {false, true}) {
        const Pair x = random({5, width}, 3), delta = random({5, width});
        const Pair weight = random({width}), bias = random({width}), out = random({5, width});
        compare(
            [&](bool gpu, const decode::Operations& run, void* queue) {
              run.normalize({.dtype = dtype(),
                             .rows = 5,
                             .width = width,
                             .x = at_of(x, gpu),
                             .delta = at_of(delta, gpu),
                             .sum = keeps ? at_of(x, gpu) : nullptr,
                             .weight = at_of(weight, gpu),
                             .bias = layer ? at_of(bias, gpu) : nullptr,
                             .epsilon = 1e-5f,
                             .out = at_of(out, gpu)},
                            queue);
            },
            {&out, &x}, fmt::format("width {} layer {} keeps {}", width, layer, keeps));
      }
}

TEST_P(GpuDecode, RotatesAndAttends) {
  struct Shape {
    int64_t d, heads, kv_heads, tokens, window;
    int32_t position;
  };
  for (const Shape& s : std::vector<Shape>{{64, 9, 3, 1, 0, 0},
                                           {64, 9, 3, 1, 0, 31},
                                           {64, 32, 8, 5, 0, 500},
                                           {128, 32, 8, 1, 0, 1023},
                                           {128, 16, 1, 2, 0, 33},
                                           {80, 4, 4, 3, 0, 40},
                                           {256, 4, 2, 1, 0, 129},
                                           {16, 2, 2, 16, 7, 60},
                                           {2, 2, 1, 3, 0, 5}}) {
    const int64_t capacity = s.position + s.tokens + 3;
    const Pair q = random({s.tokens, s.heads, s.d}), k = random({s.tokens, s.kv_heads, s.d});
    const Pair v = random({s.tokens, s.kv_heads, s.d}), out = random({s.tokens, s.heads, s.d});
    const Pair keys = random({s.kv_heads, capacity, s.d});
    const Pair values = random({s.kv_heads, capacity, s.d});
    const Pair cos = random({capacity, s.d}), sin = random({capacity, s.d});
    const Pair position = ints({s.position});
    const Pair workspace(at::zeros({16 * 64 * 32 * 260}, at::kFloat));
    for (const bool turns : {true, false})
      compare(
          [&](bool gpu, const decode::Operations& run, void* queue) {
            run.rotate({.dtype = dtype(),
                        .tokens = s.tokens,
                        .heads = s.heads,
                        .kv_heads = s.kv_heads,
                        .head_dim = s.d,
                        .capacity = capacity,
                        .q = at_of(q, gpu),
                        .k = at_of(k, gpu),
                        .v = at_of(v, gpu),
                        .cos = turns ? at_of(cos, gpu) : nullptr,
                        .sin = turns ? at_of(sin, gpu) : nullptr,
                        .keys = at_of(keys, gpu),
                        .values = at_of(values, gpu),
                        .position = ints_at(position, gpu)},
                       queue);
            const decode::Attend attend{.dtype = dtype(),
                                        .tokens = s.tokens,
                                        .heads = s.heads,
                                        .kv_heads = s.kv_heads,
                                        .head_dim = s.d,
                                        .capacity = capacity,
                                        .window = s.window,
                                        .q = at_of(q, gpu),
                                        .keys = at_of(keys, gpu),
                                        .values = at_of(values, gpu),
                                        .position = ints_at(position, gpu),
                                        .out = at_of(out, gpu),
                                        .workspace = at_of(workspace, gpu)};
            ASSERT_LE(run.attend_workspace_bytes(attend), workspace.cpu.nbytes());
            run.attend(attend, queue);
          },
          {&q, &keys, &values, &out},
          fmt::format("d {} heads {} position {} turns {}", s.d, s.heads, s.position, turns));
  }
}

TEST_P(GpuDecode, RotatesAndAttendsAtOnceOverRowsOfOneProduct) {
  struct Shape {
    int64_t d, heads, kv_heads, tokens, window;
    int32_t position;
  };
  for (const Shape& s : std::vector<Shape>{{64, 9, 3, 1, 0, 0},
                                           {64, 32, 8, 5, 0, 500},
                                           {128, 32, 8, 1, 0, 1023},
                                           {128, 32, 8, 1, 0, 31},
                                           {128, 32, 8, 7, 0, 4000},
                                           {128, 16, 1, 2, 0, 33},
                                           {128, 12, 12, 16, 0, 700},
                                           {256, 4, 2, 1, 0, 129},
                                           {64, 2, 2, 16, 7, 60},
                                           {128, 4, 2, 3, 2, 9},
                                           {80, 4, 4, 3, 0, 40}}) {
    const int64_t capacity = s.position + s.tokens + 3;
    const int64_t width = (s.heads + 2 * s.kv_heads) * s.d;
    const Pair qkv = random({s.tokens, width}), out = random({s.tokens, s.heads, s.d});
    const Pair keys = random({s.kv_heads, capacity, s.d});
    const Pair values = random({s.kv_heads, capacity, s.d});
    const Pair cos = random({capacity, s.d}), sin = random({capacity, s.d});
    const Pair position = ints({s.position});
    const Pair workspace(at::zeros({16 * 64 * 32 * 260}, at::kFloat));
    const auto size = static_cast<int64_t>(c10::elementSize(GetParam()));
    for (const bool turns : {true, false})
      compare(
          [&](bool gpu, const decode::Operations& run, void* queue) {
            auto* q = static_cast<std::byte*>(at_of(qkv, gpu));
            run.rotate_and_attend({.dtype = dtype(),
                                   .tokens = s.tokens,
                                   .heads = s.heads,
                                   .kv_heads = s.kv_heads,
                                   .head_dim = s.d,
                                   .capacity = capacity,
                                   .stride = width,
                                   .q = q,
                                   .k = q + s.heads * s.d * size,
                                   .v = q + (s.heads + s.kv_heads) * s.d * size,
                                   .cos = turns ? at_of(cos, gpu) : nullptr,
                                   .sin = turns ? at_of(sin, gpu) : nullptr,
                                   .keys = at_of(keys, gpu),
                                   .values = at_of(values, gpu),
                                   .position = ints_at(position, gpu)},
                                  {.dtype = dtype(),
                                   .tokens = s.tokens,
                                   .heads = s.heads,
                                   .kv_heads = s.kv_heads,
                                   .head_dim = s.d,
                                   .capacity = capacity,
                                   .window = s.window,
                                   .q_stride = width,
                                   .q = q,
                                   .keys = at_of(keys, gpu),
                                   .values = at_of(values, gpu),
                                   .position = ints_at(position, gpu),
                                   .out = at_of(out, gpu),
                                   .workspace = at_of(workspace, gpu)},
                                  queue);
            // The same rows for the next round.
            if (gpu) qkv.gpu.copy_(qkv.cpu);
          },
          {&keys, &values, &out},
          fmt::format("d {} heads {} position {} turns {}", s.d, s.heads, s.position, turns));
  }
}

// Each token is the next of a sequence of its own length. One workspace serves steps of any number
// of tokens, which leave zero what the next one wants zero.
TEST_P(GpuDecode, RotatesAndAttendsForSequencesOfTheirOwn) {
  struct Shape {
    int64_t d, heads, kv_heads, window;
    std::vector<int32_t> positions;
  };
  std::vector<int32_t> many;
  for (int32_t i = 0; i < 64; ++i) many.push_back(i * 37 % 900);
  const Pair workspace(at::zeros({8 << 20}, at::kFloat));
  for (const Shape& s : std::vector<Shape>{{64, 9, 3, 0, {0, 31, 700}},
                                           {128, 32, 8, 0, {4000, 0, 17, 1023}},
                                           {128, 32, 8, 0, {1500}},
                                           {128, 8, 2, 0, many},
                                           {80, 4, 4, 0, {40, 3}},
                                           {256, 4, 2, 0, {129, 128, 5}},
                                           {64, 4, 2, 7, {60, 2, 200}},
                                           {64, 9, 3, 0, {0, 31, 700}}}) {
    const auto tokens = static_cast<int64_t>(s.positions.size());
    const int64_t capacity = *std::max_element(s.positions.begin(), s.positions.end()) + 3;
    const int64_t width = (s.heads + 2 * s.kv_heads) * s.d;
    const Pair qkv = random({tokens, width}), out = random({tokens, s.heads, s.d});
    const Pair keys = random({tokens, s.kv_heads, capacity, s.d});
    const Pair values = random({tokens, s.kv_heads, capacity, s.d});
    const Pair cos = random({capacity, s.d}), sin = random({capacity, s.d});
    const Pair position = ints(s.positions);
    const auto size = static_cast<int64_t>(c10::elementSize(GetParam()));
    const int64_t sequence = s.kv_heads * capacity * s.d;
    for (const bool turns : {true, false})
      compare(
          [&](bool gpu, const decode::Operations& run, void* queue) {
            auto* q = static_cast<std::byte*>(at_of(qkv, gpu));
            const decode::Attend attend{.dtype = dtype(),
                                        .tokens = tokens,
                                        .heads = s.heads,
                                        .kv_heads = s.kv_heads,
                                        .head_dim = s.d,
                                        .capacity = capacity,
                                        .window = s.window,
                                        .q_stride = width,
                                        .sequence_stride = sequence,
                                        .q = q,
                                        .keys = at_of(keys, gpu),
                                        .values = at_of(values, gpu),
                                        .position = ints_at(position, gpu),
                                        .out = at_of(out, gpu),
                                        .workspace = at_of(workspace, gpu)};
            ASSERT_LE(run.attend_workspace_bytes(attend), workspace.cpu.nbytes());
            run.rotate_and_attend({.dtype = dtype(),
                                   .tokens = tokens,
                                   .heads = s.heads,
                                   .kv_heads = s.kv_heads,
                                   .head_dim = s.d,
                                   .capacity = capacity,
                                   .stride = width,
                                   .sequence_stride = sequence,
                                   .q = q,
                                   .k = q + s.heads * s.d * size,
                                   .v = q + (s.heads + s.kv_heads) * s.d * size,
                                   .cos = turns ? at_of(cos, gpu) : nullptr,
                                   .sin = turns ? at_of(sin, gpu) : nullptr,
                                   .keys = at_of(keys, gpu),
                                   .values = at_of(values, gpu),
                                   .position = ints_at(position, gpu)},
                                  attend, queue);
            // The same rows for the next round.
            if (gpu) qkv.gpu.copy_(qkv.cpu);
          },
          {&keys, &values, &out},
          fmt::format("d {} heads {} of {} sequences, turns {}", s.d, s.heads, tokens, turns));
  }
}

TEST_P(GpuDecode, ActivatesRowsOfOneProduct) {
  const Pair both = random({5, 2 * 999}), out = random({5, 999});
  const auto size = static_cast<int64_t>(c10::elementSize(GetParam()));
  compare(
      [&](bool gpu, const decode::Operations& run, void* queue) {
        auto* gate = static_cast<std::byte*>(at_of(both, gpu));
        run.activate({.dtype = dtype(),
                      .count = 5 * 999,
                      .width = 999,
                      .stride = 2 * 999,
                      .gate = gate,
                      .up = gate + 999 * size,
                      .out = at_of(out, gpu)},
                     queue);
      },
      {&out}, "rows");
}

TEST_P(GpuDecode, Activates) {
  for (const Activation activation : {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                      Activation::kRelu, Activation::kRelu2}) {
    const Pair gate = random({5000}, 4), up = random({5000}), out = random({5000});
    for (const bool gated : {true, false})
      compare(
          [&](bool gpu, const decode::Operations& run, void* queue) {
            run.activate({.dtype = dtype(),
                          .activation = activation,
                          .count = 5000,
                          .gate = gated ? at_of(gate, gpu) : nullptr,
                          .up = at_of(up, gpu),
                          .out = at_of(out, gpu)},
                         queue);
          },
          {&out}, fmt::format("activation {}", static_cast<int>(activation)));
  }
}

TEST_P(GpuDecode, WidensAndFindsTheFirstOfTheLargest) {
  const Pair workspace(at::zeros({decode::kWidenWorkspaceBytes}, at::kByte));
  for (const int64_t count : {1, 33, 600, 50000, 200001})
    for (const bool finite : {true, false}) {
      Pair logits = random({count});
      if (!finite) logits = Pair(logits.cpu.index_fill(0, at::tensor({count / 2}), NAN));
      const Pair wide(at::empty({count}, at::kFloat)), best = ints({-7});
      compare(
          [&](bool gpu, const decode::Operations& run, void* queue) {
            run.widen({.dtype = dtype(),
                       .count = count,
                       .logits = at_of(logits, gpu),
                       .wide = static_cast<float*>(at_of(wide, gpu)),
                       .best = static_cast<int32_t*>(at_of(best, gpu)),
                       .workspace = at_of(workspace, gpu)},
                      queue);
          },
          {&wide, &best}, fmt::format("count {}", count));
    }
}

TEST_P(GpuDecode, WidensRowsApart) {
  constexpr int64_t kRows = 5, kCount = 50001;
  const Pair workspace(at::zeros({kRows * decode::kWidenWorkspaceBytes}, at::kByte));
  for (int round = 0; round < 2; ++round) {  // the workspace is left as it was found
    Pair logits = random({kRows, kCount});
    logits.cpu[3][7] = NAN;
    logits = Pair(logits.cpu);
    const Pair wide(at::empty({kRows, kCount}, at::kFloat)), best = ints({-7, -7, -7, -7, -7});
    compare(
        [&](bool gpu, const decode::Operations& run, void* queue) {
          run.widen({.dtype = dtype(),
                     .count = kCount,
                     .rows = kRows,
                     .logits = at_of(logits, gpu),
                     .wide = static_cast<float*>(at_of(wide, gpu)),
                     .best = static_cast<int32_t*>(at_of(best, gpu)),
                     .workspace = at_of(workspace, gpu)},
                    queue);
        },
        {&wide, &best}, fmt::format("round {}", round));
    EXPECT_EQ(best.cpu[3].item<int32_t>(), -1);
    EXPECT_EQ(best.cpu[4].item<int64_t>(), logits.cpu[4].argmax().item<int64_t>());
  }
}

INSTANTIATE_TEST_SUITE_P(Types, GpuDecode, ::testing::Values(at::kFloat, at::kBFloat16, at::kHalf),
                         [](const auto& test) { return c10::toString(test.param); });

}  // namespace
}  // namespace lacuna::model
