// LACUNA_FORCE is read from outside: what it names must exist.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>

#include "lacuna/kernels/linear.h"

namespace lacuna::kernels {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;

Status forced(const char* value) {
  setenv("LACUNA_FORCE", value, 1);
  Status status = check_forced();
  unsetenv("LACUNA_FORCE");
  return status;
}

TEST(CheckForced, AcceptsWhatCanBeForcedAndNothing) {
  EXPECT_TRUE(check_forced().ok()) << "unset";
  EXPECT_TRUE(forced("").ok());
  EXPECT_TRUE(forced("linear_dense:reference").ok());
  EXPECT_TRUE(forced("linear_dense:reference,linear_nm:reference,linear_bitmap:reference").ok());
  EXPECT_TRUE(forced("linear_nm:cuda_sm90_mma_sp,linear_bitmap:cuda_expand_cublas").ok());
}

TEST(CheckForced, PinsATiledCandidateForManyTokensAndRefusesItForFew) {
  Device able;
  able.cpu.avx512_vbmi2 = able.cpu.avx512_bf16 = able.cpu.amx_bf16 = true;
  int tiled = 0;
  for (const LinearOperation& operation : linear_operations()) {
    if (operation.candidates().find("cpu_amx_tiled_dot") == nullptr) continue;
    ++tiled;
    const char* pattern = operation.weight == format::PatternKind::kDense          ? ""
                          : operation.weight == format::PatternKind::kUnstructured ? ":0.5"
                                                                                   : ":2:4";
    const std::string name(operation.name);
    const Problem many = *Problem::parse(name + ":bf16:64x64x17" + pattern);
    const Problem few = *Problem::parse(name + ":bf16:64x64x2" + pattern);
    const std::string entry = name + ":cpu_amx_tiled_dot";
    EXPECT_TRUE(forced(entry.c_str()).ok());
    setenv("LACUNA_FORCE", entry.c_str(), 1);
    const auto plan = operation.plan(many, able);
    const auto refused = operation.plan(few, able);
    unsetenv("LACUNA_FORCE");
    ASSERT_TRUE(plan.ok()) << plan.error().message;
    EXPECT_EQ(plan->candidate->name, "cpu_amx_tiled_dot");
    ASSERT_FALSE(refused.ok()) << entry;
    EXPECT_EQ(refused.error().code, Code::kNotPossible);
    EXPECT_THAT(refused.error().message, HasSubstr("tokens or more"));
  }
  EXPECT_EQ(tiled, 3);
}

TEST(CheckForced, NamesAnUnknownOperationOrCandidate) {
  for (const char* value :
       {"linear_magic:reference", "reference", "linear_dense:reference,,", ":"}) {
    const Status status = forced(value);
    ASSERT_FALSE(status.ok()) << value;
    EXPECT_EQ(status.error().code, Code::kUsage);
    EXPECT_THAT(status.error().message,
                AllOf(HasSubstr("unknown operation"), HasSubstr("linear_dense, linear_bitmap")));
  }
  for (const char* value : {"linear_dense:magic", "linear_nm", "linear_nm:reference:1"}) {
    const Status status = forced(value);
    ASSERT_FALSE(status.ok()) << value;
    EXPECT_EQ(status.error().code, Code::kUsage);
    EXPECT_THAT(status.error().message,
                AllOf(HasSubstr("unknown candidate"), HasSubstr("reference")));
  }
}

}  // namespace
}  // namespace lacuna::kernels
