// What blocks and ends are made of: tensors read with their shapes checked, norms, activations.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/model/linear.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// Reads one tensor densely onto the device, in the type of the computation. On the CPU a tensor
/// that already has this type stays in the mapped file.
/// What was read of the file is in this process's memory afterwards only as far as it is used
/// again.
/// @errors kBadInput: missing, or not of this shape (tensor named)
Result<at::Tensor> read_tensor(const io::Checkpoint& checkpoint, const std::string& name,
                               const Shape& shape, const Compute& compute);
/// Reads `prefix + spec.name` of Linears that read the same x, as they are stored, dense or
/// compact.
/// @errors as read_tensor
Result<std::vector<Linear>> read_linears(const io::Checkpoint& checkpoint,
                                         const std::string& prefix,
                                         const std::vector<io::LinearSpec>& specs,
                                         const Compute& compute);
/// One of them.
Result<Linear> read_linear(const io::Checkpoint& checkpoint, const std::string& prefix,
                           const io::LinearSpec& spec, const Compute& compute);

/// RMSNorm x / sqrt(mean x^2 + eps) * w (in float32, cast back before w), or LayerNorm with bias.
class Norm {
 public:
  Norm() = default;
  /// @param name  without ".weight"
  static Result<Norm> read(const io::Checkpoint& checkpoint, const std::string& name,
                           io::NormKind kind, double epsilon, int64_t width,
                           const Compute& compute);
  at::Tensor forward(const at::Tensor& x) const;
  size_t bytes() const;
  double epsilon() const { return epsilon_; }
  const at::Tensor& weight() const { return weight_; }
  const std::optional<at::Tensor>& bias() const { return bias_; }

 private:
  double epsilon_ = 0;
  at::Tensor weight_;
  std::optional<at::Tensor> bias_;  // LayerNorm has one, RMSNorm none
};

at::Tensor activate(io::Activation activation, const at::Tensor& x);

}  // namespace lacuna::model
