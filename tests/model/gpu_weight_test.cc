// Weights on a GPU against the float64 definition. Every test here needs one: `needs_gpu()` skips
// it by name elsewhere.
#include "lacuna/model/gpu_weight.h"

#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <limits>

#include "lacuna/format/quantize.h"
#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/decode_step.h"
#include "model/gpu_weights.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::model {
namespace {
using format::Pattern;
using testing::must;

/// The same, activations as they are.
const Compute kGpuUnrounded{kGpu.device, kGpu.dtype, /*int8_activations=*/false};

constexpr int64_t kMostTokens = 64;  // of cuda_sm90_mma_sp; its many tokens need 8 | outputs

/// What our kernels multiply lies within the bound. What the dense product takes is the dense
/// product of the same weight to the bit: cuBLAS may add up parts of K in bf16, so that no bound of
/// ours holds for it. `at_once`: tokens that the kernel is chosen for.
void check_product(int64_t outputs, int64_t inputs, const std::vector<int64_t>& token_counts,
                   bool by_kernel = true, const Pattern& pattern = Pattern::keep_of(2, 4),
                   int64_t most_tokens = kMostTokens, int64_t at_once = 1) {
  const at::Tensor weight =
      (at::randn({outputs, inputs}) * mask24(outputs, inputs)).to(at::kBFloat16);
  const at::Tensor bias = at::randn({outputs}).to(at::kBFloat16);
  Compute compute = kGpu;
  compute.batch = at_once;
  const Linear plain = compact_on_gpu(weight, pattern, {}, compute);
  const Linear biased = compact_on_gpu(weight, pattern, bias, compute);
  const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
  const at::Tensor b = bias.to(kGpu.device).to(at::kDouble);
  for (const int64_t tokens : token_counts)
    for (const bool with_bias : {false, true}) {
      const at::Tensor x = at::randn({1, tokens, inputs}).to(at::kBFloat16).to(kGpu.device);
      const at::Tensor y = (with_bias ? biased : plain).forward(x);
      ASSERT_EQ(y.sizes(), at::IntArrayRef({1, tokens, outputs}));
      ASSERT_EQ(y.scalar_type(), at::kBFloat16);
      const bool many = pattern == Pattern::keep_of(2, 4) && outputs % 8 == 0;
      if (!by_kernel || (tokens > most_tokens && !many)) {
        std::optional<at::Tensor> add;
        if (with_bias) add = bias.to(kGpu.device);
        ASSERT_TRUE(at::equal(y, at::linear(x, weight.to(kGpu.device), add)))
            << fmt::format("{}x{}x{} by the dense product", outputs, inputs, tokens);
        continue;
      }
      std::optional<at::Tensor> add, magnitude;
      if (with_bias) add = b, magnitude = b.abs();
      const at::Tensor exact = at::linear(x.to(at::kDouble), w, add);
      const at::Tensor sums = at::linear(x.to(at::kDouble).abs(), w.abs(), magnitude);
      const at::Tensor excess =
          (y.to(at::kDouble) - exact).abs() - bound(exact, sums, inputs, with_bias);
      ASSERT_LE(excess.max().item<double>(), 0)
          << fmt::format("{}x{}x{}{}", outputs, inputs, tokens, with_bias ? " with bias" : "");
    }
}

TEST_F(GpuWeight24, StaysWithinItsBoundForEveryNumberOfTokens) {
  std::vector<int64_t> all;
  for (int64_t tokens = 1; tokens <= 70; ++tokens) all.push_back(tokens);
  check_product(264, 640, all);
  check_product(2048, 2048, all);
}

TEST_F(GpuWeight24, StaysWithinItsBoundOnBothSidesOfEveryTile) {
  for (const int64_t outputs : {1, 2, 15, 16, 17, 31, 33, 127, 129, 1000})
    for (const int64_t inputs : {128, 256, 384, 1152, 5632})
      check_product(outputs, inputs, {1, 2, 3, 8, 9, 16, 17, 32, 33, 64, 65});
}

TEST_F(GpuWeight24, ManyTokensStayWithinTheirBound) {
  for (const int64_t outputs : {8, 64, 72, 128, 136, 264, 1000})
    for (const int64_t inputs : {128, 384, 1152})
      check_product(outputs, inputs, {65, 96, 127, 128, 129, 255, 256, 257, 385, 600});
  check_product(4104, 640, {511, 2048});
  check_product(4104, 14336, {300});
}

TEST_F(GpuWeight24, ManyTokensAreExactOnSmallIntegersWhateverTheirNumber) {
  for (const auto& [outputs, inputs] :
       {std::pair<int64_t, int64_t>{40, 128}, {264, 512}, {1032, 1024}}) {
    at::Tensor weight =
        (at::randint(-8, 9, {outputs, inputs}) * mask24(outputs, inputs)).to(at::kBFloat16);
    weight.masked_fill_((weight == 0).logical_and(at::rand(weight.sizes()) < 0.5), -0.0);
    const Linear linear = compact_on_gpu(weight);
    const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
    const at::Tensor x = at::randint(-8, 9, {700, inputs}).to(at::kBFloat16).to(kGpu.device);
    const at::Tensor exact = at::linear(x.to(at::kDouble), w).to(at::kFloat).to(at::kBFloat16);
    for (const int64_t tokens : {65, 100, 128, 130, 256, 300, 512, 513, 700})
      ASSERT_TRUE(at::equal(linear.forward(x.narrow(0, 0, tokens)), exact.narrow(0, 0, tokens)))
          << outputs << "x" << inputs << "x" << tokens;
    const at::Tensor one = at::eye(inputs).to(kGpu.device, kGpu.dtype);
    ASSERT_TRUE(at::equal(linear.forward(one), w.t().to(at::kBFloat16)));
  }
}

TEST_F(GpuWeight24, ManyTokensKeepNaNAndInfinityWhereTheyBelong) {
  const int64_t outputs = 264, inputs = 512, tokens = 300;
  const float infinity = std::numeric_limits<float>::infinity();
  // Two of every four, so that no place is kept beside them.
  const at::Tensor order = at::rand({outputs, inputs / 4, 4}).argsort(int64_t{-1});
  const at::Tensor kept = (order.argsort(int64_t{-1}) < 2).view({outputs, inputs});
  at::Tensor weight = (at::rand({outputs, inputs}) + 0.5).mul(kept).to(at::kBFloat16);
  at::Tensor x = at::randn({tokens, inputs}).to(at::kBFloat16);
  const at::Tensor plain = compact_on_gpu(weight).forward(x.to(kGpu.device)).cpu();
  at::Tensor bad = x.clone();
  bad[170][9] = std::numeric_limits<float>::quiet_NaN();
  bad[299][511] = infinity;
  const at::Tensor y = compact_on_gpu(weight).forward(bad.to(kGpu.device)).cpu();
  EXPECT_TRUE(at::equal(y[170].isnan(), kept.select(1, 9)));
  EXPECT_TRUE(at::equal(y[299] == infinity, kept.select(1, 511)));
  for (const int64_t token : {170, 299}) {
    const at::Tensor others = kept.select(1, token == 170 ? 9 : 511).logical_not();
    EXPECT_TRUE(at::equal(y[token].masked_select(others), plain[token].masked_select(others)));
  }
  const at::Tensor rows = at::arange(tokens);
  const at::Tensor clean = (rows != 170).logical_and(rows != 299).nonzero().squeeze(1);
  EXPECT_TRUE(at::equal(y.index_select(0, clean), plain.index_select(0, clean)));
  const int64_t column = kept[33].nonzero().select(1, 0)[7].item<int64_t>();
  weight[33][column] = infinity;
  const at::Tensor z = compact_on_gpu(weight).forward(x.to(kGpu.device)).cpu();
  EXPECT_TRUE(at::equal(z.select(1, 33).isinf().logical_or(z.select(1, 33).isnan()),
                        at::ones({tokens}, at::kBool)));
  EXPECT_EQ(z.isfinite().logical_not().sum().item<int64_t>(), tokens);
}

TEST_F(GpuWeight24, UnstructuredStaysWithinItsBoundOnAnyShape) {
  for (const int64_t outputs : {1, 2, 31, 33, 264, 1000})
    for (const int64_t inputs : {1, 8, 99, 130, 1024, 5632}) {
      // A matrix of nearly no weights may hold fewer zeros than the kernel asks for.
      if (outputs * inputs < 1000) continue;
      check_product(outputs, inputs, {1, 2, 3, 4, 5, 17}, /*by_kernel=*/true,
                    Pattern::unstructured(), /*most_tokens=*/4);
      check_product(outputs, inputs, {1, 2, 3, 4, 5, 8, 9}, /*by_kernel=*/true,
                    Pattern::unstructured(), /*most_tokens=*/8, /*at_once=*/4);  // windows
      if (inputs % 8 == 0)                                                       // scattered
        check_product(outputs, inputs, {1, 5, 16, 17, 32, 33, 63, 64, 65}, /*by_kernel=*/true,
                      Pattern::unstructured(), /*most_tokens=*/64, /*at_once=*/16);
    }
  // All of x of 8 tokens does not fit: two launches.
  check_product(264, 14336, {3, 4, 7, 8}, /*by_kernel=*/true, Pattern::unstructured(),
                /*most_tokens=*/8, /*at_once=*/4);
}

/// Rows that keep from nothing to all of their weights, or each of them this share.
at::Tensor uneven_mask(int64_t rows, int64_t columns, double share) {
  const at::Tensor all = at::full({rows, 1}, share);
  const at::Tensor kept = share > 0 ? all : at::rand({rows, 1}).mul(1.4).sub(0.2);
  return at::rand({rows, columns}) < kept;
}

TEST_F(GpuWeight24, UnstructuredGivesItsWeightBackAndTheSameBitsFromEveryKernel) {
  for (const auto& [outputs, inputs, share] : {std::tuple<int64_t, int64_t, double>{1, 1000, 0.5},
                                               {77, 1280, 0.0},
                                               {300, 4096, 0.0},
                                               {1000, 640, 0.2},
                                               {1000, 640, 0.02}})
    for (const int64_t at_once : {1, 4, 8, 16}) {
      Compute compute = kGpu;
      compute.batch = at_once;
      at::Tensor weight =
          (at::randn({outputs, inputs}) * uneven_mask(outputs, inputs, share)).to(at::kBFloat16);
      if (outputs > 9) weight[9].fill_(0);
      const Linear linear = compact_on_gpu(weight, Pattern::unstructured(), {}, compute);
      EXPECT_TRUE(linear.is_compact());
      ASSERT_TRUE(at::equal(linear.weight().cpu(), weight))
          << fmt::format("{}x{} {} at once", outputs, inputs, at_once);
      const at::Tensor x = at::randn({at_once, inputs}).to(kGpu.device, at::kBFloat16);
      const at::Tensor first = linear.forward(x);
      for (int i = 0; i < 20; ++i) ASSERT_TRUE(at::equal(linear.forward(x), first)) << at_once;
    }
}

/// As real pruning leaves them: some rows keep a tenth of their weights, others nearly all, like
/// ones side by side.
TEST_F(GpuWeight24, UnstructuredRowsOfUnlikeLengthsStayWithinTheirBound) {
  const c10::InferenceMode inference;
  for (const auto& [outputs, inputs, most] : {std::tuple<int64_t, int64_t, double>{264, 640, 0.9},
                                              {1002, 1024, 0.9},
                                              {4096, 1280, 0.9},
                                              {4100, 640, 0.4}})
    for (const int64_t at_once : {1, 4, 8, 16, 32}) {
      Compute compute = kGpu;
      compute.batch = at_once;
      const at::Tensor share = at::linspace(0.05, most, outputs).unsqueeze(1);
      const at::Tensor weight =
          (at::randn({outputs, inputs}) * (at::rand({outputs, inputs}) < share)).to(at::kBFloat16);
      const Linear linear = compact_on_gpu(weight, Pattern::unstructured(), {}, compute);
      ASSERT_TRUE(linear.recordable()) << "our kernel takes it";
      ASSERT_TRUE(at::equal(linear.weight().cpu(), weight)) << outputs << " " << at_once;
      const at::Tensor w = weight.to(kGpu.device, at::kDouble);
      for (const int64_t tokens : {int64_t{1}, (at_once + 1) / 2, at_once}) {
        const at::Tensor x = at::randn({tokens, inputs}).to(kGpu.device, at::kBFloat16);
        const at::Tensor wide = x.to(at::kDouble);
        const at::Tensor exact = at::linear(wide, w), sums = at::linear(wide.abs(), w.abs());
        const at::Tensor y = linear.forward(x);
        const at::Tensor excess =
            (y.to(at::kDouble) - exact).abs() - bound(exact, sums, inputs, false);
        ASSERT_LE(excess.max().item<double>(), 0)
            << fmt::format("{}x{}x{} for {}", outputs, inputs, tokens, at_once);
        for (int i = 0; i < 20; ++i) ASSERT_TRUE(at::equal(linear.forward(x), y)) << at_once;
      }
    }
}

TEST_F(GpuWeight24, TakesOtherShapesThroughTheDenseProduct) {
  for (const int64_t inputs : {1, 4, 99, 100, 127, 129, 192})
    for (const int64_t outputs : {1, 17, 71})
      check_product(outputs, inputs, {1, 8, 16, 70}, /*by_kernel=*/false);
}

TEST_F(GpuWeight24, IsExactOnSmallIntegers) {
  for (const auto& [outputs, inputs] :
       {std::pair<int64_t, int64_t>{37, 128}, {64, 512}, {130, 1024}, {1, 2048}}) {
    const at::Tensor mask = mask24(outputs, inputs);
    const at::Tensor weight = (at::randint(-8, 9, {outputs, inputs}) * mask).to(at::kBFloat16);
    const Linear linear = compact_on_gpu(weight);
    const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
    for (int64_t tokens = 1; tokens <= kMostTokens; ++tokens) {
      const at::Tensor x = at::randint(-8, 9, {tokens, inputs}).to(at::kBFloat16).to(kGpu.device);
      const at::Tensor exact = at::linear(x.to(at::kDouble), w).to(at::kFloat).to(at::kBFloat16);
      ASSERT_TRUE(at::equal(linear.forward(x), exact)) << outputs << "x" << inputs << "x" << tokens;
    }
  }
}

TEST_F(GpuWeight24, GivesItsWeightBack) {
  for (const int64_t outputs : {1, 16, 23, 512})
    for (const int64_t inputs : {128, 384, 2048}) {
      at::Tensor weight =
          (at::randn({outputs, inputs}) * mask24(outputs, inputs)).to(at::kBFloat16);
      weight[0][1] = std::numeric_limits<float>::infinity();
      weight[0][0] = 0, weight[0][2] = 0, weight[0][3] = 0x1p-133f;  // denormal
      const Linear linear = compact_on_gpu(weight);
      EXPECT_EQ(linear.weight_bytes(), (outputs + 15) / 16 * 16 * inputs * 9 / 8);
      EXPECT_TRUE(linear.is_compact());
      EXPECT_TRUE(at::equal(linear.weight().cpu(), weight)) << outputs << "x" << inputs;
      const at::Tensor ids = at::tensor({outputs - 1, int64_t{0}}, at::kLong).to(kGpu.device);
      EXPECT_TRUE(at::equal(linear.rows(ids).cpu(), at::embedding(weight, ids.cpu())));
    }
}

TEST_F(GpuWeight24, GivesTheSameBitsEveryTime) {
  const Linear linear =
      compact_on_gpu((at::randn({1536, 5632}) * mask24(1536, 5632)).to(at::kBFloat16));
  for (const int64_t tokens : {1, 8, 33, 64, 65, 200, 512, 2048}) {
    const at::Tensor x = at::randn({tokens, 5632}).to(at::kBFloat16).to(kGpu.device);
    const at::Tensor first = linear.forward(x);
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(at::equal(linear.forward(x), first)) << tokens;
    // A token's bits don't depend on how many others come with it, as long as there are many.
    if (tokens <= 200) continue;
    const at::Tensor part = x.narrow(0, 130, 70).clone();
    ASSERT_TRUE(at::equal(linear.forward(part), first.narrow(0, 130, 70))) << tokens;
  }
}

TEST_F(GpuWeight24, RunsOnTheCurrentStreamAndOnViews) {
  const at::Tensor weight = (at::randn({256, 256}) * mask24(256, 256)).to(at::kBFloat16);
  const Linear linear = compact_on_gpu(weight);
  const at::Tensor all = at::randn({3, 5, 257}).to(at::kBFloat16).to(kGpu.device);
  const at::Tensor view = all.narrow(2, 1, 256);  // neither contiguous nor aligned
  const at::Tensor expected = linear.forward(view.clone());
  const auto* torch = c10::impl::getDeviceGuardImpl(at::kCUDA);
  const auto before = torch->exchangeStream(torch->getStreamFromGlobalPool(kGpu.device, false));
  torch->synchronizeDevice(0);
  const at::Tensor y = linear.forward(view);
  torch->synchronizeDevice(0);
  torch->exchangeStream(before);
  EXPECT_TRUE(at::equal(y, expected));
  const at::Tensor one = all.view({-1}).narrow(0, 3, 256);  // contiguous, but at an odd address
  EXPECT_TRUE(at::equal(linear.forward(one), linear.forward(one.clone())));
  const at::Tensor many = at::randn({70 * 256 + 1}).to(at::kBFloat16).to(kGpu.device);
  const at::Tensor odd = many.narrow(0, 1, 70 * 256).view({70, 256});
  EXPECT_TRUE(at::equal(linear.forward(odd), linear.forward(odd.clone())));
}

TEST_F(GpuWeight24, IsExpandedWhereThatIsForced) {
  const at::Tensor weight = (at::randn({64, 256}) * mask24(64, 256)).to(at::kBFloat16);
  setenv("LACUNA_FORCE", "linear_nm:cuda_expand_cublas", 1);
  const Linear linear = compact_on_gpu(weight);
  unsetenv("LACUNA_FORCE");
  const at::Tensor x = at::randn({3, 256}).to(at::kBFloat16).to(kGpu.device);
  EXPECT_TRUE(at::equal(linear.forward(x), at::linear(x, weight.to(kGpu.device))));
  setenv("LACUNA_FORCE", "linear_nm:cuda_sm90_mma_sp", 1);
  const auto refused = Linear::compact(
      must(format::compress(unwrap(weight.narrow(1, 0, 100)), Pattern::keep_of(2, 4))), {}, kGpu);
  unsetenv("LACUNA_FORCE");
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ::lacuna::Code::kNotPossible);
}

