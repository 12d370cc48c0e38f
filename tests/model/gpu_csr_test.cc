// linear_csr on a GPU against the float64 definition, and several forms of one weight. Every test
// here needs a GPU and says so elsewhere.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "lacuna/kernels/error_bound.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/fastest_weight.h"
#include "lacuna/model/linear.h"
#include "model/models.h"

namespace lacuna::model {
namespace {
using format::Pattern;
using testing::must;

const Compute kGpu{at::Device(at::kCUDA, 0), at::kBFloat16};

class GpuForms : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto device = open_device("cuda");
    if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
    if (const auto why_not = gpu_library_refusal())
      GTEST_SKIP() << "needs the GPU kernels: " << *why_not;
    at::manual_seed(11);
  }
};

class GpuCsr : public GpuForms {
 protected:
  void SetUp() override {
    GpuForms::SetUp();
    if (IsSkipped()) return;
    if ((*kernels::gpu_library())->has_cusparse() == 0) GTEST_SKIP() << "needs libcusparse.so.12";
    setenv("LACUNA_FORCE", "linear_csr:cuda_sm80_cusparse", 1);
  }
  void TearDown() override { unsetenv("LACUNA_FORCE"); }
};

Linear on_gpu(const at::Tensor& weight, const Pattern& pattern = Pattern::unstructured(),
              const Compute& compute = kGpu) {
  return must(Linear::compact(must(format::compress(unwrap(weight), pattern)), {}, compute));
}

/// Zeros where they fall, some rows without any weight, some full, some zeros negative.
at::Tensor uneven(int64_t rows, int64_t columns, double zeros) {
  at::Tensor weight = at::randn({rows, columns});
  at::Tensor dropped = at::rand({rows, columns}) < zeros;
  for (int64_t row = 0; row < rows; row += 5) dropped[row].fill_(row % 10 == 0);
  weight.masked_fill_(dropped, 0.0);
  weight.masked_fill_(dropped.logical_and(at::rand({rows, columns}) < 0.3), -0.0);
  return weight.to(at::kBFloat16);
}

TEST_F(GpuCsr, StaysWithinItsBoundOnAnyShape) {
  for (const int64_t rows : {1, 2, 31, 33, 264, 1000})
    for (const int64_t columns : {1, 8, 99, 130, 1024, 5632})
      for (const double zeros : {0.5, 0.95}) {
        const at::Tensor weight = uneven(rows, columns, zeros);
        const Linear linear = on_gpu(weight);
        const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
        for (const int64_t tokens : {1, 2, 3, 7, 8, 16, 17, 32, 63, 64}) {
          const at::Tensor x = at::randn({tokens, columns}).to(at::kBFloat16).to(kGpu.device);
          const at::Tensor exact = at::linear(x.to(at::kDouble), w);
          const at::Tensor sums = at::linear(x.to(at::kDouble).abs(), w.abs());
          // cuSPARSE adds up in some order of its own.
          const double n = kernels::float_roundings_in_any_order(columns) * 0x1p-24;
          const at::Tensor floats =
              sums * (n / (1 - n)) + static_cast<double>(columns + 16) * 0x1p-149;
          const at::Tensor bound = floats + 0x1p-8 * (exact.abs() + floats) + 0x1p-133;
          const at::Tensor excess = (linear.forward(x).to(at::kDouble) - exact).abs() - bound;
          ASSERT_LE(excess.max().item<double>(), 0)
              << fmt::format("{}x{}x{} at {}", rows, columns, tokens, zeros);
        }
      }
}

