// What the study asks of a public kernel whose source lies outside this repository: pack a weight
// on the host, multiply on the GPU. Each is wrapped in a file of its own, which includes that
// source.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <thread>
#include <vector>

namespace rivals {

/// A packed weight on the host: parts, each to be put on the GPU at a multiple of 256 bytes.
struct Form {
  std::vector<std::vector<char>> parts;
  size_t bytes = 0;     ///< of these that a product reads
  std::string refused;  ///< why its kernel can't take this weight
};

struct Peer {
  const char* name;
  /// @param w  fp16 [n,k], a dropped weight is +0; null where it packs codes
  Form (*pack)(const half* w, int n, int k);
  /// y[t,n] = x[t,k] · W^T, fp16. @param parts  device memory; split: of K, workspace: 4 split t n
  cudaError_t (*run)(cudaStream_t stream, char* const* parts, const half* x, half* y, int n, int k,
                     int t, int split, void* workspace);
  int tokens;   ///< it takes a multiple of this many
  int most;     ///< tokens that it is asked for
  bool splits;  ///< wants its split of K tuned
};

extern const Peer kMacko, kMackoRows4, kMackoRows8, kMackoRows16, kSpInfer, kFlashLlm,
    kSparseMarlin;

/// For kSparseMarlin, whose weights are 2:4 codes of 4 bits, one scale for 128 columns.
/// @param codes   [n,k], -8 .. 7, a dropped weight is 0
/// @param scales  [k / 128, n], exact in fp16
Form pack_sparse_marlin(const signed char* codes, const float* scales, int n, int k);

/// f(0) .. f(count - 1) on all threads.
inline void on_all_threads(int count, const std::function<void(int)>& f) {
  std::atomic<int> next{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i)
    threads.emplace_back([&] {
      for (int j; (j = next++) < count;) f(j);
    });
  for (std::thread& thread : threads) thread.join();
}

template <class T>
std::vector<char> bytes_of(const std::vector<T>& values) {
  std::vector<char> bytes(values.size() * sizeof(T));
  std::memcpy(bytes.data(), values.data(), bytes.size());
  return bytes;
}

}  // namespace rivals
