// How a Linear calls a kernel that was planned for each number of tokens.
#pragma once

#include <optional>
#include <vector>

#include "lacuna/format/row_product.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// y of a kernel for x [..., in] -> [..., outputs].
/// @param plans  for 1, 2, ... tokens; x has no more rows than there are plans
/// @param run    (plan, product, workspace); the workspace has plan.workspace_bytes
template <class Plan, class Run>
at::Tensor multiply_few_tokens(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                               int64_t outputs, const std::vector<Plan>& plans, Run run) {
  const at::Tensor rows = x.contiguous();
  const int64_t inputs = x.size(-1), tokens = rows.numel() / inputs;
  const Plan& plan = plans[static_cast<size_t>(tokens - 1)];
  Shape shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options());
  static thread_local std::vector<std::byte> workspace;
  if (workspace.size() < plan.workspace_bytes) workspace.resize(plan.workspace_bytes);
  run(plan,
      format::RowProduct{.dtype = dtype_of(x.scalar_type()),
                         .tokens = tokens,
                         .x = rows.const_data_ptr(),
                         .x_stride = inputs,
                         .y = y.mutable_data_ptr(),
                         .y_stride = outputs,
                         .bias = bias ? bias->const_data_ptr() : nullptr},
      workspace.data());
  return y;
}

}  // namespace lacuna::model