TEST_F(GpuCsr, IsExactOnSmallIntegersAndGivesItsWeightBack) {
  for (const auto& [rows, columns] :
       {std::pair<int64_t, int64_t>{37, 129}, {64, 512}, {130, 1000}, {1, 2048}}) {
    const at::Tensor kept = at::rand({rows, columns}) < 0.2;
    const at::Tensor weight = (at::randint(-8, 9, {rows, columns}) * kept).to(at::kBFloat16);
    const Linear linear = on_gpu(weight);
    EXPECT_TRUE(linear.is_compact());
    EXPECT_TRUE(at::equal(linear.weight().cpu(), weight));
    const int64_t count = weight.count_nonzero().item<int64_t>();
    EXPECT_LE(linear.weight_bytes(), static_cast<size_t>(count * 6 + (rows + 1) * 4 + 512));
    const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
    for (const int64_t tokens : {1, 2, 5, 64, 65, 300}) {
      const at::Tensor x = at::randint(-8, 9, {tokens, columns}).to(at::kBFloat16).to(kGpu.device);
      // More than 64 tokens expand it for the dense product, which may add up parts in bf16.
      const at::Tensor expected =
          tokens > 64 ? at::linear(x, weight.to(kGpu.device))
                      : at::linear(x.to(at::kDouble), w).to(at::kFloat).to(at::kBFloat16);
      ASSERT_TRUE(at::equal(linear.forward(x), expected))
          << rows << "x" << columns << "x" << tokens;
    }
  }
}

TEST_F(GpuCsr, TakesWeightsWithoutAnyZeroAndWithNothingElse) {
  const at::Tensor full = at::randint(1, 9, {70, 200}).to(at::kBFloat16);
  const at::Tensor x = at::randint(-4, 5, {3, 200}).to(at::kBFloat16).to(kGpu.device);
  for (const at::Tensor& weight : {full, at::zeros_like(full)})
    for (const int64_t tokens : {1, 3}) {
      const at::Tensor some = x.narrow(0, 0, tokens);
      EXPECT_TRUE(at::equal(on_gpu(weight).forward(some),
                            at::linear(some.to(at::kFloat), weight.to(kGpu.device).to(at::kFloat))
                                .to(at::kBFloat16)));
    }
}

TEST_F(GpuCsr, NotFiniteXReachesWhatKeepsItsColumn) {
  const at::Tensor kept = at::rand({264, 512}) < 0.3;
  const at::Tensor weight = ((at::rand({264, 512}) + 0.5) * kept).to(at::kBFloat16);
  at::Tensor x = at::randn({4, 512}).to(at::kBFloat16);
  const at::Tensor clean = on_gpu(weight).forward(x.to(kGpu.device)).cpu();
  x[2][9] = std::numeric_limits<float>::quiet_NaN();
  const at::Tensor y = on_gpu(weight).forward(x.to(kGpu.device)).cpu();
  EXPECT_TRUE(at::equal(y[2].isnan(), kept.select(1, 9)));
  for (const int64_t token : {0, 1, 3}) EXPECT_TRUE(at::equal(y[token], clean[token])) << token;
}

TEST_F(GpuCsr, GivesTheSameBitsEveryTime) {
  const Linear linear = on_gpu(uneven(1536, 5632, 0.8));
  for (const int64_t tokens : {1, 8, 33}) {
    const at::Tensor x = at::randn({tokens, 5632}).to(at::kBFloat16).to(kGpu.device);
    const at::Tensor first = linear.forward(x);
    for (int i = 0; i < 100; ++i) ASSERT_TRUE(at::equal(linear.forward(x), first)) << tokens;
  }
}

// --- Several forms of one weight
// ------------------------------------------------------------------

const Compute kFastest{kGpu.device, kGpu.dtype, true, /*fastest=*/true};

TEST_F(GpuForms, TakesOneOfThemForEveryNumberOfTokens) {
  const at::Tensor weight = uneven(1024, 2048, 0.6);
  const auto made = must(
      compact_weight(must(format::compress(unwrap(weight), Pattern::unstructured())), kFastest));
  const auto* forms = dynamic_cast<const FastestWeight*>(made.get());
  if (gpus().front().major != 9) {
    EXPECT_EQ(forms, nullptr) << "nothing but the dense form here";
    return;
  }
  ASSERT_NE(forms, nullptr);
  EXPECT_FALSE(made->is_compact());
  EXPECT_GT(made->bytes(), static_cast<size_t>(weight.nbytes())) << "the dense form and others";
  EXPECT_TRUE(at::equal(made->expanded().cpu(), weight + at::zeros({}, at::kBFloat16)));
  const at::Tensor w = weight.to(kGpu.device).to(at::kDouble);
  for (const int64_t tokens : {1, 2, 3, 4, 5, 8, 16, 31, 64, 65, 128, 200, 1000}) {
    const at::Tensor x = at::randn({tokens, 2048}).to(at::kBFloat16).to(kGpu.device);
    const at::Tensor y = made->multiply(x, std::nullopt);
    EXPECT_TRUE(at::equal(y, forms->chosen(tokens).weight->multiply(x, std::nullopt)))
        << forms->chosen(tokens).name;
    const at::Tensor exact = at::linear(x.to(at::kDouble), w);
    EXPECT_LE((y.to(at::kDouble) - exact).norm().item<double>(),
              0x1p-8 * exact.norm().item<double>())
        << tokens << " " << forms->chosen(tokens).name;
    // An unstructured weight is never expanded for more tokens than its kernels take.
    if (tokens > 64) {
      EXPECT_EQ(forms->chosen(tokens).name, "dense");
    }
  }
}