/// By the identity, where LACUNA_CHECK_PACKED asks for it.
TEST_F(GpuWeight24, ProductsOfPackedWeightsAreChecked) {
  setenv("LACUNA_CHECK_PACKED", "1", 1);
  const at::Tensor two_of_four = (at::randn({264, 640}) * mask24(264, 640)).to(at::kBFloat16);
  const at::Tensor scattered =
      (at::randn({264, 640}) * (at::rand({264, 640}) < 0.4)).to(at::kBFloat16);
  for (const int64_t at_once : {1, 4, 16}) {
    Compute compute = kGpu;
    compute.batch = at_once;
    EXPECT_TRUE(compact_on_gpu(two_of_four, Pattern::keep_of(2, 4), {}, compute).is_compact());
    EXPECT_TRUE(compact_on_gpu(scattered, Pattern::unstructured(), {}, compute).is_compact());
  }
  // A kernel that packs another weight.
  kernels::GpuLinearKernel wrong = *kernels::gpu_kernel("linear_nm", "cuda_sm90_mma_sp");
  wrong.unpack = [](const kernels::GpuLayout* layout, const void* packed, void* dense,
                    kernels::GpuStream stream) {
    const int error =
        kernels::gpu_kernel("linear_nm", "cuda_sm90_mma_sp")->unpack(layout, packed, dense, stream);
    // One weight is another than those that are multiplied.
    static const uint16_t five = 0x40a0;
    return error != 0 ? error : (*kernels::gpu_library())->copy(dense, &five, 2, stream);
  };
  kernels::Problem problem{.values = kernels::Values::kBF16,
                           .activations = DType::kBF16,
                           .outputs = 264,
                           .inputs = 640,
                           .tokens = 1,
                           .pattern = Pattern::keep_of(2, 4),
                           .sparsity = 0.5};
  problem.operation = "linear_nm";
  const auto made =
      GpuWeight::packed_for(wrong, problem, kGpu, [&] { return two_of_four.to(kGpu.device); });
  unsetenv("LACUNA_CHECK_PACKED");
  ASSERT_FALSE(made.ok());
  EXPECT_EQ(made.error().code, ::lacuna::Code::kCheckFailed);
  EXPECT_NE(made.error().message.find("row 0, column 0"), std::string::npos)
      << made.error().message;
}

