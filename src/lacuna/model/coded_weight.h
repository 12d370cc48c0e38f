// A quantised weight on the CPU, held as the stream that its kernels read.
#pragma once

#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/model/weight.h"

namespace lacuna::model {

/// y = x' W^T + b with x' = x rounded per token to 127 steps either way of its largest magnitude.
/// Codes meet codes (kernels/linear_coded), however many tokens; where no kernel is faster with
/// more than 16, W is expanded into the scratch and takes the dense product with the same x'.
class CodedWeight final : public Weight {
 public:
  /// @errors kNotPossible: codes or a shape that no kernel multiplies (fp8, more than 65,536
  /// inputs)
  static Result<WeightPtr> make(const format::CompactMatrix& matrix, const Compute& compute);
  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const override;
  void run(const format::RowProduct& product, const Executor& executor) const override;
  at::Tensor expanded() const override;
  void read_rows(const int32_t* ids, int64_t count, void* out,
                 const Executor& executor) const override;
  size_t bytes() const override { return stream_.size_bytes(); }
  bool is_coded() const override { return true; }
  std::optional<kernels::Problem> decode_problem() const override { return plans_.front().problem; }

  CodedWeight(kernels::linear_coded::Stream stream, const Compute& compute)
      : Weight(stream.rows(), stream.columns(), compute), stream_(std::move(stream)) {}

 private:
  /// @param many  holds the plan for more tokens than plans_ has
  /// @return null where no kernel takes so many
  const kernels::linear_coded::CodedPlan* plan_for(
      int64_t tokens, std::optional<kernels::linear_coded::CodedPlan>& many) const;
  at::Tensor multiply_expanded(const at::Tensor& x, const std::optional<at::Tensor>& bias) const;

  kernels::linear_coded::Stream stream_;
  std::vector<kernels::linear_coded::CodedPlan> plans_;  // for 1, 2, ... tokens
};

}  // namespace lacuna::model
