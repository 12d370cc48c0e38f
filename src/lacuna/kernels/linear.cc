#include "lacuna/kernels/linear.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/linear_bsr/linear_bsr.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/linear_csr/linear_csr.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"
#include "lacuna/kernels/linear_stream/linear_stream.h"

namespace lacuna::kernels {

const std::array<LinearOperation, 6>& linear_operations() {
  using format::PatternKind;
  static const std::array<LinearOperation, 6> all = {{
      {linear_dense::kOperation, PatternKind::kDense, linear_dense::plan, linear_dense::explain,
       linear_dense::candidates, linear_dense::gpu_candidates},
      {linear_bitmap::kOperation, PatternKind::kUnstructured, linear_bitmap::plan,
       linear_bitmap::explain, linear_bitmap::candidates, linear_bitmap::gpu_candidates},
      {linear_nm::kOperation, PatternKind::kKeepOf, linear_nm::plan, linear_nm::explain,
       linear_nm::candidates, linear_nm::gpu_candidates},
      {linear_bsr::kOperation, PatternKind::kBlock, linear_bsr::plan, linear_bsr::explain,
       linear_bsr::candidates, linear_bsr::gpu_candidates},
      {linear_csr::kOperation, PatternKind::kUnstructured, linear_csr::plan, linear_csr::explain,
       linear_csr::candidates, linear_csr::gpu_candidates},
      {linear_stream::kOperation, PatternKind::kUnstructured, linear_stream::plan,
       linear_stream::explain, linear_stream::candidates, linear_stream::gpu_candidates},
  }};
  return all;
}

const LinearOperation* linear_operation(format::PatternKind weight) {
  for (const LinearOperation& operation : linear_operations())
    if (operation.weight == weight) return &operation;
  return nullptr;
}

const LinearOperation* linear_operation_on_cpu(const Problem& problem, const Device& cpu) {
  using format::PatternKind;
  const LinearOperation* layout_itself = linear_operation(problem.pattern.kind);
  const bool unstructured = problem.pattern.kind == PatternKind::kUnstructured;
  if (!dtype_of(problem.values) || (!unstructured && problem.pattern.kind != PatternKind::kKeepOf))
    return layout_itself;
  std::vector<const LinearOperation*> fast, slow;  // in order of preference
  const auto add = [&](std::string_view name, bool is_fast) {
    (is_fast ? fast : slow).push_back(*find_linear_operation(name));
  };
  if (unstructured) add(linear_csr::kOperation, problem.sparsity >= kLeastCsrSparsity);
  if (problem.values != Values::kF32)
    add(linear_stream::kOperation, problem.values == Values::kBF16 && cpu.cpu.avx512_vbmi2);
  fast.push_back(layout_itself);
  fast.insert(fast.end(), slow.begin(), slow.end());
  for (const LinearOperation* operation : fast)
    if (forced_candidate(operation->name, cpu)) return operation;
  return fast.front();
}

const LinearOperation* linear_operation_on_gpu(const Problem& problem, const Device& gpu) {
  const bool by_non_zeros = problem.pattern.kind == format::PatternKind::kUnstructured &&
                            forced_candidate(linear_csr::kOperation, gpu).has_value();
  return by_non_zeros ? *find_linear_operation(linear_csr::kOperation)
                      : linear_operation(problem.pattern.kind);
}

std::vector<Explanation> explain_linear(const LinearOperation& operation, const Problem& problem,
                                        const Device& device) {
  if (device.gpu) return operation.gpu_candidates().explain(problem, device);
  return walked_by_rows(problem.values) ? operation.explain(problem, device)
                                        : linear_coded::explain(problem, device);
}

Result<const GpuLinearKernel*> choose_gpu_kernel(const LinearOperation& operation,
                                                 const Problem& problem, const Device& device) {
  LACUNA_TRY(const Candidate* candidate, operation.gpu_candidates().choose(problem, device));
  return gpu_kernel(operation.name, candidate->name);
}

Result<const LinearOperation*> find_linear_operation(std::string_view name) {
  std::string known;
  for (const LinearOperation& operation : linear_operations()) {
    if (operation.name == name) return &operation;
    known += fmt::format("{}{}", known.empty() ? "" : ", ", operation.name);
  }
  return usage_error("unknown operation (got \"{}\"; need one of {}).", name, known);
}

Status check_forced() {
  const char* variable = std::getenv("LACUNA_FORCE");
  for (std::string_view rest = variable != nullptr ? variable : ""; !rest.empty();) {
    const std::string_view entry = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), entry.size() + 1));
    const std::string_view name = entry.substr(0, entry.find(':'));
    const std::string_view candidate = entry.substr(std::min(entry.size(), name.size() + 1));
    auto operation = find_linear_operation(name);
    if (!operation.ok())
      return usage_error("LACUNA_FORCE: {} An entry is OPERATION:CANDIDATE. Unset it or mend it.",
                         operation.error().message);
    bool found = false;
    std::string known;
    const auto know = [&](std::string_view one) {
      found = found || one == candidate;
      known += fmt::format("{}{}", known.empty() ? "" : ", ", one);
    };
    for (const Candidate& one : (*operation)->candidates()) know(one.name);
    for (const Candidate& one : linear_coded::candidates()) know(one.name);
    for (const Candidate& one : (*operation)->gpu_candidates()) know(one.name);
    if (!found)
      return usage_error(
          "LACUNA_FORCE: unknown candidate of {} (got \"{}\"; need {}). Unset it or mend it.", name,
          candidate, known);
  }
  return {};
}

}  // namespace lacuna::kernels
