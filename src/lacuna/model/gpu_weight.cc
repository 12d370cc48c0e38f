#include "lacuna/model/gpu_weight.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

#include "lacuna/kernels/linear.h"
#include "lacuna/model/scratch.h"

namespace lacuna::model {
namespace {

using kernels::GpuLinearKernel;

// Of a dense product of codes: what torch's takes.
constexpr int64_t kLeastOfCodes = 17, kCodesAligned = 16;
constexpr int64_t kTokensOfSums = 4096;
// Of the identity that a packed weight is checked by.
constexpr int64_t kIdentityRows = 128;

bool checks_products() {
#ifndef NDEBUG
  return true;
#else
  const char* asked = std::getenv("LACUNA_CHECK_PACKED");
  return asked != nullptr && std::string_view(asked) == "1";
#endif
}

/// Throws what the library answers.
void check(int error, const GpuLinearKernel& kernel, const char* step) {
  TORCH_CHECK(error == 0, kernel.operation, ":", kernel.name, " can't ", step, ": ",
              (*kernels::gpu_library())->error_text(error));
}

at::Tensor device_bytes(size_t count, at::Device device) {
  return at::empty({static_cast<int64_t>(count)},
                   at::TensorOptions().device(device).dtype(at::kByte));
}

}  // namespace

Result<WeightPtr> GpuWeight::make(const kernels::Problem& problem, const Compute& compute,
                                  const std::function<at::Tensor()>& dense,
                                  const at::Tensor& scales) {
  LACUNA_TRY(const auto* operation, kernels::find_linear_operation(problem.operation));
  LACUNA_TRY(const GpuLinearKernel* kernel,
             kernels::choose_gpu_kernel(*operation, problem, kernels::Device::this_gpu()));
  if (kernel == nullptr) return WeightPtr();
  return packed_for(*kernel, problem, compute, dense, scales);
}

Result<WeightPtr> GpuWeight::packed_for(const GpuLinearKernel& kernel,
                                        const kernels::Problem& problem, const Compute& compute,
                                        const std::function<at::Tensor()>& dense,
                                        const at::Tensor& scales) {
  auto weight = std::make_shared<GpuWeight>(kernel, problem, compute);
  LACUNA_CHECK(weight->pack(dense().contiguous(), scales, problem.pattern));
  return WeightPtr(std::move(weight));
}

Status GpuWeight::pack(const at::Tensor& dense, const at::Tensor& scales,
                       const format::Pattern& pattern) {
  void* const stream = gpu_stream(compute().device);
  const void* const w = dense.const_data_ptr();
  const at::Tensor scratch =
      device_bytes(kernel_->scratch_bytes(rows(), columns()), compute().device);
  check(kernel_->measure(w, rows(), columns(), scratch.mutable_data_ptr(), &layout_, stream),
        *kernel_, "measure");
  packed_ = layout_.packed_bytes > 0 ? device_bytes(layout_.packed_bytes, compute().device) : dense;
  const at::Tensor report = device_bytes(sizeof(kernels::GpuPackReport), compute().device).zero_();
  check(kernel_->pack(&layout_, w, scratch.const_data_ptr(), packed_.mutable_data_ptr(),
                      static_cast<kernels::GpuPackReport*>(report.mutable_data_ptr()), stream),
        *kernel_, "pack");
  if (scales.defined()) {
    check(
        kernel_->pack_scales(&layout_, scales.const_data_ptr(), packed_.mutable_data_ptr(), stream),
        *kernel_, "pack the scales");
    if (kernel_->unpack_codes != nullptr) row_scales_ = scales.reshape({1, rows()}).to(at::kFloat);
  }
  plans_.resize(static_cast<size_t>(kernel_->max_tokens(&layout_)));
  for (size_t i = 0; i < plans_.size(); ++i) plans_[i] = make_plan(static_cast<int64_t>(i + 1));
  const at::Tensor copied = report.cpu();
  const auto& found = *static_cast<const kernels::GpuPackReport*>(copied.const_data_ptr());
  if (found.violations > 0)
    return check_failed(
        "{}:{}: group {} of row {} breaks {} (got {} such groups; need none). Prune the weight "
        "again.",
        kernel_->operation, kernel_->name, found.first_group % (columns() / pattern.of),
        found.first_group / (columns() / pattern.of), pattern.text(), found.violations);
  return checks_products() ? check_products() : Status();
}

Status GpuWeight::check_products() const {
  if (layout_.packed_bytes == 0) return {};  // W as it is
  const at::Tensor w = expanded();
  if (!w.isfinite().all().item<bool>()) {  // 0 times that is NaN
    TORCH_WARN(kernel_->operation, ":", kernel_->name,
               ": NaN or Inf among the weights, so the packed products aren't checked.");
    return {};
  }
  const int64_t at_once =
      std::min(columns(), max_tokens() > 0 ? std::min(max_tokens(), kIdentityRows) : kIdentityRows);
  if (!takes(at_once)) {
    TORCH_WARN(kernel_->operation, ":", kernel_->name, " takes no ", at_once,
               " tokens, so the packed products aren't checked.");
    return {};
  }
  constexpr double kRounding = 0x1p-7;  // of codes times a rounded scale
  for (int64_t start = 0; start < columns(); start += at_once) {
    const int64_t first = std::min(start, columns() - at_once);
    at::Tensor identity = at::zeros({at_once, columns()}, w.options());
    identity.narrow(1, first, at_once).fill_diagonal_(1);
    const at::Tensor y = multiply(identity, {});
    const at::Tensor wanted = w.narrow(1, first, at_once).t();
    const at::Tensor wrong = at::isclose(y, wanted, kRounding, 0).logical_not();
    if (!wrong.any().item<bool>()) continue;
    const at::Tensor place = wrong.nonzero()[0];
    const auto column = place[0].item<int64_t>(), row = place[1].item<int64_t>();
    return check_failed(
        "{}:{}: multiplies the packed weight wrongly (row {}, column {}: got {}; need {}). Set "
        "LACUNA_FORCE={}:{}, and report this with what `lacuna doctor` prints.",
        kernel_->operation, kernel_->name, row, first + column, y[column][row].item<double>(),
        wanted[column][row].item<double>(), kernel_->operation, kernels::kExpandCublas);
  }
  return {};
}

kernels::GpuPlan GpuWeight::make_plan(int64_t tokens) const {
  kernels::GpuPlan made;
  const auto plan = kernel_rounds(tokens) ? kernel_->plan_rounded : kernel_->plan;
  check(plan(&layout_, tokens, &made), *kernel_, "plan");
  return made;
}

kernels::GpuPlan GpuWeight::plan(int64_t tokens) const {
  return tokens <= max_tokens() ? plans_[static_cast<size_t>(tokens - 1)] : make_plan(tokens);
}

bool GpuWeight::kernel_rounds(int64_t tokens) const {
  if (!compute().int8_activations || kernel_->rounded_from == nullptr) return false;
  const int64_t from = kernel_->rounded_from(&layout_);
  return from > 0 && tokens >= from;
}

bool GpuWeight::unpacks_codes(int64_t tokens) const {
  return compute().int8_activations && row_scales_.defined() && tokens >= kLeastOfCodes &&
         !takes(tokens) && rows() % kCodesAligned == 0 && columns() % kCodesAligned == 0;
}

bool GpuWeight::takes(int64_t tokens) const {
  const int64_t many = kernel_->many_tokens(&layout_);
  return tokens > 0 &&
         (tokens <= max_tokens() || (many > 0 && tokens >= many) || kernel_rounds(tokens));
}

at::Tensor GpuWeight::multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
  const int64_t tokens = x.numel() / columns();
  const bool ours = x.scalar_type() == compute().dtype && x.device() == packed_.device() &&
                    !x.requires_grad() && (takes(tokens) || unpacks_codes(tokens));
  if (!ours) return at::linear(x, expanded(), bias);
  at::Tensor aligned = x.contiguous();
  if (reinterpret_cast<uintptr_t>(aligned.const_data_ptr()) % 16 != 0) aligned = aligned.clone();
  Shape shape = x.sizes().vec();
  shape.back() = rows();
  at::Tensor y;
  if (takes(tokens)) {
    y = at::empty(shape, x.options());
    const at::Tensor workspace = device_bytes(workspace_bytes(tokens), x.device());
    launch(aligned.const_data_ptr(), tokens, y.mutable_data_ptr(), workspace.mutable_data_ptr(),
           /*overlap=*/false);
  } else {
    y = multiply_codes(aligned.view({tokens, columns()})).view(shape);
  }
  return bias ? y.add_(*bias) : y;
}

