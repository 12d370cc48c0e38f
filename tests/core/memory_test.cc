#include "lacuna/core/memory.h"

#include <gtest/gtest.h>

namespace lacuna {
namespace {

TEST(BytesText, UsesThreeDigitsAndDecimalUnits) {
  EXPECT_EQ(bytes_text(512), "512 B");
  EXPECT_EQ(bytes_text(98362432), "98.4 MB");
  EXPECT_EQ(bytes_text(9'994'000), "9.99 MB");
  EXPECT_EQ(bytes_text(999'600), "1.00 MB");
  EXPECT_EQ(bytes_text(16'060'000'000), "16.1 GB");
  EXPECT_EQ(bytes_text(269'000'000), "269 MB");
}

TEST(BytesText, RoundsUpToWhatItTells) {
  EXPECT_EQ(rounded_up_for_text(999), 999u);
  EXPECT_EQ(rounded_up_for_text(1'161'234'567), 1'170'000'000u);
  EXPECT_EQ(rounded_up_for_text(99'950'001), 100'000'000u);
  for (uint64_t bytes = 1; bytes < uint64_t{1} << 60; bytes += bytes / 7 + 1) {
    const uint64_t up = rounded_up_for_text(bytes);
    EXPECT_GE(up, bytes);
    EXPECT_LE(up, bytes + bytes / 100);
  }
}

TEST(ParseBytes, ReadsUnitsAndRefusesTheRest) {
  EXPECT_EQ(parse_bytes("12GB"), 12'000'000'000u);
  EXPECT_EQ(parse_bytes("1.5GiB"), 1'610'612'736u);
  EXPECT_EQ(parse_bytes("800MiB"), 838'860'800u);
  EXPECT_EQ(parse_bytes("2.1kB"), 2100u);
  EXPECT_EQ(parse_bytes("7"), 7u);
  for (const uint64_t bytes : {uint64_t{512}, uint64_t{98'400'000}, uint64_t{1'120'000'000'000}})
    EXPECT_EQ(parse_bytes(bytes_text(bytes)), bytes);
  for (const char* wrong :
       {"", "GB", "12  GB", "12GBs", "12gb", "-1GB", "0", "1e-3B", "1e30GB", "nan", "inf", "0x10"})
    EXPECT_FALSE(parse_bytes(wrong)) << wrong;
}

}  // namespace
}  // namespace lacuna