/// Whatever the pattern and the types, with the library or without it.
TEST_F(Gpu, ExpandsEveryPatternToTheSameWeight) {
  for (const Pattern& pattern :
       {Pattern::unstructured(), Pattern::keep_of(2, 4), Pattern::keep_of(1, 4),
        Pattern::keep_of(4, 8), Pattern::keep_of(3, 5), Pattern::block(16, 5)})
    for (const auto& [rows, columns] :
         {std::pair<int64_t, int64_t>{71, 99}, {64, 256}, {3, 1024}, {5, 1025}, {9, 5000}, {1, 1}})
      for (const auto& [stored, computed] : {std::pair{at::kBFloat16, at::kBFloat16},
                                             {at::kHalf, at::kHalf},
                                             {at::kFloat, at::kFloat},
                                             {at::kBFloat16, at::kFloat}}) {
        const at::Tensor row = at::arange(rows).unsqueeze(1), column = at::arange(columns);
        at::Tensor kept = at::rand({rows, columns}) < 0.5;
        if (pattern.kind == format::PatternKind::kKeepOf)
          kept = (column + row).remainder(pattern.of) < pattern.keep;
        if (pattern.kind == format::PatternKind::kBlock)
          kept = (row.floor_divide(pattern.block_rows) + column.floor_divide(pattern.block_columns))
                     .remainder(2)
                     .eq(0);
        if (pattern.kind == format::PatternKind::kUnstructured) kept[0].fill_(rows % 2 == 0);
        const at::Tensor weight = (at::randn({rows, columns}) * kept).to(stored);
        const Linear linear = compact_on_gpu(weight, pattern, {}, {kGpu.device, computed});
        ASSERT_TRUE(at::equal(linear.weight().cpu(), weight.to(computed)))
            << pattern.text() << " " << rows << "x" << columns << " " << c10::toString(stored);
      }
}

