// Adam on the kept weights of sparse matrices.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "lacuna/core/executor.h"

namespace lacuna::prune {

/// Sparse matrices under training: what is zero at the start stays zero, exactly. Adam (Kingma & Ba
/// 2014, arXiv 1412.6980; 0.9, 0.999) on float32 masters; products read copies in the type of the
/// computation. 17 bytes a weight at most, gradients not counted.
/// @determinism the same bits for any executor
class MaskedAdam {
 public:
  /// @param weight  [out, in] as it was pruned; its zeros are the mask
  /// @param dtype  of the computation
  void add(const at::Tensor& weight, at::ScalarType dtype);
  /// The matrices that products read and that gradients are taken by, in the order of add(). The
  /// tensors stay, step() changes their values.
  const std::vector<at::Tensor>& working() const { return working_; }
  /// w -= rate m / (sqrt(v) + 1e-8), m and v the moments of the kept weights' gradients.
  /// @param gradients  of working(), in its order
  void step(const std::vector<at::Tensor>& gradients, double rate, const Executor& executor);
  /// Matrix i in another type, its mask as it was: a kept weight too small for the type becomes the
  /// smallest normal number of it.
  at::Tensor rounded(size_t i, at::ScalarType dtype) const;
  size_t size() const { return working_.size(); }

 private:
  struct State {
    at::Tensor master, mask, mean, square;  // float32, bool, float32, float32 [out, in]
  };
  std::vector<State> states_;
  std::vector<at::Tensor> working_;
  int64_t steps_ = 0;
};

/// The learning rate of a step: a linear rise over the first twentieth, then half a cosine down to
/// 0. @param step  0 .. steps-1
double rate_at(int64_t step, int64_t steps, double highest);

}  // namespace lacuna::prune
