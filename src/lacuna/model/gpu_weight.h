// A weight on a GPU, packed for a kernel of liblacuna_cuda.so or read by it as it is.
#pragma once

#include <functional>
#include <optional>
#include <vector>

#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// y = x W^T + b. Few tokens (64 for 2:4, 1 for a dense W) run on the kernel that W is packed for,
/// and many tokens where it takes them (2:4); what it doesn't take expands W into the scratch,
/// unless it is dense, for the dense product. Everything goes onto torch's current stream.
class GpuWeight {
 public:
  /// W packed for the kernel that its problem gets with one token, or nothing where that is the
  /// dense product.
  /// @param dense  makes W, dense on the GPU; called only if there is a kernel
  /// @errors kUsage, kNotPossible: what LACUNA_FORCE asks for; kCheckFailed: W breaks its pattern
  static Result<std::optional<GpuWeight>> make(const kernels::Problem& problem,
                                               const Compute& compute,
                                               const std::function<at::Tensor()>& dense);
  /// @param x [..., in] -> [..., out]
  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const;
  /// The same for 1 .. max_tokens() of them (or as many as the kernel takes), contiguous and
  /// aligned to 16 bytes.
  /// @param workspace  workspace_bytes(tokens)
  /// @param overlap  whether the launch may precede the end of the kernel before it: only where
  /// that one writes no packed weights
  void run(const void* x, int64_t tokens, void* y, void* workspace, bool overlap) const;
  int64_t max_tokens() const { return static_cast<int64_t>(plans_.size()); }
  size_t workspace_bytes(int64_t tokens) const {
    const kernels::GpuPlan cut = plan(tokens);
    return kernel_->workspace_bytes(&layout_, &cut);
  }
  /// Dense, in the shared scratch: good until the next expansion on this thread. Of a dense W
  /// itself.
  at::Tensor expanded() const;
  size_t bytes() const { return packed_.nbytes(); }
  const kernels::GpuLinearKernel& kernel() const { return *kernel_; }

 private:
  GpuWeight(const kernels::GpuLinearKernel& kernel, const kernels::Problem& problem,
            const Compute& compute)
      : kernel_(&kernel), rows_(problem.outputs), columns_(problem.inputs), compute_(compute) {}
  Status pack(const at::Tensor& dense, const format::Pattern& pattern);
  bool takes(const at::Tensor& x) const;
  kernels::GpuPlan plan(int64_t tokens) const;

  const kernels::GpuLinearKernel* kernel_;
  int64_t rows_, columns_;
  Compute compute_;
  kernels::GpuLayout layout_ = {};
  at::Tensor packed_;                    // W itself where the layout packs nothing
  std::vector<kernels::GpuPlan> plans_;  // for 1, 2, ... max_tokens() tokens
};

}  // namespace lacuna::model
