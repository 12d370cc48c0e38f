#include "lacuna/kernels/linear.h"

#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"

namespace lacuna::kernels {

const std::array<LinearOperation, 3>& linear_operations() {
  using format::PatternKind;
  static const std::array<LinearOperation, 3> all = {{
      {linear_dense::kOperation, PatternKind::kDense, linear_dense::plan, linear_dense::explain,
       linear_dense::candidates},
      {linear_bitmap::kOperation, PatternKind::kUnstructured, linear_bitmap::plan,
       linear_bitmap::explain, linear_bitmap::candidates},
      {linear_nm::kOperation, PatternKind::kKeepOf, linear_nm::plan, linear_nm::explain,
       linear_nm::candidates},
  }};
  return all;
}

const LinearOperation* linear_operation(format::PatternKind weight) {
  for (const LinearOperation& operation : linear_operations())
    if (operation.weight == weight) return &operation;
  return nullptr;
}

std::vector<Explanation> explain_linear(const LinearOperation& operation, const Problem& problem,
                                        const Device& device) {
  return dtype_of(problem.values) ? operation.explain(problem, device)
                                  : linear_coded::explain(problem, device);
}

Result<const LinearOperation*> find_linear_operation(std::string_view name) {
  std::string known;
  for (const LinearOperation& operation : linear_operations()) {
    if (operation.name == name) return &operation;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", operation.name);
  }
  return usage_error("operation: unknown (got \"{}\"; need one of {}).", name, known);
}

}  // namespace lacuna::kernels
