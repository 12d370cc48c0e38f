#include "lacuna/model/row_weight.h"

#include "lacuna/kernels/linear_csr/linear_csr.h"
#include "lacuna/kernels/linear_stream/linear_stream.h"
#include "lacuna/kernels/stream.h"
#include "lacuna/model/few_tokens.h"
#include "lacuna/model/scratch.h"
#include "lacuna/model/stored_weight.h"

namespace lacuna::model {
namespace linear_csr = kernels::linear_csr;
namespace linear_stream = kernels::linear_stream;

namespace {

format::RowsView view_of(const RowWeight::Held& held) {
  return std::visit(
      [](const auto& form) {
        if constexpr (std::is_same_v<std::decay_t<decltype(form)>, at::Tensor>)
          return format::dense_rows(form.const_data_ptr(), dtype_of(form.scalar_type()),
                                    form.size(0), form.size(1));
        else
          return form.view();
      },
      held);
}

}  // namespace

RowWeight::RowWeight(Held held, int64_t rows, int64_t columns, const Compute& compute)
    : Weight(rows, columns, compute), held_(std::move(held)), view_(view_of(held_)) {}

bool RowWeight::takes(const at::Tensor& weight) {
  const at::ScalarType dtype = weight.scalar_type();
  return weight.is_cpu() && weight.is_contiguous() &&
         (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
}

Result<WeightPtr> RowWeight::dense(at::Tensor weight) {
  const Compute compute{at::kCPU, weight.scalar_type()};
  const auto problem =
      decode_problem_of({}, dtype_of(compute.dtype), weight.size(0), weight.size(1), 0.0, compute);
  return planned(std::move(weight), problem, compute);
}

Result<WeightPtr> RowWeight::compact(format::CompactMatrix matrix, const kernels::Problem& problem,
                                     const Compute& compute) {
  if (problem.operation == linear_csr::kOperation) {
    LACUNA_TRY(auto slices, linear_csr::Slices::pack(matrix, torch_executor()));
    return planned(std::move(slices), problem, compute);
  }
  if (problem.operation == linear_stream::kOperation)
    return RowWeight::stream({std::move(matrix)}, problem, compute);
  LACUNA_TRY(auto rows, format::CompactRows::make(std::move(matrix)));
  return planned(std::move(rows), problem, compute);
}

Result<WeightPtr> RowWeight::stream(const std::vector<format::CompactMatrix>& parts,
                                    const kernels::Problem& problem, const Compute& compute) {
  LACUNA_TRY(auto stream, linear_stream::ValueStream::pack(parts, torch_executor()));
  return planned(std::move(stream), problem, compute);
}

Result<WeightPtr> RowWeight::planned(Held held, kernels::Problem problem, const Compute& compute) {
  auto weight =
      std::make_shared<RowWeight>(std::move(held), problem.outputs, problem.inputs, compute);
  LACUNA_TRY(weight->operation_, kernels::find_linear_operation(problem.operation));
  for (; problem.tokens <= format::kMaxTokens; ++problem.tokens) {
    LACUNA_TRY(auto plan, weight->operation_->plan(problem, kernels::Device::this_cpu()));
    weight->plans_.push_back(std::move(plan));
  }
  return WeightPtr(std::move(weight));
}

const kernels::LinearPlan* RowWeight::plan_for(DType dtype, int64_t tokens,
                                               std::optional<kernels::LinearPlan>& many) const {
  kernels::Problem problem = plans_.front().problem;
  if (tokens <= 0 || dtype != problem.activations) return nullptr;
  if (tokens <= format::kMaxTokens) return &plans_[static_cast<size_t>(tokens - 1)];
  problem.tokens = tokens;
  auto plan = operation_->plan(problem, kernels::Device::this_cpu());
  return plan.ok() ? &many.emplace(std::move(plan).value()) : nullptr;
}

void RowWeight::run_plan(const kernels::LinearPlan& plan, const format::RowProduct& product,
                         const Executor& executor) const {
  run_planned(plan, product,
              [&](const kernels::LinearPlan& of, const format::RowProduct& operands,
                  void* workspace) { of.candidate->run(view_, operands, workspace, executor); });
}

at::Tensor RowWeight::multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
  std::optional<kernels::LinearPlan> many;
  const kernels::LinearPlan* plan = nullptr;
  if (!x.requires_grad())
    plan = plan_for(dtype_of(x.scalar_type()), x.numel() / std::max<int64_t>(1, x.size(-1)), many);
  if (plan == nullptr) return Weight::multiply(x, bias);
  return multiply_few_tokens(x, bias, rows(), [&](const format::RowProduct& product) {
    run_plan(*plan, product, torch_executor());
  });
}

void RowWeight::run(const format::RowProduct& product, const Executor& executor) const {
  std::optional<kernels::LinearPlan> many;
  if (const auto* plan = plan_for(product.dtype, product.tokens, many))
    return run_plan(*plan, product, executor);
  Weight::run(product, executor);
}

at::Tensor RowWeight::expanded() const {
  if (const auto* tensor = std::get_if<at::Tensor>(&held_)) return *tensor;
  at::Tensor out = scratch(rows(), columns(), compute());
  if (const auto* stored = std::get_if<format::CompactRows>(&held_)) {
    expand_into(stored->matrix(), out);
    return out;
  }
  const bool slices = std::holds_alternative<linear_csr::Slices>(held_);
  const int64_t parts =
      slices ? linear_csr::slice_count(rows()) : kernels::stream::tile_count(rows());
  const auto expand = slices ? linear_csr::expand_slice : linear_stream::expand_tile;
  const DType dtype = dtype_of(out.scalar_type());
  void* const data = out.mutable_data_ptr();
  torch_executor().parallel_for(parts, [&](int64_t part) { expand(view_, part, dtype, data); });
  return out;
}

void RowWeight::read_rows(const int32_t* ids, int64_t count, void* out,
                          const Executor& executor) const {
  if (!is_coded()) return Weight::read_rows(ids, count, out, executor);
  read_stored_rows(std::get<format::CompactRows>(held_).matrix(), ids, count, out, executor);
}

size_t RowWeight::bytes() const {
  return std::visit(
      [](const auto& form) -> size_t {
        if constexpr (std::is_same_v<std::decay_t<decltype(form)>, at::Tensor>)
          return form.nbytes();
        else
          return form.size_bytes();
      },
      held_);
}

}  // namespace lacuna::model
