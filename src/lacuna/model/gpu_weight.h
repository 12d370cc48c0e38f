// A weight on a GPU, packed for a kernel of liblacuna_cuda.so or read by it as it is.
#pragma once

#include <functional>
#include <vector>

#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/weight.h"

namespace lacuna::model {

/// y = x W^T + b. Few tokens (64 for 2:4 and for codes, 1 for a dense W) run on the kernel that W
/// is packed for, and many tokens where it takes them (2:4); what it doesn't take expands W into
/// the scratch, unless it is dense, for the dense product. Where codes are multiplied faster by x
/// rounded to such codes, they are, unless the computation forbids it: by the kernel, or unpacked
/// into the scratch for a dense product of codes (multiply() alone: run() may be recorded, and that
/// product allocates). Everything goes onto torch's current stream.
class GpuWeight final : public Weight {
 public:
  /// W packed for the kernel that its problem gets with one token, or null where that is the dense
  /// product.
  /// @param dense  makes W, dense on the GPU; called only if there is a kernel. Of a problem of
  /// codes it makes them, as numbers
  /// @param scales  of codes: bf16 [rows, groups], on the GPU
  /// @errors kUsage, kNotPossible: what LACUNA_FORCE asks for; kCheckFailed: W breaks its pattern,
  /// or, in a debug build and with LACUNA_CHECK_PACKED=1, its products aren't those of W
  static Result<WeightPtr> make(const kernels::Problem& problem, const Compute& compute,
                                const std::function<at::Tensor()>& dense,
                                const at::Tensor& scales = {});
  /// The same for this kernel, which supports the problem.
  static Result<WeightPtr> packed_for(const kernels::GpuLinearKernel& kernel,
                                      const kernels::Problem& problem, const Compute& compute,
                                      const std::function<at::Tensor()>& dense,
                                      const at::Tensor& scales = {});
  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const override;
  /// The launch may precede the end of the kernel before it, which must write no packed weights.
  void run(const format::RowProduct& product, const Executor& executor) const override;
  at::Tensor expanded() const override;
  size_t bytes() const override {
    return packed_.nbytes() + (row_scales_.defined() ? row_scales_.nbytes() : 0);
  }
  bool is_compact() const override { return layout_.packed_bytes > 0; }

  GpuWeight(const kernels::GpuLinearKernel& kernel, const kernels::Problem& problem,
            const Compute& compute)
      : Weight(problem.outputs, problem.inputs, compute),
        kernel_(&kernel),
        e4m3_(problem.values == kernels::Values::kFP8) {}

 private:
  Status pack(const at::Tensor& dense, const at::Tensor& scales, const format::Pattern& pattern);
  /// Multiplies by the identity and compares with W: unpacking doesn't prove that the tensor cores
  /// read the packed places as they were written.
  Status check_products() const;
  int64_t max_tokens() const { return static_cast<int64_t>(plans_.size()); }
  size_t workspace_bytes(int64_t tokens) const {
    const kernels::GpuPlan cut = plan(tokens);
    return kernel_->workspace_bytes(&layout_, &cut);
  }
  /// For as many as takes() allows. @param workspace  workspace_bytes(tokens)
  void launch(const void* x, int64_t tokens, void* y, void* workspace, bool overlap) const;
  bool takes(int64_t tokens) const;
  /// Whether the kernel multiplies so many rounded tokens.
  bool kernel_rounds(int64_t tokens) const;
  /// Whether so many are for the dense product of codes.
  bool unpacks_codes(int64_t tokens) const;
  /// @shape x [T, columns], contiguous -> [T, rows]
  at::Tensor multiply_codes(const at::Tensor& x) const;
  kernels::GpuPlan make_plan(int64_t tokens) const;
  kernels::GpuPlan plan(int64_t tokens) const;

  const kernels::GpuLinearKernel* kernel_;
  const bool e4m3_;  // codes, if they are such of 8 bits: these, else int8
  kernels::GpuLayout layout_ = {};
  at::Tensor packed_;                    // W itself where the layout packs nothing
  at::Tensor row_scales_;                // float32 [1, rows], if the kernel unpacks codes
  std::vector<kernels::GpuPlan> plans_;  // for 1, 2, ... max_tokens() tokens
};

}  // namespace lacuna::model
