#include <cmath>

#include "io/gguf/gguf_builder.h"

namespace lacuna::io {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;
namespace fs = std::filesystem;

/// Elements whose bits differ; any NaN equals any other.
size_t differing(const float* got, const float* expected, size_t count) {
  size_t different = 0;
  for (size_t i = 0; i < count; ++i) {
    const bool same = std::memcmp(got + i, expected + i, sizeof(float)) == 0;
    different += !same && !(std::isnan(got[i]) && std::isnan(expected[i]));
  }
  return different;
}

TEST(Dequantize, EveryTypeIsBitEqualToTheReferencePackage) {
  const fs::path golden = lacuna::testing::source_folder() / "tests/golden/gguf";
  const auto file = GgufFile::open(golden / "blocks.gguf");
  ASSERT_TRUE(file.ok()) << file.error().message;
  const std::string text = file_text(golden / "blocks.f32");
  const auto* expected = reinterpret_cast<const float*>(text.data());
  ThreadPool pool(3);
  size_t position = 0, infinite = 0, nan = 0;
  for (const GgufTensor& tensor : file->tensors()) {
    const auto count = static_cast<size_t>(tensor.elements());
    ASSERT_LE((position + count) * sizeof(float), text.size());
    for (const Executor& executor : {Executor::serial(), pool.executor()}) {
      std::vector<float> got(count, -1);
      ASSERT_TRUE(dequantize(tensor, got.data(), executor).ok());
      EXPECT_EQ(differing(got.data(), expected + position, count), 0u) << tensor.name;
    }
    std::vector<float> row(static_cast<size_t>(tensor.row_elements()));
    for (size_t at = 0; at < count; at += row.size()) {
      dequantize_row(tensor, static_cast<int64_t>(at / row.size()), row.data());
      EXPECT_EQ(differing(row.data(), expected + position + at, row.size()), 0u) << tensor.name;
    }
    for (size_t i = position; i < position + count; ++i) {
      infinite += std::isinf(expected[i]);
      nan += std::isnan(expected[i]);
    }
    position += count;
  }
  EXPECT_EQ(position * sizeof(float), text.size());
  EXPECT_GT(infinite, 0u);  // the goldens reach the edges
  EXPECT_GT(nan, 0u);
}

TEST(Dequantize, BlocksAreSplitAmongThreadsWithoutAnyLost) {
  // Above one chunk, and not a multiple of it.
  const int64_t blocks = 5 * 2048 + 3;
  std::string bytes;
  for (int64_t i = 0; i < blocks; ++i)
    bytes += raw(float_to_f16(0.5f)) + std::string(32, static_cast<char>(i % 100));
  GgufTensor tensor{"t",
                    {blocks, 32},
                    GgufType::kQ8_0,
                    Bytes::take(std::vector<char>(bytes.begin(), bytes.end()))};
  std::vector<float> got(static_cast<size_t>(blocks * 32), -1);
  ThreadPool pool(4);
  ASSERT_TRUE(dequantize(tensor, got.data(), pool.executor()).ok());
  for (size_t i = 0; i < got.size(); ++i)
    ASSERT_EQ(got[i], 0.5f * static_cast<float>(i / 32 % 100)) << i;
}

TEST(Dequantize, BytesThatDoNotFitTheShapeAreRefused) {
  float out[64];
  const GgufTensor tensor{"t", {2, 32}, GgufType::kQ4_0, Bytes::take(std::vector<char>(18))};
  EXPECT_THAT(message_of(dequantize(tensor, out, Executor::serial())),
              AllOf(HasSubstr("\"t\""), HasSubstr("18 bytes"), HasSubstr("Q4_0")));
}

}  // namespace
}  // namespace lacuna::io