TEST_F(GpuWeight24, BlocksStayWithinTheirBoundForEveryNumberOfTokens) {
  const c10::InferenceMode inference;
  for (const auto& [outputs, inputs, pattern] :
       {std::tuple<int64_t, int64_t, Pattern>{264, 648, Pattern::block(16, 16)},
        {1000, 1024, Pattern::block(64, 64)},
        {65, 4096, Pattern::block(32, 64)},
        {2051, 576, Pattern::block(128, 128)}})
    for (const double kept : {0.0, 0.1, 0.2}) {
      const at::Tensor weight =
          (at::randn({outputs, inputs}) * block_mask(outputs, inputs, pattern, kept))
              .to(at::kBFloat16);
      const Linear linear = compact_on_gpu(weight, pattern);
      ASSERT_TRUE(linear.recordable()) << "our kernel takes it";
      const at::Tensor w = weight.to(kGpu.device);
      ASSERT_TRUE(at::equal(linear.weight(), w));
      for (int64_t tokens = 1; tokens <= 70; tokens += tokens < 20 ? 1 : 7) {
        const at::Tensor x = at::randn({tokens, inputs}).to(kGpu.device, at::kBFloat16);
        at::Tensor y = at::full({tokens * outputs + 8}, 7, x.options());
        linear.forward_into(x.const_data_ptr(), tokens, y.mutable_data_ptr(), Executor::serial());
        const at::Tensor got = y.narrow(0, 0, tokens * outputs).view({tokens, outputs});
        const at::Tensor wide = w.to(at::kDouble), wide_x = x.to(at::kDouble);
        const at::Tensor exact = at::linear(wide_x, wide);
        const at::Tensor sums = at::linear(wide_x.abs(), wide.abs());
        const at::Tensor excess =
            (got.to(at::kDouble) - exact).abs() - bound(exact, sums, inputs, false);
        ASSERT_LE(excess.max().item<double>(), 0)
            << fmt::format("{}x{}x{} {}", outputs, inputs, tokens, pattern.text());
        ASSERT_TRUE(at::equal(y.narrow(0, tokens * outputs, 8), at::full({8}, 7, x.options())));
      }
    }
}

/// The demo model with the two largest of every four weights of its blocks, or a quarter of their
/// blocks, stored by this pattern.
io::Checkpoint sparse_demo_model(const Pattern& pattern) {
  const auto source = must(io::Checkpoint::open(testing::demo_model_folder()));
  const auto folder = testing::scratch_folder("gpu_demo") / "model";
  auto writer = must(io::CheckpointWriter::create(folder, {}));
  for (const auto& [name, info] : source.weights()) {
    const Tensor tensor = must(source.dense(name));
    if (info.shape.size() != 2 || name.find("layers") == std::string::npos) {
      must(writer.add(name, tensor));
      continue;
    }
    const at::Tensor weight = wrap(tensor);
    const at::Tensor order =
        weight.abs().view({weight.size(0), -1, 4}).argsort(int64_t{-1}).argsort(int64_t{-1});
    const at::Tensor kept = pattern.kind == format::PatternKind::kBlock
                                ? block_mask(weight.size(0), weight.size(1), pattern, 0.25)
                                : (order >= 2).view(weight.sizes());
    must(writer.add(name, must(format::compress(unwrap(weight * kept), pattern))));
  }
  nlohmann::json config = source.config();
  config["lacuna"] = {{"method", "test"}};
  must(writer.finish(config));
  return must(io::Checkpoint::open(folder));
}

TEST_F(GpuWeight24, RunsAModelAsTheCpuDoes) {
  const c10::InferenceMode inference;
  const auto checkpoint = sparse_demo_model(Pattern::keep_of(2, 4));
  const Decoder exact = must(Decoder::load(checkpoint, {at::kCPU, at::kFloat}));
  const Decoder cpu = must(Decoder::load(checkpoint, {at::kCPU, at::kBFloat16}));
  const Decoder gpu = must(Decoder::load(checkpoint, kGpu));
  for (const Block& block : gpu.blocks())
    for (const std::string& name : block.linear_names()) {
      const Linear& linear = block.linear(name);
      EXPECT_EQ(linear.weight_bytes(), linear.out_features() * linear.in_features() * 9 / 8)
          << name;
    }
  const at::Tensor ids = at::randint(0, exact.spec().vocab, {2, 90}, at::kLong);
  const at::Tensor expected = exact.forward(ids);
  // Both round every intermediate to eight bits, at other places: as far off as each other.
  const double off = testing::relative_difference(cpu.forward(ids), expected);
  EXPECT_LE(testing::relative_difference(gpu.forward(ids).cpu(), expected), 2 * off) << "90 tokens";
  KvCache cache(gpu.spec(), 2, kGpu);
  std::vector<at::Tensor> parts;
  for (const int64_t tokens : {70, 7, 1, 1, 1, 10})  // 140, 14, 2, 20 rows of x
    parts.push_back(gpu.forward(ids.narrow(1, cache.length(), tokens), &cache).cpu());
  EXPECT_LE(testing::relative_difference(at::cat(parts, 1), expected), 2 * off) << "in pieces";
}

/// Logits [T, vocab] after each token, fed one by one: the first steps are called, one is recorded,
/// the later ones are replayed, until the cache grows.
at::Tensor by_steps(const Decoder& decoder, const at::Tensor& ids) {
  KvCache cache(decoder.spec(), 1, decoder.compute());
  DecodeStep step(decoder, cache);
  std::vector<at::Tensor> rows;
  for (int64_t t = 0; t < ids.size(1); ++t) {
    const int32_t best = step.run({ids[0][t].item<int32_t>()});
    rows.push_back(step.logits().cpu());
    EXPECT_EQ(best, rows.back().argmax().item<int64_t>());
    // Takes the scratch away from under a recording that passes weights through it.
    if (t == 20) decoder.blocks().front().linear("mlp.up_proj").weight();
  }
  return at::stack(rows);
}

TEST_F(GpuWeight24, RunsADecodeStepAsTheCpuDoes) {
  const c10::InferenceMode inference;
  for (const Pattern& pattern :
       {Pattern::keep_of(2, 4), Pattern::unstructured(), Pattern::block(16, 32)}) {
    const auto checkpoint = sparse_demo_model(pattern);
    const Decoder exact = must(Decoder::load(checkpoint, {at::kCPU, at::kFloat}));
    const Decoder cpu = must(Decoder::load(checkpoint, {at::kCPU, at::kBFloat16}));
    const Decoder gpu = must(Decoder::load(checkpoint, kGpu));
    ASSERT_EQ(DecodeStep::refusal(gpu), std::nullopt) << pattern.text();
    const at::Tensor ids = at::randint(0, exact.spec().vocab, {1, 150}, at::kLong);
    const at::Tensor expected = exact.forward(ids)[0];
    const double off = testing::relative_difference(cpu.forward(ids)[0], expected);
    const at::Tensor got = by_steps(gpu, ids);
    EXPECT_LE(testing::relative_difference(got, expected), 2 * off) << pattern.text();
    EXPECT_TRUE(at::equal(by_steps(gpu, ids), got)) << pattern.text() << ": the same bits again";
  }
}

TEST_F(GpuWeight24, DenseOfOneTokenStaysWithinItsBound) {
  for (const int64_t outputs : {1, 2, 131, 133, 1000, 4099})
    for (const int64_t inputs :
         {8, 248, 256, 264, 576, 1000, 2048, 4096, 4104, 8192, 14336, 32768}) {
      const at::Tensor weight = at::randn({outputs, inputs}).to(kGpu.device, at::kBFloat16);
      const Linear linear = Linear::dense(weight, std::nullopt);
      const at::Tensor x = at::randn({1, inputs}).to(kGpu.device, at::kBFloat16);
      at::Tensor y = at::full({outputs + 8}, 7, x.options());
      linear.forward_into(x.const_data_ptr(), 1, y.mutable_data_ptr(), Executor::serial());
      const at::Tensor wide = weight.to(at::kDouble), wide_x = x.to(at::kDouble);
      const at::Tensor exact = at::linear(wide_x, wide)[0];
      const at::Tensor sums = at::linear(wide_x.abs(), wide.abs())[0];
      const at::Tensor excess = (y.narrow(0, 0, outputs).to(at::kDouble) - exact).abs() -
                                bound(exact, sums, inputs, false);
      EXPECT_LE(excess.max().item<double>(), 0) << outputs << "x" << inputs;
      EXPECT_TRUE(at::equal(y.narrow(0, outputs, 8), at::full({8}, 7, x.options())));
      EXPECT_TRUE(at::equal(linear.forward(x)[0], y.narrow(0, 0, outputs)));
      const at::Tensor more = at::randn({2, inputs}).to(kGpu.device, at::kBFloat16);
      EXPECT_TRUE(at::equal(linear.forward(more), at::linear(more, weight)));
    }
}

