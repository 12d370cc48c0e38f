#include "lacuna/core/executor.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace lacuna {

int available_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  return std::max(1u, std::thread::hardware_concurrency());
}

namespace {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// About 20 us of spinning: longer than the gap between two operations of a decode step, far shorter
// than a time slice.
constexpr int kSpins = 2000;

}  // namespace

struct ThreadPool::State {
  int threads = 1;
  std::vector<std::thread> workers;
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<uint64_t> generation{0};
  std::atomic<bool> stop{false};

  // The current job; written by the caller before `generation` moves.
  Executor::Task task = nullptr;
  void* context = nullptr;
  int64_t chunks = 0;
  std::atomic<int64_t> next{0};
  std::atomic<int> busy{0};

  void drain() {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;)
      task(context, chunk);
  }

  void work() {
    uint64_t seen = 0;
    while (true) {
      int spins = 0;
      while (generation.load(std::memory_order_acquire) == seen) {
        if (++spins < kSpins) {
          relax();
          continue;
        }
        std::unique_lock lock(mutex);
        wake.wait(lock, [&] { return generation.load(std::memory_order_acquire) != seen; });
      }
      seen = generation.load(std::memory_order_acquire);
      if (stop.load(std::memory_order_acquire)) return;
      drain();
      busy.fetch_sub(1, std::memory_order_release);
    }
  }

  void announce() {
    {
      std::lock_guard lock(mutex);
      generation.fetch_add(1, std::memory_order_release);
    }
    wake.notify_all();
  }

  void run(int64_t n, Executor::Task t, void* c) {
    task = t;
    context = c;
    chunks = n;
    next.store(0, std::memory_order_relaxed);
    busy.store(threads - 1, std::memory_order_relaxed);
    announce();
    drain();
    // On a busy machine a worker may be waiting for the core that spinning would keep.
    for (int spins = 0; busy.load(std::memory_order_acquire) != 0;)
      if (++spins < kSpins)
        relax();
      else
        std::this_thread::yield();
  }
};

ThreadPool::ThreadPool(int threads) : state_(std::make_unique<State>()) {
  state_->threads = threads > 0 ? threads : available_cores();
  for (int i = 1; i < state_->threads; ++i)
    state_->workers.emplace_back([state = state_.get()] { state->work(); });
}

ThreadPool::~ThreadPool() {
  state_->stop.store(true, std::memory_order_release);
  state_->announce();
  for (std::thread& worker : state_->workers) worker.join();
}

int ThreadPool::threads() const { return state_->threads; }

Executor ThreadPool::executor() {
  return {state_->threads, state_.get(), [](void* self, int64_t n, Executor::Task task, void* c) {
            static_cast<State*>(self)->run(n, task, c);
          }};
}

}  // namespace lacuna
