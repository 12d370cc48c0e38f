#include "lacuna/kernels/linear_stream/linear_stream.h"

namespace lacuna::kernels::linear_stream {

Result<LinearPlan> plan(const Problem& problem, const Device& device) {
  if (problem.operation != kOperation)
    return usage_error("{}: planned as {} (need the operation of the same name).", problem.text(),
                       kOperation);
  return plan_linear(candidates(), problem, device);
}

void run(const LinearPlan& plan, const format::RowsView& rows, const format::RowProduct& product,
         void* workspace, const Executor& executor) {
  plan.candidate->run(rows, product, workspace, executor);
}

std::vector<Explanation> explain(const Problem& problem, const Device& device) {
  return candidates().explain(problem, device);
}

}  // namespace lacuna::kernels::linear_stream