at::Tensor GpuWeight::multiply_codes(const at::Tensor& x) const {
  const kernels::GpuTable& library = **kernels::gpu_library();
  void* const stream = gpu_stream(compute().device);
  const int64_t tokens = x.size(0);
  const at::ScalarType code = e4m3_ ? at::kFloat8_e4m3fn : at::kChar;
  const at::Tensor w = scratch(rows(), columns() / 2, compute()).view(code);
  check(kernel_->unpack_codes(&layout_, packed_.const_data_ptr(), w.mutable_data_ptr(), stream),
        *kernel_, "unpack the codes");
  const at::Tensor codes = at::empty(x.sizes(), x.options().dtype(code));
  const at::Tensor scales = at::empty({tokens, 1}, x.options().dtype(at::kFloat));
  const kernels::GpuRounding rounding = {tokens,
                                         columns(),
                                         e4m3_,
                                         x.const_data_ptr(),
                                         codes.mutable_data_ptr(),
                                         scales.mutable_data_ptr<float>()};
  check(library.round_tokens(&rounding, stream), *kernel_, "round x");
  if (e4m3_)
    return at::_scaled_mm(codes, w.t(), scales, row_scales_, /*bias=*/{}, /*scale_result=*/{},
                          compute().dtype, /*use_fast_accum=*/true);
  const at::Tensor y = at::empty({tokens, rows()}, x.options());
  // In parts, for sums are twice as wide as y.
  for (int64_t first = 0; first < tokens; first += kTokensOfSums) {
    const int64_t left = tokens - first;
    const int64_t count = left < 2 * kTokensOfSums ? left : kTokensOfSums;
    const at::Tensor sums = at::_int_mm(codes.narrow(0, first, count), w.t());
    const kernels::GpuScaling scaling = {count,
                                         rows(),
                                         sums.const_data_ptr<int32_t>(),
                                         scales.const_data_ptr<float>() + first,
                                         row_scales_.const_data_ptr<float>(),
                                         y.narrow(0, first, count).mutable_data_ptr()};
    check(library.scale_sums(&scaling, stream), *kernel_, "scale the sums");
    if (count == left) break;
  }
  return y;
}