TEST_F(GpuForms, AsksOnceForWeightsThatAreAlike) {
  if (gpus().front().major != 9) GTEST_SKIP() << "needs compute capability 9.0";
  const auto make = [] {
    return must(compact_weight(
        must(format::compress(unwrap(uneven(2048, 1024, 0.7)), Pattern::unstructured())),
        kFastest));
  };
  const auto one = make(), other = make();
  for (const int64_t tokens : {1, 8, 32})
    EXPECT_EQ(dynamic_cast<const FastestWeight&>(*one).chosen(tokens).name,
              dynamic_cast<const FastestWeight&>(*other).chosen(tokens).name);
}

/// Faster than any product, and wrong.
class Nothing final : public Weight {
 public:
  Nothing(int64_t rows, int64_t columns) : Weight(rows, columns, kFastest) {}
  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>&) const override {
    return at::empty({x.size(0), rows()}, x.options());
  }
  void run(const format::RowProduct&, const Executor&) const override {}
  at::Tensor expanded() const override { return {}; }
  size_t bytes() const override { return 0; }
  bool is_compact() const override { return false; }
};

TEST_F(GpuForms, NeverTakesAFormWhoseProductIsWrong) {
  const at::Tensor weight = at::randn({4096, 4096}).to(kGpu.device, at::kBFloat16);
  const FastestWeight forms(
      {{"nothing", std::make_shared<Nothing>(4096, 4096)}, {"dense", plain_weight(weight)}});
  for (const int64_t tokens : {1, 64, 256}) EXPECT_EQ(forms.chosen(tokens).name, "dense");
}

TEST_F(GpuForms, AForcedCandidateIsTheOnlyForm) {
  setenv("LACUNA_FORCE", "linear_bitmap:cuda_expand_cublas", 1);
  const auto made = must(compact_weight(
      must(format::compress(unwrap(uneven(64, 128, 0.6)), Pattern::unstructured())), kFastest));
  unsetenv("LACUNA_FORCE");
  EXPECT_EQ(dynamic_cast<const FastestWeight*>(made.get()), nullptr);
  EXPECT_TRUE(made->is_compact());
}

TEST_F(GpuForms, APackedFormFitsTheNumberOfSequences) {
  if (gpus().front().major != 9) GTEST_SKIP() << "needs compute capability 9.0";
  const at::Tensor weight = uneven(512, 1024, 0.6);
  Compute sixteen = kGpu;
  sixteen.batch = 16;
  // One token's kernel takes 4, that of sixteen 32: more of them go through the dense product.
  const at::Tensor x = at::randn({16, 1024}).to(at::kBFloat16).to(kGpu.device);
  const at::Tensor expanded = at::linear(x, weight.to(kGpu.device));
  EXPECT_TRUE(at::equal(on_gpu(weight).forward(x), expanded));
  const Linear packed = on_gpu(weight, Pattern::unstructured(), sixteen);
  EXPECT_NE(packed.weight_bytes(), on_gpu(weight).weight_bytes());
  EXPECT_LE((packed.forward(x).to(at::kFloat) - expanded.to(at::kFloat)).norm().item<double>(),
            0x1p-7 * expanded.to(at::kFloat).norm().item<double>());
}

}  // namespace
}  // namespace lacuna::model
