#include "lacuna/bench/stream_read.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "lacuna/bench/samples.h"
#include "lacuna/core/clock.h"
#include "lacuna/core/cpu.h"

namespace lacuna::bench {
namespace {

constexpr int kPasses = 5;
constexpr size_t kChunkWords = size_t{1} << 17;  // 1 MiB: long enough for the prefetchers

}  // namespace

uint64_t sum_words_portable(const uint64_t* words, size_t count) {
  uint64_t sums[4] = {};
  size_t i = 0;
  for (; i + 4 <= count; i += 4)
    for (size_t lane = 0; lane < 4; ++lane) sums[lane] += words[i + lane];
  uint64_t sum = sums[0] + sums[1] + sums[2] + sums[3];
  for (; i < count; ++i) sum += words[i];
  return sum;
}

StreamRead::StreamRead(size_t bytes)
    : bytes_(std::max(bytes / sizeof(uint64_t), kChunkWords) * sizeof(uint64_t)) {
  std::memset(bytes_.data(), 1, bytes_.size());  // written: real pages
}

double StreamRead::gb_per_second(const Executor& executor) const {
  const auto chunks = static_cast<int64_t>(bytes_.size() / (kChunkWords * sizeof(uint64_t)));
  const auto sum_words = [] {
#if defined(__x86_64__)
    if (cpu_features().avx512) return sum_words_avx512;
#endif
    return sum_words_portable;
  }();
  std::atomic<uint64_t> total = 0;  // keeps the sums from being left out
  std::vector<double> rates;
  for (int pass = 0; pass < kPasses; ++pass) {
    const auto start = Clock::now();
    executor.parallel_for(chunks, [&](int64_t chunk) {
      const auto* words = reinterpret_cast<const uint64_t*>(bytes_.data()) +
                          static_cast<size_t>(chunk) * kChunkWords;
      total.fetch_add(sum_words(words, kChunkWords), std::memory_order_relaxed);
    });
    const double seconds = seconds_since(start);
    const auto bytes = static_cast<double>(chunks) * kChunkWords * sizeof(uint64_t);
    rates.push_back(bytes / seconds / 1e9);
  }
  return summarize(rates).median;
}

}  // namespace lacuna::bench
