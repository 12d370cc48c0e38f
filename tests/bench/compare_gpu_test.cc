#include "lacuna/bench/compare_gpu.h"

#include <gmock/gmock.h>

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

TEST_F(CompareOnGpu, RefusesWhatItCanNotTime) {
  const auto codes =
      compare_on_gpu({problem("linear_nm:int8:256x256x1:2:4")}, CompareOptions::quick(), compute_);
  ASSERT_FALSE(codes.ok());
  EXPECT_EQ(codes.error().code, Code::kNotPossible);
  const auto apart = compare_on_gpu(
      {problem("linear_nm:bf16:256x256x1:2:4"), problem("linear_nm:bf16:256x256x2:2:4")},
      CompareOptions::quick(), compute_);
  ASSERT_FALSE(apart.ok());
  EXPECT_EQ(apart.error().code, Code::kUsage);
}

}  // namespace
}  // namespace lacuna::bench
