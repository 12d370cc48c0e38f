// What the threads of a tiled product share. Everything here is compiled anew for each instruction
// set.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <thread>

#include "lacuna/kernels/tiled/layout.h"

namespace lacuna::kernels::tiled {
namespace {

/// Packing x: every thread has a share in it, and waits for those that others took: they are
/// running, so this ends even where one thread does all chunks of a job.
class Packing {
 public:
  explicit Packing(int64_t tiles) : tiles_(tiles) {}
  /// @param pack_tile  (tile)
  template <class F>
  void run(F&& pack_tile) {
    for (int64_t tile; (tile = next_.fetch_add(1, std::memory_order_relaxed)) < tiles_;) {
      pack_tile(tile);
      packed_.fetch_add(1, std::memory_order_release);
    }
    for (int spins = 0; packed_.load(std::memory_order_acquire) < tiles_;)
      if (++spins < 2000)
        pause();
      else
        std::this_thread::yield();
  }

 private:
  static void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
  const int64_t tiles_;
  std::atomic<int64_t> next_{0}, packed_{0};
};

/// @param f  (workspace aligned to a line, how many threads may take part)
template <class F>
void run_on_slots(void* workspace, const Executor& executor, F&& f) {
  const auto address = reinterpret_cast<uintptr_t>(workspace);
  f(static_cast<std::byte*>(workspace) + (-address & 63),
    std::clamp(executor.threads, 1, most_threads()));
}

}  // namespace
}  // namespace lacuna::kernels::tiled
