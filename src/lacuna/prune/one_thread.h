// MKL on one thread: of the whole process, or for a thread of a parallel region.
#pragma once

#include <ATen/Parallel.h>
#include <dlfcn.h>

#include <mutex>

namespace lacuna::prune {

/// As long as it lives, torch and MKL have one thread. LAPACK chooses its blocks by the number of
/// threads, and its bits with them. Inside a parallel region it would have one too, but torch
/// forbids MKL to find out by itself that it is in one (mkl_set_dynamic): larger Cholesky factors
/// then have other bits than on one thread, and from about 1,000 columns on eigenvectors are wrong.
/// Not to be made inside a parallel region.
class OneThread {
 public:
  OneThread() : lock_(mutex()), threads_(at::get_num_threads()) { at::set_num_threads(1); }
  ~OneThread() { at::set_num_threads(threads_); }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  static std::mutex& mutex() {  // the number of threads is the process's
    static std::mutex one;
    return one;
  }
  std::lock_guard<std::mutex> lock_;
  int threads_;
};

/// As long as it lives, MKL works for this thread as it does with one thread alone. In a parallel
/// region it has one anyway, but torch forbids it to know, and it would cut its products for as
/// many threads as the process has.
class AloneHere {
 public:
  AloneHere() {
    (void)at::get_num_threads();  // a thread's first call sets up MKL, and would undo this
    if (set() != nullptr) before_ = set()(1);
  }
  ~AloneHere() {
    if (set() != nullptr) set()(before_);
  }
  AloneHere(const AloneHere&) = delete;
  AloneHere& operator=(const AloneHere&) = delete;

 private:
  using Set = int (*)(int threads);  // 0: as the process has it; @return what was set before
  static Set set() {                 // of the MKL inside libtorch_cpu; a build may have none
    static const auto found =
        reinterpret_cast<Set>(dlsym(RTLD_DEFAULT, "MKL_Set_Num_Threads_Local"));
    return found;
  }
  int before_ = 0;
};

}  // namespace lacuna::prune
