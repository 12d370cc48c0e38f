#include "lacuna/model/weight.h"

#include <algorithm>
#include <cstring>

#include "lacuna/core/large_block.h"
#include "lacuna/format/stack.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/kernels/linear_stream/linear_stream.h"
#include "lacuna/model/coded_weight.h"
#include "lacuna/model/device_compact.h"
#include "lacuna/model/fastest_weight.h"
#include "lacuna/model/gpu_weight.h"
#include "lacuna/model/row_weight.h"
#include "lacuna/model/stored_weight.h"

namespace lacuna::model {
namespace {

using format::CompactMatrix;

/// A tensor and torch's product.
class TorchWeight final : public Weight {
 public:
  explicit TorchWeight(at::Tensor weight)
      : Weight(weight.size(0), weight.size(1), {weight.device(), weight.scalar_type()}),
        weight_(std::move(weight)) {}
  at::Tensor expanded() const override { return weight_; }
  size_t bytes() const override { return weight_.nbytes(); }
  bool is_compact() const override { return false; }

 private:
  at::Tensor weight_;
};

/// Some rows of another weight. It is there for what asks for one Linear of several that were
/// packed together; products of all of them go to the whole.
class WeightSlice final : public Weight {
 public:
  WeightSlice(WeightPtr whole, int64_t first, int64_t rows)
      : Weight(rows, whole->columns(), whole->compute()), whole_(std::move(whole)), first_(first) {}

  /// Through the whole: what it does to x (codes round it) is a part of the weight.
  at::Tensor multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const override {
    if (!whole_->is_compact()) return at::linear(x, expanded(), bias);
    std::optional<at::Tensor> all;
    if (bias) {
      all = at::zeros({whole_->rows()}, bias->options());
      all->narrow(0, first_, rows()).copy_(*bias);
    }
    return whole_->multiply(x, all).narrow(-1, first_, rows()).contiguous();
  }
  at::Tensor expanded() const override { return whole_->expanded().narrow(0, first_, rows()); }
  void read_rows(const int32_t* ids, int64_t count, void* out,
                 const Executor& executor) const override {
    std::vector<int32_t> there(ids, ids + count);
    for (int32_t& id : there) id += static_cast<int32_t>(first_);
    whole_->read_rows(there.data(), count, out, executor);
  }
  /// Its share; the shares of all slices make up the whole.
  size_t bytes() const override {
    const size_t all = whole_->bytes();
    const auto total = static_cast<size_t>(whole_->rows());
    const auto before = [&](int64_t row) { return all * static_cast<size_t>(row) / total; };
    return before(first_ + rows()) - before(first_);
  }
  bool is_compact() const override { return whole_->is_compact(); }
  bool is_coded() const override { return whole_->is_coded(); }
  bool recordable() const override { return whole_->recordable(); }
  std::optional<kernels::Problem> decode_problem() const override {
    return whole_->decode_problem();
  }

