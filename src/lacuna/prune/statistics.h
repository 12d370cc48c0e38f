// Sums over calibration tokens, the same bits on any number of threads.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// Accumulates G = sum of x x^T for one input of a block.
class GramSum {
 public:
  GramSum(int64_t width, at::Device device);
  /// Queues inputs [sequences, tokens, width]; add_queued() takes them in the order of the calls.
  void queue(const at::Tensor& inputs);
  int64_t width() const { return gram_.size(0); }
  /// Statistics of everything added; this sum is then spent.
  InputStatistics take();

 private:
  friend void add_queued(std::vector<GramSum>& sums, const Executor& executor);
  at::Tensor gram_;         // only tiles on and above the diagonal until take()
  at::Tensor square_sums_;  // float64: masks chosen by norms must not hang on the order of a sum
  at::Tensor sums_;         // float64
  std::vector<at::Tensor> queued_;
  bool all_bfloat16_ = true;  // what is queued
  int64_t sequences_ = 0, tokens_ = 0;
};

/// Adds what was queued to all sums. On the CPU each tile of each Gram matrix belongs to one thread
/// and takes the queued inputs one after another, so that the bits depend neither on the threads
/// nor on how the queue was cut; if all inputs are bfloat16, by its matrix units, where there are
/// some: products of two such numbers are exact in float32. On a GPU wide strips of rows, by its
/// matrix units where the inputs are of half precision. What lies below the diagonal is left out,
/// which halves the work.
/// @dtype inputs of any float type, products and sums in float32
/// @cost tokens * width^2 / 2 multiply-adds, on a GPU tokens * width * (width + 2048) / 2
void add_queued(std::vector<GramSum>& sums, const Executor& executor);

}  // namespace lacuna::prune
