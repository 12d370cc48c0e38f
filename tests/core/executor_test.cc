#include "lacuna/core/executor.h"

#include <gtest/gtest.h>

#include <atomic>
#include <vector>

namespace lacuna {
namespace {

TEST(ThreadPool, RunsEveryChunkExactlyOnce) {
  for (int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    for (int round = 0; round < 200; ++round) {
      std::vector<std::atomic<int>> hits(round);
      pool.executor().parallel_for(round, [&](int64_t chunk) { hits[chunk]++; });
      for (const auto& hit : hits) ASSERT_EQ(hit.load(), 1);
    }
  }
}

TEST(Executor, SerialRunsInOrder) {
  std::vector<int64_t> order;
  Executor::serial().parallel_for(4, [&](int64_t chunk) { order.push_back(chunk); });
  EXPECT_EQ(order, (std::vector<int64_t>{0, 1, 2, 3}));
}

}  // namespace
}  // namespace lacuna