 private:
  WeightPtr whole_;
  int64_t first_;
};

/// Values that the type of the computation doesn't hold exactly are rounded to it once, as those of
/// a dense weight are; bf16 and f16 values stay as they are for float32, which holds them all.
/// Codes stay codes: what they stand for is rounded once, to the type of the computation.
CompactMatrix rounded_to(at::ScalarType dtype, CompactMatrix matrix) {
  if (!matrix.quantization.none()) {
    matrix.values_dtype = dtype_of(dtype);
    return matrix;
  }
  const at::ScalarType stored = scalar_type(matrix.values_dtype);
  if (stored == dtype || dtype == at::kFloat) return matrix;
  const auto count = static_cast<int64_t>(matrix.values.size() / size_bytes(matrix.values_dtype));
  const at::Tensor values = wrap({matrix.values_dtype, {count}, matrix.values});
  matrix.values = unwrap(values.to(dtype)).bytes;
  matrix.values_dtype = dtype_of(dtype);
  return matrix;
}

/// Share of weights without a value. Codes have 8 bits.
double sparsity_of(const CompactMatrix& matrix) {
  const auto elements = static_cast<double>(matrix.rows * matrix.columns);
  const size_t width = matrix.quantization.none() ? size_bytes(matrix.values_dtype) : 1;
  const auto kept = static_cast<double>(matrix.values.size() / width);
  return elements > 0 ? std::max(0.0, 1.0 - kept / elements) : 0.0;
}

/// @param matrix  without codes
kernels::Problem problem_of(const CompactMatrix& matrix, const Compute& compute) {
  return decode_problem_of(matrix.pattern, matrix.values_dtype, matrix.rows, matrix.columns,
                           sparsity_of(matrix), compute);
}

/// Most tokens that a kernel for few of them takes on a GPU.
constexpr int64_t kFewOnGpu = 64;

/// A sparse weight on a GPU before it is packed.
struct Unpacked {
  kernels::Problem problem;
  std::function<at::Tensor()> dense;  ///< or codes as numbers
  at::Tensor scales;                  ///< of codes
};

Result<const kernels::GpuLinearKernel*> kernel_for(const kernels::Problem& problem) {
  LACUNA_TRY(const auto* operation, kernels::find_linear_operation(problem.operation));
  return kernels::choose_gpu_kernel(*operation, problem, kernels::Device::this_gpu());
}

/// Packed for a kernel that takes as many tokens as are decoded at once, or for the largest power
/// of two below that has one; null where none has.
Result<WeightPtr> packed_once(Unpacked w, const Compute& compute) {
  w.problem.tokens = std::clamp<int64_t>(compute.batch, 1, kFewOnGpu);
  while (true) {
    LACUNA_TRY(auto packed, GpuWeight::make(w.problem, compute, w.dense, w.scales));
    if (packed != nullptr || w.problem.tokens == 1) return packed;
    w.problem.tokens /= 2;
  }
}

/// Stands for many.
constexpr int64_t kManyOnGpu = 128;

/// Adds W packed for every kernel that some number of tokens chooses.
Status add_forms(Unpacked w, const Compute& compute, std::vector<FastestWeight::Form>& forms) {
  std::vector<const kernels::GpuLinearKernel*> had = {nullptr};
  for (int64_t tokens = 1; tokens <= kManyOnGpu; tokens *= 2) {
    w.problem.tokens = tokens;
    LACUNA_TRY(const auto* kernel, kernel_for(w.problem));
    if (std::find(had.begin(), had.end(), kernel) != had.end()) continue;
    had.push_back(kernel);
    FastestWeight::Form form = {fmt::format("{}:{}", kernel->operation, kernel->name), nullptr,
                                tokens > kFewOnGpu ? kFewOnGpu + 1 : 1, w.scales.defined()};
    try {
      LACUNA_TRY(form.weight, GpuWeight::make(w.problem, compute, w.dense, w.scales));
    } catch (const c10::Error& error) {
      if (form.from == 1) throw;
      // A library of others may refuse a card; the dense form takes many tokens too.
      TORCH_WARN(form.name, " is left out: ", error.what_without_backtrace());
      continue;
    }
    forms.push_back(std::move(form));
  }
  return {};
}

/// In every form; codes also as dense codes.
Result<WeightPtr> packed_for_all(const Unpacked& w, const Compute& compute) {
  std::vector<FastestWeight::Form> forms;
  LACUNA_CHECK(add_forms(w, compute, forms));
  at::Tensor dense = w.dense();
  if (w.scales.defined()) {
    Unpacked codes = w;
    codes.problem.pattern = {};
    codes.problem.sparsity = 0;
    codes.problem.operation = kernels::linear_operation(format::PatternKind::kDense)->name;
    LACUNA_CHECK(add_forms(codes, compute, forms));
    const at::Tensor scales = w.scales.to(at::kFloat).unsqueeze(2);  // [rows, groups, 1]
    dense = (dense.to(at::kFloat).view({dense.size(0), scales.size(1), -1}) * scales)
                .to(compute.dtype)
                .view_as(dense);
  }
  WeightPtr last = dense_weight(dense.clone());
  if (forms.empty()) return last;
  forms.push_back({"dense", std::move(last)});
  return WeightPtr(std::make_shared<FastestWeight>(std::move(forms)));
}

/// Whether LACUNA_FORCE leaves no choice.
bool is_forced(const kernels::Problem& problem) {
  return kernels::forced_candidate(problem.operation, kernels::Device::this_gpu()).has_value();
}

/// Codes are packed for a kernel, where there is one; all others are expanded once.
Result<WeightPtr> codes_on_gpu(const CompactMatrix& matrix, const Compute& compute) {
  const auto values = kernels::values_of(matrix.quantization);
  const int64_t group = matrix.quantization.group;
  if (values && (group == 0 || matrix.columns % group == 0)) {
    auto problem = decode_problem_of(matrix.pattern, matrix.values_dtype, matrix.rows,
                                     matrix.columns, sparsity_of(matrix), compute);
    problem.values = *values;
    problem.operation = kernels::linear_operation(matrix.pattern.kind)->name;
    const int64_t groups = matrix.quantization.groups(matrix.columns);
    const at::Tensor scales =
        wrap({DType::kBF16, {matrix.rows, groups}, matrix.scales}).to(compute.device);
    LACUNA_TRY(auto packed,
               packed_weight(
                   problem, compute, [&] { return codes_as_numbers(matrix, compute); }, scales));
    if (packed != nullptr) return packed;
  }
  return dense_weight(wrap(format::expand(matrix, torch_executor())).to(compute.device));
}

/// Whether kernels of the CPU walk such a weight as it is stored; others pack it from there.
bool walked_as_stored(const CompactMatrix& matrix, const Compute& compute) {
  return matrix.quantization.none() && problem_of(matrix, compute).operation ==
                                           kernels::linear_operation(matrix.pattern.kind)->name;
}

Result<WeightPtr> on_gpu(const CompactMatrix& matrix, const Compute& compute) {
  if (!matrix.quantization.none()) return codes_on_gpu(matrix, compute);
  auto stored = std::make_shared<const DeviceCompact>(matrix, compute);
  LACUNA_TRY(auto packed, packed_weight(problem_of(matrix, compute), compute,
                                        [&] { return stored->expanded(); }));
  return packed != nullptr ? packed : WeightPtr(std::move(stored));
}

/// fp8 codes that kernels multiply as they lie: those of blocks aren't.
bool walked_as_fp8(const CompactMatrix& matrix) {
  return matrix.quantization.code == format::Code::kFP8 &&
         matrix.pattern.kind != format::PatternKind::kBlock;
}

Result<WeightPtr> codes_on_cpu(CompactMatrix matrix, const Compute& compute) {
  if (walked_as_fp8(matrix)) {
    kernels::Problem problem{.values = kernels::Values::kFP8,
                             .activations = dtype_of(compute.dtype),
                             .outputs = matrix.rows,
                             .inputs = matrix.columns,
                             .tokens = 1,
                             .pattern = matrix.pattern,
                             .sparsity = sparsity_of(matrix)};
    problem.operation = kernels::linear_operation_on_cpu(problem)->name;
    return RowWeight::compact(std::move(matrix), problem, compute);
  }
  if (compute.int8_activations) {
    auto packed = CodedWeight::make(matrix, compute);
    // Another error comes from LACUNA_FORCE.
    if (packed.ok() || packed.error().code != ::lacuna::Code::kNotPossible) return packed;
  }
  return WeightPtr(std::make_shared<StoredWeight>(std::move(matrix), compute));
}

}  // namespace

Result<WeightPtr> packed_weight(const kernels::Problem& problem, const Compute& compute,
                                const std::function<at::Tensor()>& dense,
                                const at::Tensor& scales) {
  const Unpacked unpacked{problem, dense, scales};
  if (compute.fastest && !is_forced(problem)) return packed_for_all(unpacked, compute);
  return packed_once(unpacked, compute);
}

at::Tensor codes_as_numbers(const CompactMatrix& matrix, const Compute& compute) {
  if (matrix.quantization.code != format::Code::kInt4)
    return DeviceCompact(matrix, compute).expanded();
  // Two lie in a byte: taken apart on the way, as weights whose scales are 1.
  constexpr uint16_t kOne = 0x3f80;  // bf16
  CompactMatrix numbers = matrix;
  numbers.scales = Bytes::take(std::vector<uint16_t>(matrix.scales.size() / sizeof(kOne), kOne));
  return wrap(format::expand(numbers, torch_executor())).to(compute.device, compute.dtype);
}

kernels::Problem decode_problem_of(const format::Pattern& pattern, DType values, int64_t rows,
                                   int64_t columns, double sparsity, const Compute& compute) {
  kernels::Problem problem{.values = kernels::values_of(values),
                           .activations = dtype_of(compute.dtype),
                           .outputs = rows,
                           .inputs = columns,
                           .tokens = 1,
                           .pattern = pattern,
                           .sparsity = sparsity};
  const auto* operation = compute.device.is_cuda() ? kernels::linear_operation_on_gpu(problem)
                                                   : kernels::linear_operation_on_cpu(problem);
  problem.operation = operation->name;
  return problem;
}

at::Tensor Weight::multiply(const at::Tensor& x, const std::optional<at::Tensor>& bias) const {
  return at::linear(x, expanded(), bias);
}

void Weight::run(const format::RowProduct& product, const Executor&) const {
  const at::Tensor x = device_view(product.x, {product.tokens, columns()}, compute());
  at::Tensor y = device_view(product.y, {product.tokens, rows()}, compute());
  std::optional<at::Tensor> bias;
  if (product.bias != nullptr) bias = device_view(product.bias, {rows()}, compute());
  if (compute().device.is_cpu()) {
    y.copy_(multiply(x, bias));
  } else if (bias) {
    at::addmm_out(y, *bias, x, expanded().t());
  } else {
    at::mm_out(y, x, expanded().t());
  }
}

void Weight::read_rows(const int32_t* ids, int64_t count, void* out, const Executor&) const {
  const at::Tensor all = expanded();
  TORCH_CHECK(all.is_cpu(), "read_rows: the weight is on a GPU");
  const auto row_bytes = static_cast<size_t>(columns()) * all.element_size();
  const auto* from = static_cast<const std::byte*>(all.const_data_ptr());
  auto* to = static_cast<std::byte*>(out);
  for (int64_t i = 0; i < count; ++i, to += row_bytes)
    std::memcpy(to, from + static_cast<size_t>(ids[i]) * row_bytes, row_bytes);
}

WeightPtr dense_weight(at::Tensor weight) {
  const bool plain = weight.is_contiguous() && !weight.requires_grad() && weight.numel() > 0;
  if (plain && weight.is_cuda()) {
    const Compute compute{weight.device(), weight.scalar_type()};
    auto made = GpuWeight::make(decode_problem_of({}, dtype_of(compute.dtype), weight.size(0),
                                                  weight.size(1), 0.0, compute),
                                compute, [&] { return weight; });
    if (made.ok() && made.value() != nullptr) return std::move(made).value();
  } else if (plain && RowWeight::takes(weight)) {
    auto made = RowWeight::dense(weight);
    if (made.ok()) return std::move(made).value();
  }
  return std::make_shared<TorchWeight>(std::move(weight));
}

WeightPtr plain_weight(at::Tensor weight) {
  return std::make_shared<TorchWeight>(std::move(weight));
}

Result<WeightPtr> compact_weight(CompactMatrix weight, const Compute& compute) {
  CompactMatrix matrix = rounded_to(compute.dtype, std::move(weight));
  if (compute.device.is_cuda()) return on_gpu(matrix, compute);
  if (!matrix.quantization.none()) return codes_on_cpu(std::move(matrix), compute);
  const auto problem = problem_of(matrix, compute);
  return RowWeight::compact(std::move(matrix), problem, compute);
}

WeightPtr slice_of(WeightPtr whole, int64_t first, int64_t rows) {
  return std::make_shared<WeightSlice>(std::move(whole), first, rows);
}

namespace {

/// Parts that are packed as one stream, without a copy of them one below the other.
std::optional<WeightPtr> stream_of(const std::vector<CompactMatrix>& parts,
                                   const Compute& compute) {
  int64_t rows = 0;
  double zeros = 0;
  for (const CompactMatrix& part : parts) {
    if (!part.quantization.none() || scalar_type(part.values_dtype) != compute.dtype)
      return std::nullopt;
    rows += part.rows;
    zeros += sparsity_of(part) * static_cast<double>(part.rows);
  }
  const CompactMatrix& front = parts.front();
  const auto problem =
      decode_problem_of(front.pattern, front.values_dtype, rows, front.columns,
                        rows > 0 ? zeros / static_cast<double>(rows) : 0.0, compute);
  if (problem.operation != kernels::linear_stream::kOperation) return std::nullopt;
  auto packed = RowWeight::stream(parts, problem, compute);
  if (!packed.ok()) return std::nullopt;  // stacked, it may do
  return std::move(packed).value();
}

}  // namespace

std::optional<StoredMatrix> stacked(const std::vector<StoredMatrix>& parts,
                                    const Compute& compute) {
  std::vector<at::Tensor> dense;
  std::vector<CompactMatrix> compact;
  for (const StoredMatrix& part : parts) {
    if (const auto* matrix = std::get_if<CompactMatrix>(&part))
      compact.push_back(*matrix);
    else
      dense.push_back(std::get<at::Tensor>(part).contiguous());
  }
  const bool walked =
      compute.device.is_cpu() && (compact.empty() || walked_as_fp8(compact.front()) ||
                                  walked_as_stored(compact.front(), compute));
  if (parts.size() == 1 && !walked) return parts.front();
  if (dense.empty()) {
    if (auto packed = stream_of(compact, compute)) return std::move(*packed);
    auto all = format::stack_rows(compact, torch_executor());
    if (!all) return std::nullopt;
    return std::move(*all);
  }
  int64_t rows = 0;
  for (const at::Tensor& part : dense) {
    if (!compact.empty() || part.size(1) != dense.front().size(1)) return std::nullopt;
    rows += part.size(0);
  }
  if (!compute.device.is_cpu()) return at::cat(dense);
  std::vector<Bytes> pieces;
  for (const at::Tensor& part : dense)
    pieces.push_back(Bytes(std::make_shared<at::Tensor>(part),
                           static_cast<const std::byte*>(part.const_data_ptr()), part.nbytes()));
  return wrap({dtype_of(dense.front().scalar_type()),
               {rows, dense.front().size(1)},
               in_large_pages(pieces, torch_executor())});
}

Result<WeightPtr> weight_of(StoredMatrix stored, const Compute& compute) {
  if (auto* packed = std::get_if<WeightPtr>(&stored)) return std::move(*packed);
  if (auto* matrix = std::get_if<CompactMatrix>(&stored))
    return compact_weight(std::move(*matrix), compute);
  return dense_weight(std::move(std::get<at::Tensor>(stored)));
}

}  // namespace lacuna::model
