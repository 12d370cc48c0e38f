// The kernels of float16 weights, and the 2:4 kernel for every card from 8.0 on, against the
// float64 definition. Each is forced, so that it runs also where another is chosen.
#include <c10/core/InferenceMode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <limits>
#include <string_view>

#include "lacuna/model/gpu_weight.h"
#include "model/gpu_weights.h"

namespace lacuna::model {
namespace {
using format::Pattern;

struct Kernel {
  const char* name;
  at::ScalarType type;
  Pattern pattern;
  int64_t most_tokens;
};

class GpuHalfKernel : public Gpu, public ::testing::WithParamInterface<Kernel> {
 protected:
  void SetUp() override {
    Gpu::SetUp();
    if (IsSkipped()) return;
    if (!kernels::gpu_library().ok())
      GTEST_SKIP() << "needs the GPU kernels: " << kernels::gpu_library().error().message;
    if (gpus().front().major != 9 &&
        std::string_view(GetParam().name).find("sm90") != std::string::npos)
      GTEST_SKIP() << "needs compute capability 9.0";
    setenv("LACUNA_FORCE", GetParam().name, 1);
  }
  void TearDown() override { unsetenv("LACUNA_FORCE"); }

  at::Tensor mask(int64_t rows, int64_t columns) const {
    switch (GetParam().pattern.kind) {
      case format::PatternKind::kKeepOf:
        return mask24(rows, columns);
      case format::PatternKind::kBlock:
        return block_mask(rows, columns, GetParam().pattern, 0.2);
      case format::PatternKind::kDense:
        return at::ones({rows, columns}, at::kBool);
      default:  // rows of unlike lengths
        return at::rand({rows, columns}) < at::rand({rows, 1}) * 0.7;
    }
  }
  Compute compute() const { return {kGpu.device, GetParam().type}; }
  Linear packed(const at::Tensor& weight) const {
    const at::Tensor w = weight.to(GetParam().type);
    return GetParam().pattern.kind == format::PatternKind::kDense
               ? Linear::dense(w.to(kGpu.device), {})
               : compact_on_gpu(w, GetParam().pattern, {}, compute());
  }
  at::Tensor on_gpu(const at::Tensor& values) const {
    return values.to(kGpu.device, GetParam().type);
  }
  /// As a step runs it (the launch may precede the end of the one before), with guard words.
  at::Tensor product(const Linear& linear, const at::Tensor& x) const {
    const int64_t tokens = x.size(0), outputs = linear.out_features();
    at::Tensor y = at::full({tokens * outputs + 8}, 7, x.options());
    linear.forward_into(x.const_data_ptr(), tokens, y.mutable_data_ptr(), Executor::serial());
    EXPECT_TRUE(at::equal(y.narrow(0, tokens * outputs, 8), at::full({8}, 7, x.options())));
    return y.narrow(0, 0, tokens * outputs).view({tokens, outputs});
  }
};

TEST_P(GpuHalfKernel, StaysWithinItsBound) {
  const c10::InferenceMode inference;
  for (const int64_t outputs : {1, 2, 17, 71, 264, 1000})
    for (const int64_t inputs : {128, 384, 1024, 5632}) {
      const at::Tensor weight =
          (at::randn({outputs, inputs}) * mask(outputs, inputs)).to(GetParam().type);
      // The kernels of blocks and of no pattern ask for half of what is stored to be zeros, which
      // so few rows may not have: their last rows are tested on 71 and 1000.
      const auto kind = GetParam().pattern.kind;
      if (outputs < 64 &&
          (kind == format::PatternKind::kBlock || kind == format::PatternKind::kUnstructured))
        continue;
      const Linear linear = packed(weight);
      ASSERT_TRUE(linear.recordable()) << "our kernel takes it";
      ASSERT_TRUE(at::equal(linear.weight().cpu(), weight));
      const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
      for (const int64_t tokens : {1, 2, 3, 5, 8, 9, 16, 17, 31, 32, 33, 63, 64}) {
        if (tokens > GetParam().most_tokens) break;
        const at::Tensor x = on_gpu(at::randn({tokens, inputs})), wide = x.to(at::kDouble);
        const at::Tensor exact = at::linear(wide, w), sums = at::linear(wide.abs(), w.abs());
        const at::Tensor excess = (product(linear, x).to(at::kDouble) - exact).abs() -
                                  bound(exact, sums, inputs, false, GetParam().type);
        ASSERT_LE(excess.max().item<double>(), 0)
            << fmt::format("{}x{}x{}", outputs, inputs, tokens);
      }
    }
}

TEST_P(GpuHalfKernel, IsExactOnSmallIntegersAndGivesTheSameBitsEveryTime) {
  const c10::InferenceMode inference;
  for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{40, 1024}, {2056, 4096}}) {
    at::Tensor weight = at::randint(-1, 2, {outputs, inputs}) * mask(outputs, inputs);
    weight.masked_fill_((weight == 0).logical_and(at::rand(weight.sizes()) < 0.5), -0.0);
    const Linear linear = packed(weight);
    const at::Tensor w = weight.to(kGpu.device, at::kDouble);
    for (const int64_t tokens : {1, 4, 12, 30, 64, 65, 200}) {
      const at::Tensor x = on_gpu(at::randint(-1, 2, {tokens, inputs}));
      const at::Tensor exact = at::linear(x.to(at::kDouble), w).to(at::kFloat).to(GetParam().type);
      ASSERT_TRUE(at::equal(linear.forward(x), exact)) << outputs << "x" << inputs << "x" << tokens;
      if (tokens > GetParam().most_tokens) continue;
      for (int i = 0; i < 100; ++i) ASSERT_TRUE(at::equal(product(linear, x), exact)) << tokens;
    }
  }
}