void GpuWeight::run(const format::RowProduct& product, const Executor& executor) const {
  const int64_t tokens = product.tokens;
  if (!takes(tokens)) return Weight::run(product, executor);
  // Through the scratch, so that a recorded step finds its workspace where it was.
  const auto elements = static_cast<int64_t>((workspace_bytes(tokens) + 1) / 2);
  const at::Tensor workspace = elements > 0 ? scratch(1, elements, compute()) : at::Tensor();
  launch(product.x, tokens, product.y, elements > 0 ? workspace.mutable_data_ptr() : nullptr,
         /*overlap=*/true);
  if (product.bias == nullptr) return;
  device_view(product.y, {tokens, rows()}, compute())
      .add_(device_view(product.bias, {rows()}, compute()));
}

void GpuWeight::launch(const void* x, int64_t tokens, void* y, void* workspace,
                       bool overlap) const {
  const kernels::GpuPlan cut = plan(tokens);
  check(kernel_->run(&layout_, &cut, packed_.const_data_ptr(), x, y, workspace, overlap,
                     gpu_stream(compute().device)),
        *kernel_, "run");
}

at::Tensor GpuWeight::expanded() const {
  if (layout_.packed_bytes == 0) return packed_;
  at::Tensor out = scratch(rows(), columns(), compute());
  check(kernel_->unpack(&layout_, packed_.const_data_ptr(), out.mutable_data_ptr(),
                        gpu_stream(compute().device)),
        *kernel_, "unpack");
  return out;
}

}  // namespace lacuna::model
