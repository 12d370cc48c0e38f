#include "lacuna/prune/method.h"

#include <cmath>
#include <numeric>

#include "lacuna/prune/builtin.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/selection.h"

namespace lacuna::prune {
namespace {

struct NamedGroup {
  Group group;
  std::string_view name;
};

constexpr NamedGroup kGroups[] = {
    {Group::kRow, "row"}, {Group::kLayer, "layer"}, {Group::kBlock128, "block128"}};

/// @errors kBadInput naming row and column of the first NaN or infinity
Status check_finite(const at::Tensor& values, std::string_view what, std::string_view advice) {
  const at::Tensor bad = values.isfinite().logical_not_();
  if (!bad.any().item<bool>()) return {};
  const int64_t first = bad.flatten().to(at::kByte).argmax().item<int64_t>();
  const double value = values.flatten()[first].item<double>();
  if (values.dim() == 1)
    return bad_input("{}: must be finite (got {} in column {}). {}", what, value, first, advice);
  return bad_input("{}: must be finite (got {} in row {}, column {}). {}", what, value,
                   first / values.size(1), first % values.size(1), advice);
}

/// |X A^T|_F^2 = sum of the elements of (A G) * A, in strips of rows.
double energy(const at::Tensor& a, const at::Tensor& gram, const Executor& executor) {
  const int64_t rows_at_once = a.is_cpu() ? 128 : 4096;
  std::vector<double> sums(static_cast<size_t>((a.size(0) + rows_at_once - 1) / rows_at_once));
  parallel_chunks(a.is_cpu() ? executor : Executor::serial(), static_cast<int64_t>(sums.size()),
                  [&](int64_t i) {
                    const at::Tensor strip = a.narrow(
                        0, i * rows_at_once, std::min(rows_at_once, a.size(0) - i * rows_at_once));
                    sums[static_cast<size_t>(i)] =
                        at::mm(strip, gram).mul_(strip).sum(at::kDouble).item<double>();
                  });
  return std::accumulate(sums.begin(), sums.end(), 0.0);
}

}  // namespace

std::string_view group_name(Group group) {
  for (const auto& known : kGroups)
    if (known.group == group) return known.name;
  return "?";
}

Result<Group> parse_group(std::string_view name) {
  for (const auto& known : kGroups)
    if (known.name == name) return known.group;
  return usage_error("--group: unknown group (got {}; need row, layer or block128).", name);
}

const std::vector<const Method*>& methods() {
  static const std::vector<const Method*> all = {&sparsegpt_method(), &wanda_method(),
                                                 &magnitude_method()};
  return all;
}

Result<const Method*> find_method(std::string_view name) {
  std::string known;
  for (const Method* method : methods()) {
    if (method->name() == name) return method;
    known += (known.empty() ? "" : ", ") + std::string(method->name());
  }
  return usage_error("--method: unknown method (got {}; need one of {}).", name, known);
}

Status Method::prepare(InputStatistics&, const Request&) const { return {}; }

Status check_request(const Method& method, const at::Tensor& weight,
                     const InputStatistics& statistics, const Request& request) {
  if (weight.dim() != 2 || weight.scalar_type() != at::kFloat)
    return bad_input("weight: must be a float32 matrix (got {} dimensions). Convert it first.",
                     weight.dim());
  if (!(request.sparsity >= 0 && request.sparsity <= 1))
    return usage_error("--sparsity: must lie between 0 and 1 (got {}).", request.sparsity);
  if (request.pattern.kind == format::PatternKind::kDense)
    return usage_error(
        "--pattern: dense prunes nothing (need unstructured, KEEP:OF or block:RxC).");
  const format::Pattern& pattern = request.pattern;
  const bool keep_of = pattern.kind == format::PatternKind::kKeepOf;
  if ((keep_of && !(0 < pattern.keep && pattern.keep < pattern.of && pattern.of <= 64)) ||
      (pattern.kind == format::PatternKind::kBlock &&
       (pattern.block_rows < 1 || pattern.block_columns < 1)))
    return usage_error("--pattern: out of range (got {}; need 0 < KEEP < OF <= 64, or block:RxC).",
                       pattern.text());
  if (keep_of && request.group)
    return usage_error(
        "--group: {} can't be combined with {}, whose groups are fixed. Leave it out.",
        group_name(*request.group), request.pattern.text());
  LACUNA_CHECK(check_finite(weight, "weight", "Repair or download the model again."));
  if (!method.needs_inputs()) return {};
  const at::Tensor& inputs = statistics.square_sums;
  if (!inputs.defined() || (method.needs_gram() && !statistics.gram.defined()))
    return usage_error("{}: needs calibration inputs (got none).", method.name());
  if (inputs.sizes() != weight.sizes().slice(1))
    return bad_input("inputs: {} columns of statistics for a weight of {}.", inputs.numel(),
                     weight.size(1));
  constexpr std::string_view kAdvice =
      "The calibration passed NaN or infinity through the model: try --dtype float32.";
  return check_finite(inputs, "inputs: sum of squares", kAdvice);
}

Pruned keep_by_scores(const Method& method, const at::Tensor& weight, const at::Tensor& scores,
                      const Request& request) {
  Pruned pruned;
  pruned.mask = select(scores, request.pattern, request.sparsity,
                       request.group.value_or(method.default_group()));
  pruned.weight = weight.masked_fill(pruned.mask.logical_not(), 0);
  return pruned;
}

double relative_error(const at::Tensor& weight, const at::Tensor& pruned, const at::Tensor& gram,
                      const Executor& executor) {
  const double lost = energy(weight - pruned, gram, executor);
  if (lost <= 0) return 0;  // rounding can leave a tiny negative number
  return std::sqrt(lost / energy(weight, gram, executor));
}

}  // namespace lacuna::prune
