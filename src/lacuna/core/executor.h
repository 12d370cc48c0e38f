// The kernel tier never starts threads: whoever calls it hands in an Executor.
#pragma once

#include <cstdint>
#include <memory>
#include <type_traits>

namespace lacuna {

/// Runs n independent chunks on `threads` threads. Which thread runs a chunk is open, so a result
/// may depend on the chunk boundaries, never on the thread.
struct Executor {
  using Task = void (*)(void* context, int64_t chunk);
  int threads = 1;
  void* self = nullptr;
  void (*run)(void* self, int64_t chunks, Task task, void* context) = nullptr;

  /// Calls f(chunk) for chunk = 0 .. chunks-1 and returns when all are done.
  template <class F>
  void parallel_for(int64_t chunks, F&& f) const {
    using Function = std::remove_reference_t<F>;
    const Task task = [](void* context, int64_t chunk) {
      (*static_cast<Function*>(context))(chunk);
    };
    void* context = const_cast<void*>(static_cast<const void*>(&f));
    if (run == nullptr || threads <= 1 || chunks <= 1) {
      for (int64_t chunk = 0; chunk < chunks; ++chunk) task(context, chunk);
    } else {
      run(self, chunks, task, context);
    }
  }

  static Executor serial() { return {}; }
};

/// A small pool whose workers spin briefly between jobs and then sleep. The caller takes part in
/// the work. Not re-entrant: a chunk must not start another job on the same pool.
class ThreadPool {
 public:
  /// @param threads  threads in all, the caller included; 0 = the cores this process may use
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  Executor executor();
  int threads() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Cores that this process may run on (affinity respected), at least 1.
int available_cores();

}  // namespace lacuna
