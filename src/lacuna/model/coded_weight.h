// A quantised weight on the CPU, held as the stream that its kernels read.
#pragma once

#include "lacuna/format/compact.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// y = x' W^T + b with x' = x rounded per token to 127 steps either way of its largest magnitude.
/// Up to 16 tokens multiply codes with codes (kernels/linear_coded); more expand W into the scratch
/// and take the dense product with the same x'.
class CodedWeight {
 public:
  /// @errors kNotPossible: codes or a shape that no kernel multiplies (fp8, zero points, more than
  /// 65,536 inputs)
  static Result<CodedWeight> make(const format::CompactMatrix& matrix, const Compute& compute);
  /// @param x [..., in] -> [..., out]
  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const;
  /// The same for 1..16 tokens of the dtype of the computation, on raw memory.
  void run(const format::RowProduct& product, const Executor& executor) const;
  /// Dense, in the shared scratch: good until the next expansion on this thread.
  at::Tensor expanded() const;
  /// Writes one row of W: out [in] of the dtype of the computation.
  void expand_row(int64_t row, void* out) const;
  size_t bytes() const { return stream_.size_bytes(); }

 private:
  CodedWeight(kernels::linear_coded::Stream stream, const Compute& compute)
      : stream_(std::move(stream)), compute_(compute) {}

  kernels::linear_coded::Stream stream_;
  Compute compute_;
  std::vector<kernels::linear_coded::CodedPlan> plans_;  // for 1, 2, ... tokens
};

}  // namespace lacuna::model
