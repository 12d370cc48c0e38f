#include "lacuna/bench/compare_gpu.h"

#include <gmock/gmock.h>

#include <algorithm>

#include "lacuna/bench/contender.h"
#include "lacuna/core/gpu.h"
#include "lacuna/model/weight.h"
#include "model/models.h"

namespace lacuna::bench {
namespace {
using ::testing::HasSubstr;
using testing::must;

kernels::Problem problem(const char* text) { return must(kernels::Problem::parse(text)); }

class CompareOnGpu : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto device = model::open_device("cuda");
    if (!device.ok()) GTEST_SKIP() << "needs a GPU: " << device.error().message;
    if (const auto why_not = model::gpu_library_refusal())
      GTEST_SKIP() << "needs the GPU kernels: " << *why_not;
    compute_ = {*device, at::kBFloat16};
  }
  model::Compute compute_;
};

TEST_F(CompareOnGpu, TimesCandidatesAndWhatAModelGetsBesideDense) {
  for (const char* text :
       {"linear_bitmap:bf16:1024x512x1:0.6", "linear_bitmap:bf16:1024x512x100:0.6",
        "linear_nm:bf16:1024x512x8:2:4", "linear_bsr:bf16:1024x512x1:block32x32@0.8",
        "linear_bsr:bf16:1024x512x2:block8x8@0.8", "linear_csr:bf16:1024x512x3:0.9"}) {
    const auto got = must(compare_on_gpu({problem(text)}, CompareOptions::quick(), compute_));
    EXPECT_TRUE(got.failed.empty()) << text << ": " << got.failed.front().why;
    EXPECT_THAT(got.baseline, HasSubstr("linear_dense:bf16"));
    int modes = 0;
    for (const Record& record : got.records) {
      modes += record.candidate.starts_with("--memory");
      EXPECT_GT(record.us.median, 0) << record.candidate;
      EXPECT_GT(record.weight_bytes, 0u) << record.candidate;
      ASSERT_TRUE(record.ratio.has_value());
    }
    EXPECT_EQ(modes, 2) << text;
  }
}

bool has(const Comparison& comparison, const std::string& problem, const std::string& candidate) {
  return std::ranges::any_of(comparison.records, [&](const Record& record) {
    return record.problem == problem && record.candidate == candidate;
  });
}

TEST_F(CompareOnGpu, TimesCodesBesideTheBestDenseProductOfThem) {
  const bool hopper = gpus().front().major == 9;
  for (const std::string values : {"int8", "fp8", "int4g64"})
    for (const std::string start : {"linear_dense", "linear_nm", "linear_bitmap"})
      for (const int tokens : {1, 40}) {
        const bool is_dense = start == "linear_dense", nm = start == "linear_nm";
        const std::string shape = fmt::format(":{}:1024x512x{}", values, tokens);
        const std::string dense = "linear_dense" + shape;
        const std::string text = start + shape + (is_dense ? "" : nm ? ":2:4" : ":0.5");
        SCOPED_TRACE(text);
        const auto got =
            must(compare_on_gpu({problem(text.c_str())}, CompareOptions::quick(), compute_));
        EXPECT_TRUE(got.failed.empty())
            << got.failed.front().candidate << ": " << got.failed.front().why;
        EXPECT_THAT(got.baseline, HasSubstr(dense));
        int modes = 0;
        for (const Record& record : got.records) {
          modes += record.candidate.starts_with("--memory");
          const bool rounded = record.candidate.find("x in codes") != std::string::npos;
          EXPECT_GT(record.us.median, 0) << record.candidate;
          EXPECT_LE(record.max_error, rounded ? 0.1 : 0x1p-7) << record.candidate;
          ASSERT_TRUE(record.ratio.has_value());
        }
        EXPECT_EQ(modes, is_dense ? 0 : 2);
        EXPECT_TRUE(has(got, dense, "cuda_cublas (bf16 weights)"));
        if (!hopper) continue;
        const bool int4 = values == "int4g64";
        const std::string kernel = "cuda_sm90_" + (int4 ? "int4" : values);
        EXPECT_EQ(has(got, dense, kernel), !int4);  // no kernel takes int4 without 2:4
        const bool rounds = nm && !int4 && tokens == 40;
        EXPECT_EQ(has(got, text, kernel + (rounds ? " (x in codes)" : "")), nm || !int4);
        if (int4 && !is_dense && !nm) {
          EXPECT_TRUE(has(got, text, "--memory compact (bf16 weights)"));
        }
      }
}

TEST_F(CompareOnGpu, LeavesXAsItIsWhereAModelMust) {
  if (gpus().front().major != 9) GTEST_SKIP() << "needs compute capability 9.0";
  compute_.int8_activations = false;
  const char* text = "linear_nm:int8:1024x512x40:2:4";
  const auto got = must(compare_on_gpu({problem(text)}, CompareOptions::quick(), compute_));
  EXPECT_TRUE(got.failed.empty());
  EXPECT_TRUE(has(got, text, "cuda_sm90_int8"));
}

/// What kernels of codes pack; on the CPU where there is no GPU.
TEST(CodesAsNumbers, AreTheWeightsOverTheirScales) {
  const model::Compute compute{must(model::open_device("auto")), at::kBFloat16};
  for (const char* text : {"linear_dense:int8:48x256x1", "linear_nm:fp8:48x256x1:2:4",
                           "linear_bitmap:int8:48x256x1:0.5", "linear_bitmap:fp8:48x256x1:0.7",
                           "linear_nm:int4:48x256x1:2:4", "linear_bitmap:int4:48x256x1:0.5"}) {
    const Weight weight = must(random_weight(problem(text), 1));
    const format::CompactMatrix& codes = *weight.compact;
    const int64_t groups = codes.quantization.groups(256);
    const at::Tensor scales =
        model::wrap({DType::kBF16, {48, groups}, codes.scales}).to(at::kFloat).unsqueeze(2);
    const at::Tensor numbers = model::codes_as_numbers(codes, compute).to(at::kCPU, at::kFloat);
    EXPECT_TRUE(at::equal((numbers.view({48, groups, -1}) * scales).view({48, 256}), weight.dense))
        << text;
  }
}

/// Before it asks for a GPU.
TEST(CompareOnNoGpu, RefusesWhatItCanNotTime) {
  const model::Compute compute{at::Device(at::kCUDA, 0), at::kBFloat16};
  const auto error = [&](std::vector<const char*> texts) {
    std::vector<kernels::Problem> problems;
    for (const char* text : texts) problems.push_back(problem(text));
    const auto got = compare_on_gpu(problems, CompareOptions::quick(), compute);
    return got.ok() ? Error{} : got.error();
  };
  const Error many = error({"linear_nm:int8:256x256x65:2:4"});
  EXPECT_EQ(many.code, Code::kNotPossible);
  EXPECT_THAT(many.message, HasSubstr("64 tokens"));
  const Error mixed = error({"linear_nm:bf16/f32:256x256x1:2:4"});
  EXPECT_EQ(mixed.code, Code::kNotPossible);
  EXPECT_THAT(mixed.message, HasSubstr("got bf16 values, float32 x"));
  EXPECT_EQ(error({"linear_nm:bf16:256x256x1:2:4", "linear_nm:bf16:256x256x2:2:4"}).code,
            Code::kUsage);
}

}  // namespace
}  // namespace lacuna::bench
