#include "lacuna/bench/stream_read.h"

#include <gtest/gtest.h>

#include "lacuna/core/cpu.h"

namespace lacuna::bench {
namespace {

TEST(StreamRead, sumsEveryWord) {
  std::vector<uint64_t> words;
  uint64_t expected = 0;
  for (uint64_t i = 0; i < 150; ++i) {
    EXPECT_EQ(sum_words_portable(words.data(), words.size()), expected) << i;
    if (cpu_features().avx512) {
      EXPECT_EQ(sum_words_avx512(words.data(), words.size()), expected) << i;
    }
    words.push_back((i + 1) * 0x9e3779b97f4a7c15ull);
    expected += words.back();
  }
}

TEST(StreamRead, measuresARate) {
  const StreamRead read(size_t{1} << 22);
  EXPECT_GT(read.gb_per_second(Executor::serial()), 0.01);
  ThreadPool pool(2);
  EXPECT_GT(read.gb_per_second(pool.executor()), 0.01);
}

}  // namespace
}  // namespace lacuna::bench
