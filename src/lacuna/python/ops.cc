// torch.ops.lacuna: the linear operations for whoever has torch. liblacuna_torch.so is loaded by
// torch.ops.load_library; docs/python.md says how to use it.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "lacuna/python/form.h"

namespace lacuna::python {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::Variable;
using torch::autograd::variable_list;

using OptionalTensor = std::optional<at::Tensor>;

format::Pattern pattern_of(std::string_view text) {
  const auto pattern = format::Pattern::parse(text);
  TORCH_CHECK(pattern.ok(), "lacuna::pack: ", pattern.error().message);
  TORCH_CHECK(pattern->kind != format::PatternKind::kDense,
              "lacuna::pack: a dense weight has nothing to pack (need a sparse pattern).");
  return *pattern;
}

void check_weight(const at::Tensor& weight) {
  const at::ScalarType type = weight.scalar_type();
  TORCH_CHECK(weight.dim() == 2 && weight.numel() > 0,
              "lacuna::pack: weight must be a matrix [out, in] (got ", weight.sizes(), ").");
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "lacuna::pack: weight must be float32, bfloat16 or float16 (got ", type, ").");
}

/// The shape of y, after everything that a shape and a type can be wrong in.
c10::SymDimVector output_shape(const at::Tensor& x, const Form& form, const OptionalTensor& bias) {
  const at::ScalarType type = x.scalar_type();
  TORCH_CHECK(type == at::kFloat || type == at::kBFloat16 || type == at::kHalf,
              "lacuna::linear: x must be float32, bfloat16 or float16 (got ", type, ").");
  TORCH_CHECK(x.dim() >= 1 && x.sym_size(-1) == form.columns, "lacuna::linear: x has ",
              x.dim() >= 1 ? x.sym_size(-1) : c10::SymInt(0), " columns (need ", form.columns,
              ").");
  if (bias) {
    TORCH_CHECK(bias->dim() == 1 && bias->sym_size(0) == form.rows && bias->scalar_type() == type,
                "lacuna::linear: bias must be [", form.rows, "] of the type of x.");
  }
  c10::SymDimVector shape(x.sym_sizes().begin(), x.sym_sizes().end());
  shape.back() = form.rows;
  return shape;
}

template <Packed (*kPack)(const at::Tensor&, const format::Pattern&)>
std::tuple<at::Tensor, std::vector<int64_t>> pack(const at::Tensor& weight,
                                                  std::string_view pattern) {
  check_weight(weight);
  const Packed packed = kPack(weight.detach(), pattern_of(pattern));
  return {packed.bytes, packed.form.ints()};
}

template <at::Tensor (*kUnpack)(const at::Tensor&, const Form&)>
at::Tensor unpack(const at::Tensor& packed, at::IntArrayRef form) {
  return kUnpack(packed, Form::of(form));
}

template <at::Tensor (*kLinear)(const at::Tensor&, const at::Tensor&, const Form&,
                                const OptionalTensor&)>
at::Tensor linear(const at::Tensor& x, const at::Tensor& packed, at::IntArrayRef form,
                  const OptionalTensor& bias) {
  const Form of = Form::of(form);
  const auto shape = output_shape(x, of, bias);
  TORCH_CHECK(packed.device() == x.device() && (!bias || bias->device() == x.device()),
              "lacuna::linear: x, packed and bias must be on one device.");
  if (x.numel() == 0) return at::empty_symint(shape, x.options());
  OptionalTensor contiguous;
  if (bias) contiguous = bias->contiguous();
  return kLinear(x, packed, of, contiguous);
}

at::Tensor unpack_meta(const at::Tensor& packed, at::IntArrayRef form) {
  const Form of = Form::of(form);
  const auto type = static_cast<at::ScalarType>(form[4]);
  return at::empty({of.rows, of.columns}, packed.options().dtype(type));
}

at::Tensor linear_meta(const at::Tensor& x, const at::Tensor&, at::IntArrayRef form,
                       const OptionalTensor& bias) {
  return at::empty_symint(output_shape(x, Form::of(form), bias), x.options());
}

at::Tensor call_linear(const at::Tensor& x, const at::Tensor& packed, at::IntArrayRef form,
                       const OptionalTensor& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lacuna::linear", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&,
                                               at::IntArrayRef, const OptionalTensor&)>();
  return op.call(x, packed, form, bias);
}

at::Tensor call_unpack(const at::Tensor& packed, at::IntArrayRef form) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("lacuna::unpack", "")
                             .typed<at::Tensor(const at::Tensor&, at::IntArrayRef)>();
  return op.call(packed, form);
}

/// Gradients of x and the bias. The packed weight stays as it is.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* context, const at::Tensor& x, const at::Tensor& packed,
                            at::IntArrayRef form, const OptionalTensor& bias) {
    context->save_for_backward({packed});
    context->saved_data["form"] = form.vec();
    context->saved_data["bias"] = bias.has_value();
    const at::AutoDispatchBelowADInplaceOrView below;
    return call_linear(x, packed, form, bias);
  }
  static variable_list backward(AutogradContext* context, variable_list gradients) {
    const at::Tensor dy = gradients[0];
    const at::Tensor packed = context->get_saved_variables()[0];
    const std::vector<int64_t> form = context->saved_data["form"].toIntVector();
    at::Tensor dx, db;
    if (context->needs_input_grad(0))
      dx = at::matmul(dy, call_unpack(packed, form).to(dy.scalar_type()));
    if (context->saved_data["bias"].toBool() && context->needs_input_grad(2))
      db = dy.reshape_symint({c10::SymInt(-1), dy.sym_size(-1)}).sum(0);
    return {dx, Variable(), Variable(), db};
  }
};

at::Tensor linear_autograd(const at::Tensor& x, const at::Tensor& packed, at::IntArrayRef form,
                           const OptionalTensor& bias) {
  return Linear::apply(x, packed, form, bias);
}

}  // namespace

TORCH_LIBRARY(lacuna, m) {
  const std::vector<at::Tag> tags = {at::Tag::pt2_compliant_tag};
  m.def("pack(Tensor weight, str pattern) -> (Tensor, int[])");
  m.def("unpack(Tensor packed, int[] form) -> Tensor", tags);
  m.def("linear(Tensor x, Tensor packed, int[] form, Tensor? bias=None) -> Tensor", tags);
}

TORCH_LIBRARY_IMPL(lacuna, CPU, m) {
  m.impl("pack", pack<pack_cpu>);
  m.impl("unpack", unpack<unpack_cpu>);
  m.impl("linear", linear<linear_cpu>);
}

TORCH_LIBRARY_IMPL(lacuna, CUDA, m) {
  m.impl("pack", pack<pack_gpu>);
  m.impl("unpack", unpack<unpack_gpu>);
  m.impl("linear", linear<linear_gpu>);
}

TORCH_LIBRARY_IMPL(lacuna, Meta, m) {
  m.impl("unpack", unpack_meta);
  m.impl("linear", linear_meta);
}

TORCH_LIBRARY_IMPL(lacuna, Autograd, m) { m.impl("linear", linear_autograd); }

}  // namespace lacuna::python