TEST_F(GpuWeight24, DenseKeepsNaNWhereItBelongs) {
  at::Tensor weight = at::randn({300, 264}).to(kGpu.device, at::kBFloat16);
  weight[17][263] = std::numeric_limits<float>::quiet_NaN();
  weight[18][0] = std::numeric_limits<float>::infinity();
  const at::Tensor x = at::ones({1, 264}, weight.options());
  const at::Tensor y = Linear::dense(weight, std::nullopt).forward(x)[0];
  EXPECT_TRUE(y[17].isnan().item<bool>());
  EXPECT_TRUE(y[18].isinf().item<bool>());
  EXPECT_EQ(y.isfinite().sum().item<int64_t>(), 298);
}

/// Slices of one Linear: the same as each alone, in every way in; and after one is replaced.
TEST_F(GpuWeight24, JoinsWhatReadsTheSameX) {
  const c10::InferenceMode inference;
  const std::vector<int64_t> rows = {192, 64, 40};
  for (const char* kind : {"dense", "2:4", "unstructured"})
    for (const bool with_bias : {false, true}) {
      std::vector<Linear::Stored> stored;
      std::vector<at::Tensor> weights, biases;
      for (const int64_t n : rows) {
        weights.push_back((at::randn({n, 256}) * mask24(n, 256)).to(at::kBFloat16));
        biases.push_back(at::randn({n}).to(kGpu.device, at::kBFloat16));
        Linear::Stored part;
        if (kind == std::string("dense"))
          part.weight = weights.back().to(kGpu.device);
        else
          part.weight = must(format::compress(
              unwrap(weights.back()),
              kind == std::string("2:4") ? Pattern::keep_of(2, 4) : Pattern::unstructured()));
        if (with_bias) part.bias = biases.back();
        stored.push_back(std::move(part));
      }
      std::vector<Linear> parts = must(Linear::together(std::move(stored), kGpu));
      const std::vector<const Linear*> all = {&parts[0], &parts[1], &parts[2]};
      const Linear* whole = Linear::whole_of(all);
      ASSERT_NE(whole, nullptr) << kind;
      EXPECT_EQ(Linear::whole_of({&parts[0], &parts[1]}), nullptr);
      EXPECT_EQ(Linear::whole_of({&parts[1], &parts[0], &parts[2]}), nullptr);
      size_t bytes = 0;
      for (const Linear& part : parts) bytes += part.weight_bytes();
      EXPECT_EQ(bytes, whole->weight_bytes());
      const auto check = [&](size_t i) {
        const at::Tensor w = weights[i].to(kGpu.device);
        EXPECT_TRUE(at::equal(parts[i].weight(), w)) << kind << i;
        EXPECT_EQ(parts[i].out_features(), rows[i]);
        EXPECT_EQ(parts[i].in_features(), 256);
        EXPECT_TRUE(parts[i].recordable());
        for (const int64_t tokens : {1, 3, 16, 70}) {
          const at::Tensor x = at::randn({tokens, 256}).to(kGpu.device, at::kBFloat16);
          const at::Tensor expected =
              at::linear(x.to(at::kDouble), w.to(at::kDouble),
                         with_bias ? std::optional(biases[i].to(at::kDouble)) : std::nullopt);
          const at::Tensor y = parts[i].forward(x);
          EXPECT_TRUE(at::allclose(y.to(at::kDouble), expected, 0x1p-6, 0x1p-6)) << kind << i;
          at::Tensor raw = at::full_like(y, NAN);
          parts[i].forward_into(x.const_data_ptr(), tokens, raw.mutable_data_ptr(),
                                Executor::serial());
          EXPECT_TRUE(at::allclose(raw.to(at::kDouble), expected, 0x1p-6, 0x1p-6))
              << kind << i << " tokens " << tokens;
        }
      };
      for (size_t i = 0; i < parts.size(); ++i) check(i);
      weights[1] = at::randn({64, 256}).to(at::kBFloat16);
      parts[1].set_weight(weights[1].to(kGpu.device));
      EXPECT_EQ(Linear::whole_of(all), nullptr);
      for (size_t i = 0; i < parts.size(); ++i) check(i);
    }
}

TEST_F(GpuWeight24, GivesTheSameOnRawMemory) {
  const c10::InferenceMode inference;
  for (const bool with_bias : {false, true}) {
    const at::Tensor weight = (at::randn({96, 256}) * mask24(96, 256)).to(at::kBFloat16);
    std::optional<at::Tensor> bias;
    if (with_bias) bias = at::randn({96}).to(at::kBFloat16);
    const Linear linears[] = {
        compact_on_gpu(weight, Pattern::keep_of(2, 4), bias),
        compact_on_gpu(weight, Pattern::unstructured(), bias),
        Linear::dense(weight.to(kGpu.device),
                      bias ? std::optional(bias->to(kGpu.device)) : std::nullopt)};
    for (const Linear& linear : linears)
      for (const int64_t tokens : {1, 5, 16}) {
        EXPECT_TRUE(linear.recordable());
        const at::Tensor x = at::randn({tokens, 256}).to(kGpu.device, at::kBFloat16);
        at::Tensor y = at::full({tokens, 96}, NAN, x.options());
        linear.forward_into(x.const_data_ptr(), tokens, y.mutable_data_ptr(), Executor::serial());
        EXPECT_TRUE(at::allclose(y.cpu().to(at::kDouble), linear.forward(x).cpu().to(at::kDouble),
                                 0x1p-7, 0x1p-7))
            << tokens;
      }
  }
  EXPECT_FALSE(
      compact_on_gpu(at::ones({64, 64}).to(at::kBFloat16), Pattern::block(32, 32)).recordable());
}

format::CompactMatrix codes_of(const at::Tensor& weight, const Pattern& pattern, const char* code) {
  const auto quantization = must(format::Quantization::parse(code));
  const Tensor dense = unwrap(weight.to(at::kBFloat16));
  return pattern.kind != format::PatternKind::kDense
             ? must(format::quantize(must(format::compress(dense, pattern)), quantization))
             : must(format::quantize(dense, quantization));
}

/// Codes of a random weight, 2:4 or dense. Some rows and some scales are zero.
format::CompactMatrix random_codes(int64_t rows, int64_t columns, const Pattern& pattern,
                                   const char* code) {
  at::Tensor weight = at::randn({rows, columns}) * at::rand({rows, 1}).mul(4).floor();
  if (pattern.kind == format::PatternKind::kKeepOf) weight *= mask24(rows, columns);
  return codes_of(weight, pattern, code);
}

/// What the codes stand for: in float32 every product of a scale and a code is exact.
at::Tensor meant(format::CompactMatrix matrix, DType dtype = DType::kF32) {
  matrix.values_dtype = dtype;
  return wrap(format::expand(matrix)).to(kGpu.device);
}

