#include "lacuna/kernels/linear.h"

#include <algorithm>
#include <cstdlib>
#include <string>

#include "lacuna/kernels/linear_bitmap/linear_bitmap.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"

namespace lacuna::kernels {

const std::array<LinearOperation, 3>& linear_operations() {
  using format::PatternKind;
  static const std::array<LinearOperation, 3> all = {{
      {linear_dense::kOperation, PatternKind::kDense, linear_dense::plan, linear_dense::explain},
      {linear_bitmap::kOperation, PatternKind::kUnstructured, linear_bitmap::plan,
       linear_bitmap::explain},
      {linear_nm::kOperation, PatternKind::kKeepOf, linear_nm::plan, linear_nm::explain},
  }};
  return all;
}

const LinearOperation* linear_operation(format::PatternKind weight) {
  for (const LinearOperation& operation : linear_operations())
    if (operation.weight == weight) return &operation;
  return nullptr;
}

Status check_forced() {
  const char* variable = std::getenv("LACUNA_FORCE");
  for (std::string_view rest = variable != nullptr ? variable : ""; !rest.empty();) {
    const std::string_view entry = rest.substr(0, rest.find(','));
    rest.remove_prefix(std::min(rest.size(), entry.size() + 1));
    const std::string_view name = entry.substr(0, entry.find(':'));
    const std::string_view candidate = entry.substr(std::min(entry.size(), name.size() + 1));
    const LinearOperation* found = nullptr;
    std::string known;
    for (const LinearOperation& operation : linear_operations()) {
      known += fmt::format("{}{}", known.empty() ? "" : ", ", operation.name);
      if (operation.name == name) found = &operation;
    }
    if (found == nullptr)
      return usage_error(
          "LACUNA_FORCE: unknown operation (got \"{}\"; need OPERATION:CANDIDATE of {}). Unset it "
          "or mend it.",
          entry, known);
    known.clear();
    for (const Explanation& line :
         found->explain({.operation = std::string(name)}, Device::this_cpu())) {
      if (line.candidate == candidate) found = nullptr;
      known += fmt::format("{}{}", known.empty() ? "" : ", ", line.candidate);
    }
    if (found != nullptr)
      return usage_error(
          "LACUNA_FORCE: unknown candidate of {} (got \"{}\"; need {}). Unset it or mend it.", name,
          candidate, known);
  }
  return {};
}

}  // namespace lacuna::kernels
