#include "lacuna/model/parts.h"

#include <utility>

#include "lacuna/io/misfit.h"

namespace lacuna::model {
namespace {

Status check_shape(const io::Checkpoint& checkpoint, const std::string& name, const Shape& shape) {
  if (const auto line = io::misfit(checkpoint, name, shape))
    return bad_input("{}: {}. Is config.json that of these weights?", checkpoint.folder().string(),
                     *line);
  return {};
}

at::Tensor place(const Tensor& tensor, const Compute& compute) {
  return wrap(tensor).to(compute.device, compute.dtype);
}

}  // namespace

Result<at::Tensor> read_tensor(const io::Checkpoint& checkpoint, const std::string& name,
                               const Shape& shape, const Compute& compute) {
  LACUNA_CHECK(check_shape(checkpoint, name, shape));
  LACUNA_TRY(const Tensor tensor, checkpoint.dense(name));
  at::Tensor placed = place(tensor, compute);
  checkpoint.release(name);
  return placed;
}

Result<std::vector<Linear>> read_linears(const io::Checkpoint& checkpoint,
                                         const std::string& prefix,
                                         const std::vector<io::LinearSpec>& specs,
                                         const Compute& compute) {
  std::vector<Linear::Stored> parts;
  for (const io::LinearSpec& spec : specs) {
    const std::string name = prefix + spec.name + ".weight";
    LACUNA_CHECK(check_shape(checkpoint, name, {spec.out, spec.in}));
    Linear::Stored part;
    if (spec.bias) {
      LACUNA_TRY(part.bias,
                 read_tensor(checkpoint, prefix + spec.name + ".bias", {spec.out}, compute));
    }
    LACUNA_TRY(io::Weight weight, checkpoint.weight(name, torch_executor()));
    if (auto* matrix = std::get_if<format::CompactMatrix>(&weight))
      part.weight = std::move(*matrix);
    else
      part.weight = place(std::get<Tensor>(weight), compute);
    parts.push_back(std::move(part));
  }
  LACUNA_TRY(auto linears, Linear::together(std::move(parts), compute));
  for (const io::LinearSpec& spec : specs) checkpoint.release(prefix + spec.name + ".weight");
  return linears;
}

Result<Linear> read_linear(const io::Checkpoint& checkpoint, const std::string& prefix,
                           const io::LinearSpec& spec, const Compute& compute) {
  LACUNA_TRY(std::vector<Linear> one, read_linears(checkpoint, prefix, {spec}, compute));
  return std::move(one.front());
}

Result<Norm> Norm::read(const io::Checkpoint& checkpoint, const std::string& name,
                        io::NormKind kind, double epsilon, int64_t width, const Compute& compute) {
  Norm norm;
  norm.epsilon_ = epsilon;
  LACUNA_TRY(norm.weight_, read_tensor(checkpoint, name + ".weight", {width}, compute));
  if (kind == io::NormKind::kLayer) {
    LACUNA_TRY(norm.bias_, read_tensor(checkpoint, name + ".bias", {width}, compute));
  }
  return norm;
}

at::Tensor Norm::forward(const at::Tensor& x) const {
  if (bias_) return at::layer_norm(x, weight_.sizes(), weight_, *bias_, epsilon_);
  const at::Tensor wide = x.to(at::kFloat);
  const at::Tensor scale = wide.square().mean(-1, /*keepdim=*/true).add_(epsilon_).rsqrt_();
  return weight_ * (wide * scale).to(x.scalar_type());
}

size_t Norm::bytes() const {
  if (!weight_.defined()) return 0;
  return weight_.nbytes() + (bias_ ? bias_->nbytes() : 0);
}

at::Tensor activate(io::Activation activation, const at::Tensor& x) {
  switch (activation) {
    case io::Activation::kSilu:
      return at::silu(x);
    case io::Activation::kGelu:
      return at::gelu(x);
    case io::Activation::kGeluTanh:
      return at::gelu(x, "tanh");
    case io::Activation::kRelu:
      return at::relu(x);
    case io::Activation::kRelu2:
      return at::relu(x).square();
  }
  TORCH_CHECK(false, "activate: unknown activation");
}

}  // namespace lacuna::model