TEST_F(GpuWeight24, CodesStayWithinTheirBoundForEveryNumberOfTokens) {
  for (const std::string code : {"int8", "fp8", "int4"})
    for (const Pattern& pattern : {Pattern::keep_of(2, 4), Pattern()}) {
      if (code == "int4" && pattern == Pattern()) continue;  // no kernel takes them
      for (const auto& [outputs, inputs] :
           {std::pair<int64_t, int64_t>{1, 128}, {17, 384}, {264, 640}, {1000, 5632}}) {
        const auto matrix = random_codes(outputs, inputs, pattern, code.c_str());
        const at::Tensor bias = at::randn({outputs}).to(kGpu.device, at::kBFloat16);
        const Linear plain = must(Linear::compact(matrix, {}, kGpuUnrounded));
        const Linear biased = must(Linear::compact(matrix, bias, kGpuUnrounded));
        const int64_t padded = (outputs + 15) / 16 * 16;
        const bool sparse = pattern.kind == format::PatternKind::kKeepOf;
        EXPECT_EQ(plain.weight_bytes(),
                  code == "int4"
                      ? padded * inputs * 13 / 32
                      : (padded * 4 + 127) / 128 * 128 + padded * inputs * (sparse ? 5 : 8) / 8 +
                            (sparse ? 0 : outputs * 4));  // the scales, beside unpacked codes
        EXPECT_TRUE(plain.is_compact());
        EXPECT_TRUE(plain.recordable());
        const at::Tensor rounded = meant(matrix, DType::kBF16);
        EXPECT_TRUE(at::equal(plain.weight(), rounded)) << code << pattern.text();
        const at::Tensor w = meant(matrix).to(at::kDouble);
        for (const int64_t tokens : {1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 100})
          for (const bool with_bias : {false, true}) {
            const at::Tensor x = at::randn({tokens, inputs}).to(kGpu.device, at::kBFloat16);
            const at::Tensor y = (with_bias ? biased : plain).forward(x);
            std::optional<at::Tensor> add, wide, magnitude;
            if (with_bias) add = bias, wide = bias.to(at::kDouble), magnitude = wide->abs();
            if (tokens > kMostTokens) {
              ASSERT_TRUE(at::equal(y, at::linear(x, rounded, add))) << outputs << "x" << inputs;
              continue;
            }
            const at::Tensor exact = at::linear(x.to(at::kDouble), w, wide);
            const at::Tensor sums = at::linear(x.to(at::kDouble).abs(), w.abs(), magnitude);
            // Two roundings more: every part of a sum is scaled.
            const at::Tensor excess =
                (y.to(at::kDouble) - exact).abs() - bound(exact, sums, inputs + 2, with_bias);
            ASSERT_LE(excess.max().item<double>(), 0)
                << fmt::format("{} {} {}x{}x{}{}", code, pattern.text(), outputs, inputs, tokens,
                               with_bias ? " with bias" : "");
          }
      }
    }
}

/// x [T,K] in codes of this kind, as numbers, and the scale of each token [T,1].
struct RoundedTokens {
  at::Tensor codes, scales;
};
RoundedTokens rounded_tokens(const at::Tensor& x, bool fp8) {
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor largest = wide.abs().amax({-1}, /*keepdim=*/true);
  // A tensor, because by a number torch multiplies with its inverse.
  const at::Tensor most = at::full_like(largest, fp8 ? 448.0f : 127.0f);
  const at::Tensor scales = (largest / most).clamp_min(0x1p-126);
  const at::Tensor steps = wide * scales.reciprocal();
  return {fp8 ? steps.to(at::kFloat8_e4m3fn).to(at::kDouble) : steps.round().to(at::kDouble),
          at::where(largest > 0, scales, 0.0f).to(at::kDouble)};
}

/// y of rounded tokens lies within its bound: int8 sums are whole numbers, of which up to eight
/// parts are added as float32; e4m3 sums drop what lies 13 bits below the largest of the 33 numbers
/// that one step of 64 columns adds.
void check_rounded(const format::CompactMatrix& matrix, bool fp8,
                   const std::vector<int64_t>& token_counts) {
  const int64_t outputs = matrix.rows, inputs = matrix.columns;
  const at::Tensor bias = at::randn({outputs}).to(kGpu.device, at::kBFloat16);
  const Linear plain = must(Linear::compact(matrix, {}, kGpu));
  const Linear biased = must(Linear::compact(matrix, bias, kGpu));
  ASSERT_TRUE(plain.is_compact());
  const at::Tensor w = meant(matrix).to(at::kDouble);
  for (const int64_t tokens : token_counts)
    for (const bool with_bias : {false, true}) {
      at::Tensor x = at::randn({tokens, inputs}) * at::rand({tokens, 1}).mul(5).floor();
      x = x.to(kGpu.device, at::kBFloat16);
      const at::Tensor y = (with_bias ? biased : plain).forward(x);
      const RoundedTokens rounded = rounded_tokens(x, fp8);
      std::optional<at::Tensor> add, magnitude;
      if (with_bias) add = bias.to(at::kDouble), magnitude = add->abs();
      const at::Tensor meant_x = rounded.codes * rounded.scales;
      const at::Tensor exact = at::linear(meant_x, w, add);
      const at::Tensor sums = at::linear(meant_x.abs(), w.abs(), magnitude);
      // Eight parts, and the factors of both sides.
      at::Tensor most = bound(exact, sums, 8 + 3, with_bias);
      if (fp8) most += sums * (static_cast<double>((inputs + 63) / 64) * 33 * 0x1p-13);
      const at::Tensor excess = (y.to(at::kDouble) - exact).abs() - most;
      const std::string what = fmt::format("{} {} {}x{}x{}", fp8 ? "fp8" : "int8",
                                           matrix.pattern.text(), outputs, inputs, tokens);
      ASSERT_LE(excess.max().item<double>(), 0) << what;
      // Of the norm: y's rounding to bf16 (1.7e-3, with a bias once more) and what e4m3 sums
      // lose (measured: 1.9e-3).
      const at::Tensor off = (y.to(at::kDouble) - exact).norm() / exact.norm();
      ASSERT_LE(off.item<double>(), (fp8 ? 4e-3 : 2.5e-3) + (with_bias ? 1.7e-3 : 0)) << what;
    }
}

/// From 33 tokens on (17 where W is large) x is rounded.
TEST_F(GpuWeight24, RoundedActivationsStayWithinTheirBound) {
  for (const bool fp8 : {false, true})
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{8, 128},
                                          {264, 640},
                                          {1000, 5632},
                                          {6144, 4096},
                                          {520, 14336},
                                          {256, 20480}}) {
      std::vector<int64_t> tokens = {33, 64, 65, 100, 127, 128, 129, 255, 256, 257, 600};
      // x of so many inputs stays as it is
      if (inputs > 16384) tokens.erase(tokens.begin(), tokens.begin() + 2);
      check_rounded(random_codes(outputs, inputs, Pattern::keep_of(2, 4), fp8 ? "fp8" : "int8"),
                    fp8, tokens);
    }
  for (const char* code : {"int8", "fp8"})  // tiles of 256 rows
    check_rounded(random_codes(28672, 256, Pattern::keep_of(2, 4), code),
                  std::string_view(code) == "fp8", {64, 100, 128});
}

/// Dense and unstructured codes are unpacked for a dense product of codes: 40 % zeros by a bitmap,
/// 60 % by gaps.
TEST_F(GpuWeight24, UnpackedCodesStayWithinTheBoundOfRoundedActivations) {
  for (const char* code : {"int8", "fp8"})
    for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{16, 128},
                                          {272, 640},
                                          {1008, 5632},
                                          {4096, 1024},
                                          {528, 14336}}) {
      const bool fp8 = std::string_view(code) == "fp8";
      const std::vector<int64_t> tokens = {65, 100, 128, 257, 600};
      check_rounded(random_codes(outputs, inputs, Pattern(), code), fp8, tokens);
      for (const double zeros : {0.4, 0.6}) {
        at::Tensor weight = at::randn({outputs, inputs}) * (at::rand({outputs, inputs}) >= zeros);
        weight[outputs / 2].zero_();
        check_rounded(codes_of(weight, Pattern::unstructured(), code), fp8, tokens);
      }
    }
  // Gaps take two tokens, 16 are the fewest of a product of codes; K is no multiple of 32.
  const at::Tensor weight = at::randn({272, 656}) * (at::rand({272, 656}) >= 0.6);
  for (const char* code : {"int8", "fp8"})
    check_rounded(codes_of(weight, Pattern::unstructured(), code), std::string_view(code) == "fp8",
                  {17, 33, 64, 65});
  // int8 in parts of 4,096 tokens.
  check_rounded(random_codes(16, 128, Pattern(), "int8"), false, {4096, 8192, 8209});
}

