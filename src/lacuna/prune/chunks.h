// Parallel work whose results don't depend on the number of threads.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <mutex>

#include "lacuna/core/executor.h"
#include "lacuna/prune/one_thread.h"

namespace lacuna::prune {

/// Calls f(0) .. f(n-1) on the executor. Inside f every torch operation runs on one thread, so its
/// result has the same bits whatever the executor's thread count; work must be cut into the same
/// chunks on every machine. The first exception that a chunk throws is thrown here.
template <class F>
void parallel_chunks(const Executor& executor, int64_t n, F&& f) {
  std::exception_ptr thrown;
  std::mutex mutex;
  // torch works serially inside a parallel region. An executor calls a single chunk without
  // entering one, so there are always two.
  executor.parallel_for(std::max<int64_t>(n, 2), [&](int64_t chunk) {
    if (chunk >= n) return;
    const AloneHere alone;
    try {
      f(chunk);
    } catch (...) {  // must not cross the border of a thread
      const std::lock_guard lock(mutex);
      if (!thrown) thrown = std::current_exception();
    }
  });
  if (thrown) std::rethrow_exception(thrown);
}

/// Calls f(first, count) for strips of the rows of a matrix whose rows can be worked on by
/// themselves: on the CPU strips of fixed height in parallel, which fit into a second-level cache
/// and share themselves out; on a GPU as few as memory allows.
template <class F>
void row_strips(const at::Tensor& matrix, const Executor& executor, F&& f) {
  const int64_t rows = matrix.size(0), height = matrix.is_cpu() ? 64 : 8192;
  const int64_t strips = (rows + height - 1) / height;
  const auto one = [&](int64_t i) { f(i * height, std::min(height, rows - i * height)); };
  if (matrix.is_cpu()) return parallel_chunks(executor, strips, one);
  for (int64_t i = 0; i < strips; ++i) one(i);
}

}  // namespace lacuna::prune
