#include "lacuna/model/coded_weight.h"

#include <algorithm>
#include <limits>

#include "lacuna/format/element.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/model/few_tokens.h"
#include "lacuna/model/scratch.h"

namespace lacuna::model {
namespace linear_coded = kernels::linear_coded;

Result<WeightPtr> CodedWeight::make(const format::CompactMatrix& matrix, const Compute& compute) {
  const auto* operation = kernels::linear_operation(matrix.pattern.kind);
  const auto weights = static_cast<double>(std::max<int64_t>(1, matrix.rows * matrix.columns));
  kernels::Problem problem{
      .operation = std::string(operation->name),
      .values = matrix.quantization.code == format::Code::kInt8 ? kernels::Values::kInt8
                                                                : kernels::Values::kInt4G64,
      .activations = dtype_of(compute.dtype),
      .outputs = matrix.rows,
      .inputs = matrix.columns,
      .tokens = 1,
      .pattern = matrix.pattern,
      .sparsity = 1 - static_cast<double>(format::count_kept(matrix)) / weights};
  LACUNA_TRY(auto stream, linear_coded::Stream::pack(matrix, torch_executor()));
  auto weight = std::make_shared<CodedWeight>(std::move(stream), compute);
  for (; problem.tokens <= linear_coded::kMaxTokens; ++problem.tokens) {
    LACUNA_TRY(auto plan, linear_coded::plan(problem));
    weight->plans_.push_back(std::move(plan));
  }
  return WeightPtr(std::move(weight));
}

const linear_coded::CodedPlan* CodedWeight::plan_for(
    int64_t tokens, std::optional<linear_coded::CodedPlan>& many) const {
  if (tokens <= static_cast<int64_t>(plans_.size()))
    return &plans_[static_cast<size_t>(tokens - 1)];
  kernels::Problem problem = plans_.front().problem;
  problem.tokens = tokens;
  auto plan = linear_coded::plan(problem);
  return plan.ok() ? &many.emplace(std::move(plan).value()) : nullptr;
}

void CodedWeight::run(const format::RowProduct& product, const Executor& executor) const {
  std::optional<linear_coded::CodedPlan> many;
  const auto* plan = plan_for(product.tokens, many);
  if (plan == nullptr) return Weight::run(product, executor);
  run_planned(
      *plan, product,
      [&](const linear_coded::CodedPlan& of, const format::RowProduct& operands, void* workspace) {
        linear_coded::run(of, stream_, operands, workspace, executor);
      });
}

at::Tensor CodedWeight::multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
  std::optional<linear_coded::CodedPlan> many;
  if (x.numel() > 0 && !x.requires_grad() && x.scalar_type() == compute().dtype &&
      plan_for(x.numel() / columns(), many) != nullptr)
    return multiply_few_tokens(x, bias, rows(), [&](const format::RowProduct& product) {
      run(product, torch_executor());
    });
  return multiply_expanded(x, bias);
}

at::Tensor CodedWeight::multiply_expanded(const at::Tensor& x,
                                          const std::optional<at::Tensor>& bias) const {
  // What quantize_token() does, with the scale taken out of the product: the codes are exact in
  // every type.
  const at::Tensor values = x.to(at::kFloat);
  const at::Tensor scale = (values.abs().amax(-1, /*keepdim=*/true) / 127.0)
                               .clamp_min(std::numeric_limits<float>::min());
  const at::Tensor codes = (values * scale.reciprocal()).round().to(x.scalar_type());
  at::Tensor y = at::linear(codes, expanded()).to(at::kFloat) * scale;
  if (bias) y = y + *bias;
  return y.to(x.scalar_type());
}

at::Tensor CodedWeight::expanded() const {
  at::Tensor out = scratch(stream_.rows(), stream_.columns(), compute());
  void* const data = out.data_ptr();
  const DType dtype = dtype_of(compute().dtype);
  const int64_t columns = stream_.columns();
  torch_executor().parallel_for(stream_.tiles(), [&](int64_t tile) {
    const int64_t first = tile * linear_coded::kTileRows;
    const int64_t count = std::min(linear_coded::kTileRows, stream_.rows() - first);
    static thread_local std::vector<float> rows;
    rows.resize(static_cast<size_t>(linear_coded::kTileRows * columns));
    stream_.expand_tile(tile, rows.data());
    format::write_floats(data, dtype, first * columns, rows.data(), count * columns);
  });
  return out;
}

void CodedWeight::read_rows(const int32_t* ids, int64_t count, void* out,
                            const Executor& executor) const {
  const DType dtype = dtype_of(compute().dtype);
  executor.parallel_for(count, [&](int64_t i) {
    static thread_local std::vector<float> tile;
    tile.resize(static_cast<size_t>(linear_coded::kTileRows * columns()));
    stream_.expand_tile(ids[i] / linear_coded::kTileRows, tile.data());
    format::write_floats(out, dtype, i * columns(),
                         tile.data() + ids[i] % linear_coded::kTileRows * columns(), columns());
  });
}

}  // namespace lacuna::model