TEST_P(GpuHalfKernel, KeepsNaNAndInfinityInTheirTokenAndRow) {
  const c10::InferenceMode inference;
  const float infinity = std::numeric_limits<float>::infinity();
  const int64_t outputs = 264, inputs = 512;
  const int64_t tokens = std::min<int64_t>(GetParam().most_tokens, 20);
  at::Tensor weight = (at::rand({outputs, inputs}) + 0.5) * mask(outputs, inputs);
  at::Tensor x = at::randn({tokens, inputs});
  const at::Tensor plain = packed(weight).forward(on_gpu(x)).cpu();
  at::Tensor bad = x.clone();
  bad[0][9] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = packed(weight).forward(on_gpu(bad)).cpu();
  const at::Tensor kept = weight.select(1, 9) != 0;
  EXPECT_TRUE(y[0].isnan().masked_select(kept).all().item<bool>());
  EXPECT_TRUE(at::equal(y.narrow(0, 1, tokens - 1), plain.narrow(0, 1, tokens - 1)));
  const at::Tensor some = weight.nonzero()[-1];
  const auto row = some[0].item<int64_t>();
  weight[row][some[1].item<int64_t>()] = infinity;
  const at::Tensor z = packed(weight).forward(on_gpu(x)).cpu();
  EXPECT_FALSE(z.select(1, row).isfinite().any().item<bool>());
  EXPECT_EQ(z.isfinite().logical_not().sum().item<int64_t>(), tokens);
}

TEST_P(GpuHalfKernel, RoundsWhatIsTooLargeAsItsTypeDoes) {
  const c10::InferenceMode inference;
  const int64_t inputs = 1024;
  at::Tensor weight = at::full({32, inputs}, 64.0) * mask(32, inputs);
  const Linear linear = packed(weight);
  const at::Tensor x = on_gpu(at::full({1, inputs}, 64.0));
  const at::Tensor exact = at::linear(x.to(at::kFloat), weight.to(kGpu.device, at::kFloat));
  EXPECT_TRUE(at::equal(linear.forward(x), exact.to(GetParam().type)));
}

INSTANTIATE_TEST_SUITE_P(
    Candidates, GpuHalfKernel,
    ::testing::Values(
        Kernel{"linear_nm:cuda_sm90_mma_sp_f16", at::kHalf, Pattern::keep_of(2, 4), 64},
        Kernel{"linear_nm:cuda_sm80_mma_sp", at::kBFloat16, Pattern::keep_of(2, 4), 64},
        Kernel{"linear_nm:cuda_sm80_mma_sp_f16", at::kHalf, Pattern::keep_of(2, 4), 64},
        Kernel{"linear_bitmap:cuda_sm90_scatter_f16", at::kHalf, Pattern::unstructured(), 64},
        Kernel{"linear_bsr:cuda_sm80_block_f16", at::kHalf, Pattern::block(32, 64), 64},
        Kernel{"linear_dense:cuda_sm90_stream_f16", at::kHalf, Pattern{}, 1}),
    [](const auto& kernel) {
      const std::string name = kernel.param.name;
      return name.substr(name.find(':') + 1);
    });

