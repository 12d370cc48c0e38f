#include "lacuna/bench/speed_table.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace lacuna::bench {
namespace {

using ::testing::HasSubstr;

kernels::Problem problem(const std::string& text) { return *kernels::Problem::parse(text); }

TunedProblem measured(const std::string& text, double us) {
  return {.problem = problem(text), .candidate = "some", .order = "some", .us = us};
}

TEST(SpeedTable, AnswersWhatWasMeasuredAndLinesInBetween) {
  const SpeedTable table(
      {measured("linear_dense:bf16:64x32x1", 9), measured("linear_bitmap:bf16:64x32x1:0.5", 6),
       measured("linear_bitmap:bf16:64x32x1:0.7", 4), measured("linear_csr:bf16:64x32x1:0.9", 1),
       measured("linear_bitmap:bf16:64x32x2:0.6", 50), measured("linear_nm:bf16:64x32x1:2:4", 5)});
  const auto ms = [&](const char* text) { return *table.milliseconds(problem(text)); };
  EXPECT_DOUBLE_EQ(ms("linear_dense:bf16:64x32x1"), 0.009);
  EXPECT_DOUBLE_EQ(ms("linear_nm:bf16:64x32x1:2:4"), 0.005);
  EXPECT_DOUBLE_EQ(ms("linear_bitmap:bf16:64x32x1:0.5"), 0.006);
  EXPECT_NEAR(ms("linear_bitmap:bf16:64x32x1:0.6"), 0.005, 1e-12);
  EXPECT_NEAR(ms("linear_bitmap:bf16:64x32x1:0.8"), 0.0025, 1e-12);  // whichever operation
  EXPECT_NEAR(ms("linear_bitmap:bf16:64x32x1:0.4"), 0.007, 1e-12);   // the line goes on
  EXPECT_NEAR(ms("linear_csr:bf16:64x32x1:0.95"), 0.001, 1e-12);     // no faster than measured
}

TEST(SpeedTable, RefusesWhatWasNotMeasuredWithTheCommandThatDoes) {
  const SpeedTable table({measured("linear_bitmap:bf16:64x32x1:0.5", 6)});
  EXPECT_TRUE(table.milliseconds(problem("linear_bitmap:bf16:64x32x1:0.52")).ok());
  for (const char* text : {"linear_bitmap:bf16:64x32x1:0.8", "linear_bitmap:f32:64x32x1:0.5",
                           "linear_bitmap:bf16:64x64x1:0.5", "linear_bitmap:bf16:64x32x4:0.5"}) {
    const auto time = table.milliseconds(problem(text));
    ASSERT_FALSE(time.ok()) << text;
    EXPECT_EQ(time.error().code, Code::kNotPossible);
    EXPECT_THAT(time.error().message, HasSubstr(std::string("lacuna tune ") + text));
  }
}

TEST(SpeedTable, OfThisMachineIsRefusedWhereThereIsNone) {
  setenv("LACUNA_TUNE", "off", 1);
  EXPECT_THAT(SpeedTable::here().error().message, HasSubstr("LACUNA_TUNE"));
  unsetenv("LACUNA_TUNE");
  setenv("XDG_CACHE_HOME", "/nonexistent", 1);
  EXPECT_THAT(SpeedTable::here().error().message, HasSubstr("lacuna tune"));
  unsetenv("XDG_CACHE_HOME");
}

}  // namespace
}  // namespace lacuna::bench
