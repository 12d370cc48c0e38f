// LAPACK on one thread.
#pragma once

#include <ATen/Parallel.h>

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

}  // namespace lacuna::prune
