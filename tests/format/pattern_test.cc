#include "lacuna/format/pattern.h"

#include <gtest/gtest.h>

namespace lacuna::format {
namespace {

TEST(Pattern, reads_back_the_text_it_writes) {
  for (const char* text :
       {"dense", "unstructured", "2:4", "1:4", "63:64", "block:32x32", "block:1x128"}) {
    const auto pattern = Pattern::parse(text);
    ASSERT_TRUE(pattern.ok()) << text;
    EXPECT_EQ(pattern->text(), text);
  }
}

TEST(Pattern, refuses_what_is_no_pattern) {
  for (const char* text : {"", "sparse", "4:4", "5:4", "0:4", "2:65", "-2:4", "2:", ":4", "2:4:8",
                           "2:4 ", "block:32", "block:0x8", "block:8x", "block:9999x1", "block:"}) {
    const auto pattern = Pattern::parse(text);
    ASSERT_FALSE(pattern.ok()) << text;
    EXPECT_EQ(pattern.error().code, Code::kUsage) << text;
  }
}

TEST(Pattern, GivesTheSparsityThatItImplies) {
  EXPECT_EQ(Pattern::keep_of(2, 4).sparsity(), 0.5);
  EXPECT_EQ(Pattern::keep_of(1, 4).sparsity(), 0.75);
  EXPECT_EQ(Pattern::unstructured().sparsity(), 0);
  EXPECT_EQ(Pattern::block(4, 4).sparsity(), 0);
}

}  // namespace
}  // namespace lacuna::format
