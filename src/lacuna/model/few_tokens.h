// How a Linear calls a kernel with the plan for its number of tokens.
#pragma once

#include <optional>

#include "lacuna/core/large_block.h"
#include "lacuna/format/row_product.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// Calls run(plan, product, workspace); the workspace has plan.workspace_bytes.
template <class Plan, class Run>
void run_planned(const Plan& plan, const format::RowProduct& product, Run run) {
  static thread_local LargeBlock workspace;  // grows to the largest plan and stays
  if (workspace.size() < plan.workspace_bytes) {
    workspace = {};  // give the old one back first
    workspace = LargeBlock(plan.workspace_bytes);
  }
  run(plan, product, workspace.data());
}

/// x [..., in] -> [..., outputs] through `run`, which fills a product's y.
template <class Run>
at::Tensor multiply_few_tokens(const at::Tensor& x, const std::optional<at::Tensor>& bias,
                               int64_t outputs, Run run) {
  const at::Tensor rows = x.contiguous();
  const int64_t inputs = x.size(-1);
  Shape shape = x.sizes().vec();
  shape.back() = outputs;
  at::Tensor y = at::empty(shape, x.options());
  run(format::RowProduct{.dtype = dtype_of(x.scalar_type()),
                         .tokens = rows.numel() / inputs,
                         .x = rows.const_data_ptr(),
                         .x_stride = inputs,
                         .y = y.mutable_data_ptr(),
                         .y_stride = outputs,
                         .bias = bias ? bias->const_data_ptr() : nullptr});
  return y;
}

}  // namespace lacuna::model
