// How fast this machine reads memory in order: what a product of few tokens can't pass.
#pragma once

#include <cstddef>
#include <cstdint>

#include "lacuna/core/executor.h"
#include "lacuna/core/large_block.h"

namespace lacuna::bench {

/// Bytes in large pages that are read for nothing but their sum.
class StreamRead {
 public:
  explicit StreamRead(size_t bytes);
  /// GB/s, the median of some passes over all bytes.
  double gb_per_second(const Executor& executor) const;

 private:
  LargeBlock bytes_;
};

// Sums of 64-bit words, one file for each instruction set.
uint64_t sum_words_avx512(const uint64_t* words, size_t count);
uint64_t sum_words_portable(const uint64_t* words, size_t count);

}  // namespace lacuna::bench
