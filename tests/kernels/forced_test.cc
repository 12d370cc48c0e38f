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