TEST_F(GpuWeight24, TokensAreRoundedAndSumsScaledToTheBit) {
  const kernels::GpuTable& library = **kernels::gpu_library();
  const auto floats = at::TensorOptions().device(kGpu.device).dtype(at::kFloat);
  for (const bool fp8 : {false, true})
    for (const auto& [tokens, columns] :
         {std::pair<int64_t, int64_t>{1, 16}, {37, 656}, {5, 8208}, {300, 96}}) {
      const at::Tensor x = (at::randn({tokens, columns}) * at::rand({tokens, 1}).mul(5).floor())
                               .to(kGpu.device, at::kBFloat16);
      const at::Tensor codes =
          at::empty({tokens, columns}, floats.dtype(fp8 ? at::kFloat8_e4m3fn : at::kChar));
      const at::Tensor scales = at::empty({tokens, 1}, floats);
      const kernels::GpuRounding rounding = {tokens,
                                             columns,
                                             fp8,
                                             x.const_data_ptr(),
                                             codes.mutable_data_ptr(),
                                             scales.mutable_data_ptr<float>()};
      ASSERT_EQ(library.round_tokens(&rounding, gpu_stream(kGpu.device)), 0);
      const RoundedTokens expected = rounded_tokens(x, fp8);
      EXPECT_TRUE(at::equal(codes.to(at::kDouble), expected.codes)) << fp8 << columns;
      EXPECT_TRUE(at::equal(scales.to(at::kDouble), expected.scales)) << fp8 << columns;
    }
  const int64_t tokens = 5000, rows = 2056;
  const at::Tensor sums = at::randint(-(1 << 28), 1 << 28, {tokens, rows}, floats.dtype(at::kInt));
  const at::Tensor of_tokens = at::rand({tokens, 1}, floats), of_rows = at::rand({1, rows}, floats);
  const at::Tensor y = at::empty({tokens, rows}, floats.dtype(at::kBFloat16));
  const kernels::GpuScaling scaling = {tokens,
                                       rows,
                                       sums.const_data_ptr<int32_t>(),
                                       of_tokens.const_data_ptr<float>(),
                                       of_rows.const_data_ptr<float>(),
                                       y.mutable_data_ptr()};
  ASSERT_EQ(library.scale_sums(&scaling, gpu_stream(kGpu.device)), 0);
  EXPECT_TRUE(at::equal(y, (sums.to(at::kFloat) * (of_tokens * of_rows)).to(at::kBFloat16)));
}

TEST_F(GpuWeight24, TheFastestFormOfCodesIsCloseToTheWeight) {
  Compute fastest = kGpu;
  fastest.fastest = true;
  for (const Pattern& pattern : {Pattern(), Pattern::keep_of(2, 4)}) {
    const auto matrix = random_codes(1024, 2048, pattern, "int8");
    const Linear linear = must(Linear::compact(matrix, {}, fastest));
    const at::Tensor w = meant(matrix).to(at::kDouble);
    for (const int64_t tokens : {1, 64, 128, 1000}) {
      const at::Tensor x = at::randn({tokens, 2048}).to(kGpu.device, at::kBFloat16);
      const at::Tensor exact = at::linear(x.to(at::kDouble), w);
      EXPECT_LE((linear.forward(x).to(at::kDouble) - exact).norm().item<double>(),
                0.02 * exact.norm().item<double>())  // x in codes: 0.9 %
          << pattern.text() << tokens;
    }
  }
}

TEST_F(GpuWeight24, RoundedActivationsKeepNonFiniteNumbersWithTheirToken) {
  for (const char* code : {"int8", "fp8"})
    for (const auto& [pattern, tokens] : {std::pair<Pattern, int64_t>{Pattern::keep_of(2, 4), 40},
                                          {Pattern::keep_of(2, 4), 70},
                                          {Pattern::unstructured(), 70},
                                          {Pattern(), 70}}) {
      SCOPED_TRACE(pattern.text());
      const Linear linear = must(Linear::compact(random_codes(272, 640, pattern, code), {}, kGpu));
      at::Tensor x = at::randn({tokens, 640}).to(kGpu.device, at::kBFloat16);
      const at::Tensor before = linear.forward(x);
      x[3][7].fill_(std::numeric_limits<float>::infinity());
      x[tokens - 1][639].fill_(std::nan(""));
      x[5].zero_();
      const at::Tensor after = linear.forward(x);
      for (int64_t t = 0; t < tokens; ++t) {
        if (t == 3 || t == tokens - 1)
          EXPECT_TRUE(after[t].isnan().all().item<bool>()) << t;
        else if (t == 5)
          EXPECT_EQ(after[t].abs().max().item<float>(), 0.0f);
        else
          EXPECT_TRUE(at::equal(after[t], before[t])) << t;
      }
      for (int i = 0; i < 20; ++i)
        ASSERT_TRUE(at::equal(linear.forward(x).nan_to_num(1), after.nan_to_num(1)));
    }
}

TEST_F(GpuWeight24, UnstructuredCodesStayWithinTheirBoundOnAnyShape) {
  const Pattern pattern = Pattern::unstructured();
  for (const char* code : {"int8", "fp8"})
    for (const auto& [outputs, inputs, share] : {std::tuple<int64_t, int64_t, double>{1, 1, 1.0},
                                                 {17, 99, 0.0},
                                                 {31, 256, 1.0},
                                                 {33, 264, 0.5},
                                                 {264, 640, 0.0},
                                                 {70, 5632, 0.2},
                                                 {1000, 4096, 0.5}}) {
      at::Tensor weight = at::randn({outputs, inputs}) * uneven_mask(outputs, inputs, share);
      weight[outputs / 2].fill_(outputs > 1 ? 0.0 : 1.0);
      const auto matrix = codes_of(weight, pattern, code);
      const Linear linear = must(Linear::compact(matrix, {}, kGpuUnrounded));
      ASSERT_TRUE(linear.is_compact());
      EXPECT_TRUE(linear.recordable());
      // Where enough is zero, values with gaps take fewer tokens.
      const double zeros =
          1.0 - static_cast<double>(matrix.values.size()) / static_cast<double>(outputs * inputs);
      const int64_t most_tokens = zeros >= 0.45 ? 2 : kMostTokens;
      const at::Tensor rounded = meant(matrix, DType::kBF16);
      EXPECT_TRUE(at::equal(linear.weight(), rounded)) << code << outputs << "x" << inputs;
      const at::Tensor w = meant(matrix).to(at::kDouble);
      for (int64_t tokens = 1; tokens <= 70; tokens += tokens < 18 ? 1 : 9) {
        const at::Tensor x = at::randn({tokens, inputs}).to(kGpu.device, at::kBFloat16);
        const at::Tensor y = linear.forward(x);
        if (tokens > most_tokens) {
          ASSERT_TRUE(at::equal(y, at::linear(x, rounded))) << outputs << "x" << inputs;
          continue;
        }
        const at::Tensor exact = at::linear(x.to(at::kDouble), w);
        const at::Tensor sums = at::linear(x.to(at::kDouble).abs(), w.abs());
        const at::Tensor excess =
            (y.to(at::kDouble) - exact).abs() - bound(exact, sums, inputs + 2, /*bias=*/false);
        ASSERT_LE(excess.max().item<double>(), 0)
            << fmt::format("{} {}x{}x{}", code, outputs, inputs, tokens);
      }
    }
}

