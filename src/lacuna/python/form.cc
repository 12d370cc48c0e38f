#include "lacuna/python/form.h"

#include "lacuna/kernels/linear.h"
#include "lacuna/model/torch.h"

namespace lacuna::python {
namespace {

constexpr int64_t kVersion = 1;
constexpr size_t kFixed = 11;     // integers before `rest`
constexpr double kPerUnit = 1e6;  // the sparsity is held in millionths

}  // namespace

std::vector<int64_t> Form::ints() const {
  std::vector<int64_t> all = {kVersion,
                              static_cast<int64_t>(packed_for),
                              rows,
                              columns,
                              static_cast<int64_t>(model::scalar_type(dtype)),
                              static_cast<int64_t>(pattern.kind),
                              pattern.keep,
                              pattern.of,
                              pattern.block_rows,
                              pattern.block_columns,
                              static_cast<int64_t>(sparsity * kPerUnit)};
  all.insert(all.end(), rest.begin(), rest.end());
  return all;
}

Form Form::of(at::IntArrayRef ints) {
  TORCH_CHECK(ints.size() >= kFixed && ints[0] == kVersion,
              "form: not one that lacuna::pack of this version made. Pack the weight again.");
  Form form;
  form.packed_for = static_cast<PackedFor>(ints[1]);
  form.rows = ints[2];
  form.columns = ints[3];
  const auto type = static_cast<at::ScalarType>(ints[4]);
  form.pattern.kind = static_cast<format::PatternKind>(ints[5]);
  form.pattern.keep = static_cast<int>(ints[6]);
  form.pattern.of = static_cast<int>(ints[7]);
  form.pattern.block_rows = static_cast<int>(ints[8]);
  form.pattern.block_columns = static_cast<int>(ints[9]);
  form.sparsity = static_cast<double>(ints[10]) / kPerUnit;
  form.rest.assign(ints.begin() + kFixed, ints.end());
  const bool known = type == at::kFloat || type == at::kBFloat16 || type == at::kHalf;
  const auto pattern = format::Pattern::parse(form.pattern.text());
  TORCH_CHECK(form.rows > 0 && form.columns > 0 && form.rows < (int64_t{1} << 31) &&
                  form.columns < (int64_t{1} << 31) && known && pattern.ok() &&
                  *pattern == form.pattern && form.pattern.kind != format::PatternKind::kDense,
              "form: not one that lacuna::pack made.");
  form.dtype = model::dtype_of(type);
  return form;
}

kernels::Problem Form::problem(int64_t tokens, at::ScalarType activations) const {
  return {.operation = std::string(kernels::linear_operation(pattern.kind)->name),
          .values = kernels::values_of(dtype),
          .activations = model::dtype_of(activations),
          .outputs = rows,
          .inputs = columns,
          .tokens = tokens,
          .pattern = pattern,
          .sparsity = sparsity};
}

}  // namespace lacuna::python