/// 2:4 of many tokens by cuSPARSELt.
class GpuCusparselt : public Gpu {
 protected:
  void SetUp() override {
    Gpu::SetUp();
    if (IsSkipped()) return;
    if (!kernels::gpu_library().ok() || (*kernels::gpu_library())->has_cusparselt() == 0)
      GTEST_SKIP() << "needs the GPU kernels and libcusparseLt.so.0";
    setenv("LACUNA_FORCE", "linear_nm:cuda_sm80_cusparselt", 1);
  }
  void TearDown() override { unsetenv("LACUNA_FORCE"); }

  /// What a model's weight would be that is packed for so many tokens.
  WeightPtr packed(const at::Tensor& weight) const { return testing::must(weight_of_many(weight)); }
  Result<WeightPtr> weight_of_many(const at::Tensor& weight) const {
    kernels::Problem problem{.values = kernels::Values::kBF16,
                             .activations = DType::kBF16,
                             .outputs = weight.size(0),
                             .inputs = weight.size(1),
                             .tokens = 128,
                             .pattern = Pattern::keep_of(2, 4),
                             .sparsity = 0.5};
    problem.operation = "linear_nm";
    return GpuWeight::make(problem, kGpu, [&] { return weight.to(kGpu.device, kGpu.dtype); });
  }
};

TEST_F(GpuCusparselt, StaysWithinItsBoundForAnyNumberOfTokens) {
  const c10::InferenceMode inference;
  for (const auto& [outputs, inputs] : {std::pair<int64_t, int64_t>{64, 128}, {1040, 1152}}) {
    at::Tensor weight = (at::randn({outputs, inputs}) * mask24(outputs, inputs)).to(kGpu.dtype);
    weight.masked_fill_((weight == 0).logical_and(at::rand(weight.sizes()) < 0.5), -0.0);
    const WeightPtr made = packed(weight);
    ASSERT_NE(made, nullptr);
    EXPECT_TRUE(at::equal(made->expanded().cpu(), weight));
    EXPECT_LE(made->bytes(), static_cast<size_t>(weight.nbytes()) * 9 / 16 + 16384);
    const at::Tensor w = weight.to(kGpu.device, at::kDouble);
    for (const int64_t tokens : {65, 127, 128, 129, 200, 512, 1000}) {
      const at::Tensor x = at::randn({tokens, inputs}).to(kGpu.device, kGpu.dtype);
      const at::Tensor wide = x.to(at::kDouble), y = made->multiply(x, {});
      const at::Tensor exact = at::linear(wide, w), sums = at::linear(wide.abs(), w.abs());
      const at::Tensor excess =
          (y.to(at::kDouble) - exact).abs() - bound(exact, sums, inputs, false, kGpu.dtype);
      ASSERT_LE(excess.max().item<double>(), 0) << outputs << "x" << inputs << "x" << tokens;
      for (int i = 0; i < 20; ++i) ASSERT_TRUE(at::equal(made->multiply(x, {}), y)) << tokens;
    }
  }
}

TEST_F(GpuCusparselt, KeepsNaNInItsTokenAndRefusesWhatIsNotTwoOfFour) {
  const c10::InferenceMode inference;
  at::Tensor weight = at::randn({64, 256}) * mask24(64, 256);
  at::Tensor x = at::randn({100, 256});
  const WeightPtr made = packed(weight);
  const at::Tensor plain = made->multiply(x.to(kGpu.device, kGpu.dtype), {});
  x[70][9] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = made->multiply(x.to(kGpu.device, kGpu.dtype), {});
  EXPECT_TRUE(y[70].isnan().any().item<bool>());
  EXPECT_TRUE(at::equal(y.narrow(0, 0, 70), plain.narrow(0, 0, 70)));
  EXPECT_TRUE(at::equal(y.narrow(0, 71, 29), plain.narrow(0, 71, 29)));
  weight[5].narrow(0, 8, 3).fill_(1);
  const auto refused = weight_of_many(weight);
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.error().code, ::lacuna::Code::kCheckFailed);
  EXPECT_NE(refused.error().message.find("group 2 of row 5"), std::string::npos)
      << refused.error().message;
}

}  // namespace
}  // namespace lacuna::model