TEST_F(GpuWeight24, UnstructuredCodesOfNothingGiveZero) {
  for (const char* code : {"int8", "fp8"}) {
    const Linear linear = must(
        Linear::compact(codes_of(at::zeros({100, 300}), Pattern::unstructured(), code), {}, kGpu));
    ASSERT_TRUE(linear.is_compact());
    for (const int64_t tokens : {1, 9, 40}) {
      const at::Tensor x = at::randn({tokens, 300}).to(kGpu.device, at::kBFloat16);
      EXPECT_EQ(linear.forward(x).abs().max().item<float>(), 0.0f);
    }
  }
}

/// A row's largest code is 127, so that its scale is 1 and every code a whole number.
TEST_F(GpuWeight24, UnstructuredInt8IsExactOnWholeNumbersAndTheSameEveryTime) {
  at::Tensor weight = at::randint(-126, 127, {528, 1024}) * uneven_mask(528, 1024, 0.5);
  weight.select(1, 7).fill_(127);
  const auto matrix = codes_of(weight.to(at::kFloat), Pattern::unstructured(), "int8");
  const Linear linear = must(Linear::compact(matrix, {}, kGpuUnrounded));
  ASSERT_TRUE(linear.is_compact());
  for (const int64_t tokens : {1, 2, 8, 9, 16, 40}) {
    const at::Tensor x = at::randint(-8, 9, {tokens, 1024}).to(at::kBFloat16).to(kGpu.device);
    const at::Tensor exact = at::linear(x.to(at::kDouble), weight.to(kGpu.device, at::kDouble));
    const at::Tensor y = linear.forward(x);
    ASSERT_TRUE(at::equal(y, exact.to(at::kFloat).to(at::kBFloat16))) << tokens;
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(at::equal(linear.forward(x), y)) << tokens;
  }
}

TEST_F(GpuWeight24, CodesThatNoKernelTakesAreExpandedOnce) {
  for (const auto& [pattern, code, inputs] : {std::tuple{Pattern::keep_of(2, 4), "int8", 192},
                                              {Pattern(), "fp8", 100},
                                              {Pattern::keep_of(2, 4), "int8g32", 256},
                                              {Pattern(), "int4", 256},
                                              {Pattern::keep_of(1, 4), "fp8", 256}}) {
    auto made = pattern == Pattern::keep_of(1, 4)
                    ? must(format::quantize(
                          must(format::compress(
                              unwrap((at::randn({64, inputs / 4, 4}) * at::tensor({0, 0, 1, 0}))
                                         .view({64, inputs})
                                         .to(at::kBFloat16)),
                              pattern)),
                          must(format::Quantization::parse(code))))
                    : random_codes(64, inputs, pattern, code);
    const Linear linear = must(Linear::compact(made, {}, kGpu));
    EXPECT_FALSE(linear.is_compact()) << code << " " << pattern.text();
    EXPECT_TRUE(at::equal(linear.weight(), meant(made, DType::kBF16)));
  }
}

/// The demo model, its blocks 2:4 or dense, and all matrices in codes.
io::Checkpoint coded_demo_model(const Pattern& pattern, const char* code) {
  const auto source = pattern.kind == format::PatternKind::kDense
                          ? must(io::Checkpoint::open(testing::demo_model_folder()))
                          : sparse_demo_model(pattern);
  const auto quantization = must(format::Quantization::parse(code));
  const auto folder = testing::scratch_folder("gpu_coded_demo") / "model";
  auto writer = must(io::CheckpointWriter::create(folder, {}));
  for (const auto& [name, info] : source.weights()) {
    if (info.shape.size() != 2) {
      must(writer.add(name, must(source.dense(name))));
      continue;
    }
    const io::Weight weight = must(source.weight(name, Executor::serial()));
    if (const auto* matrix = std::get_if<format::CompactMatrix>(&weight))
      must(writer.add(name, must(format::quantize(*matrix, quantization))));
    else
      must(writer.add(name, must(format::quantize(std::get<Tensor>(weight), quantization))));
  }
  nlohmann::json config = source.config();
  config["lacuna"] = {{"method", "test"}};
  must(writer.finish(config));
  return must(io::Checkpoint::open(folder));
}

TEST_F(GpuWeight24, RunsAModelOfCodesAsTheCpuDoes) {
  const c10::InferenceMode inference;
  for (const std::string code : {"int8", "fp8", "int4"})
    for (const Pattern& pattern : {Pattern::keep_of(2, 4), Pattern()}) {
      if (code == "int4" && pattern == Pattern()) continue;  // no kernel takes them
      const auto checkpoint = coded_demo_model(pattern, code.c_str());
      const Decoder exact =
          must(Decoder::load(checkpoint, {at::kCPU, at::kFloat, /*int8_activations=*/false}));
      const Decoder cpu =
          must(Decoder::load(checkpoint, {at::kCPU, at::kBFloat16, /*int8_activations=*/false}));
      const Decoder gpu = must(Decoder::load(checkpoint, kGpu));
      ASSERT_EQ(DecodeStep::refusal(gpu), std::nullopt) << pattern.text();
      for (const Block& block : gpu.blocks())
        for (const std::string& name : block.linear_names())
          EXPECT_TRUE(block.linear(name).is_compact()) << name;
      const at::Tensor ids = at::randint(0, exact.spec().vocab, {1, 150}, at::kLong);
      const at::Tensor expected = exact.forward(ids)[0];
      const double off = testing::relative_difference(cpu.forward(ids)[0], expected);
      const at::Tensor got = by_steps(gpu, ids);
      EXPECT_LE(testing::relative_difference(got, expected), 2 * off) << code << pattern.text();
      EXPECT_TRUE(at::equal(by_steps(gpu, ids), got)) << code << ": the same bits again";
    }
}

/// A prompt: int8 costs what it costs the CPU, which rounds to int8 too; a step of e4m3 is 1/8 of a
/// number.
TEST_F(GpuWeight24, RoundsThePromptOfAModelOnlyWhereItMay) {
  const c10::InferenceMode inference;
  for (const std::string code : {"int8", "fp8"}) {
    const auto checkpoint = coded_demo_model(Pattern::keep_of(2, 4), code.c_str());
    const Decoder exact =
        must(Decoder::load(checkpoint, {at::kCPU, at::kFloat, /*int8_activations=*/false}));
    const Decoder cpu =
        must(Decoder::load(checkpoint, {at::kCPU, at::kBFloat16, /*int8_activations=*/false}));
    const Decoder cpu_rounded = must(Decoder::load(checkpoint, {at::kCPU, at::kBFloat16}));
    const Decoder unrounded = must(Decoder::load(checkpoint, kGpuUnrounded));
    const Decoder rounded = must(Decoder::load(checkpoint, kGpu));
    const at::Tensor ids = at::randint(0, exact.spec().vocab, {1, 150}, at::kLong);
    const at::Tensor expected = exact.forward(ids)[0];
    const auto off = [&](const at::Tensor& logits) {
      return testing::relative_difference(logits.cpu(), expected);
    };
    const at::Tensor as_it_is = unrounded.forward(ids)[0];
    const at::Tensor in_codes = rounded.forward(ids)[0];
    EXPECT_LE(off(as_it_is), 2 * off(cpu.forward(ids)[0])) << code;
    EXPECT_FALSE(at::equal(in_codes, as_it_is)) << code;
    EXPECT_LE(off(in_codes), code == "int8" ? 2 * off(cpu_rounded.forward(ids)[0]) : 0.125) << code;
  }
}

}  // namespace
}  // namespace lacuna::model
