#include "lacuna/core/half.h"

#include <gtest/gtest.h>

#include <bit>
#include <limits>

namespace lacuna {
namespace {

TEST(Half, EveryFloat16SurvivesTheRoundTrip) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = f16_to_float(static_cast<uint16_t>(bits));
    if (std::isnan(value)) continue;
    EXPECT_EQ(float_to_f16(value), bits) << value;
  }
}

TEST(Half, Float16RoundsToNearestEven) {
  // _Float16 conversions of the compiler are the independent witness.
  for (uint64_t i = 0; i < 200000; ++i) {
    const auto bits = static_cast<uint32_t>(i * 2654435761u + i * i * 97);
    const float value = std::bit_cast<float>(bits);
    if (std::isnan(value)) continue;
    EXPECT_EQ(float_to_f16(value), std::bit_cast<uint16_t>(static_cast<_Float16>(value))) << value;
  }
}

TEST(Half, Bfloat16RoundsToNearestEvenAndKeepsNaN) {
  EXPECT_EQ(float_to_bf16(1.0f), 0x3f80);
  EXPECT_EQ(float_to_bf16(std::bit_cast<float>(0x3f808000u)), 0x3f80);  // tie to even
  EXPECT_EQ(float_to_bf16(std::bit_cast<float>(0x3f818000u)), 0x3f82);
  EXPECT_EQ(float_to_bf16(std::bit_cast<float>(0x3f808001u)), 0x3f81);
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::numeric_limits<float>::quiet_NaN()))));
  EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(std::bit_cast<float>(0x7f800001u)))));
  EXPECT_TRUE(std::isinf(bf16_to_float(float_to_bf16(3.4e38f))));
}

TEST(Half, Float8Values) {
  EXPECT_EQ(f8e4m3_to_float(0x7e), 448.0f);
  EXPECT_EQ(f8e4m3_to_float(0x01), 0x1p-9f);
  EXPECT_EQ(f8e4m3_to_float(0xb8), -1.0f);
  EXPECT_TRUE(std::isnan(f8e4m3_to_float(0xff)));
  EXPECT_EQ(f8e5m2_to_float(0x3c), 1.0f);
}

TEST(Half, Float8RoundsToTheNearestEvenAndStopsAtTheLargest) {
  for (int bits = 0; bits < 0x7f; ++bits) {
    const auto code = static_cast<uint8_t>(bits);
    const float value = f8e4m3_to_float(code);
    EXPECT_EQ(float_to_f8e4m3(value), code);
    EXPECT_EQ(float_to_f8e4m3(-value), code | 0x80);
    if (bits == 0x7e) continue;
    const float next = f8e4m3_to_float(static_cast<uint8_t>(bits + 1)), middle = (value + next) / 2;
    EXPECT_EQ(float_to_f8e4m3(middle), bits % 2 == 0 ? bits : bits + 1) << middle;
    EXPECT_EQ(float_to_f8e4m3(std::nextafterf(middle, 0)), bits);
    EXPECT_EQ(float_to_f8e4m3(std::nextafterf(middle, 1000)), bits + 1);
  }
  for (const float large : {448.0f, 463.9f, 464.0f, 500.0f, 3.4e38f})
    EXPECT_EQ(float_to_f8e4m3(large), 0x7e);
  EXPECT_EQ(float_to_f8e4m3(-std::numeric_limits<float>::infinity()), 0xfe);
  EXPECT_EQ(float_to_f8e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7f, 0x7f);
  EXPECT_EQ(float_to_f8e4m3(0x1p-10f), 0) << "a tie with 0";
  EXPECT_EQ(float_to_f8e4m3(1e-30f), 0);
}

}  // namespace
}  // namespace lacuna
