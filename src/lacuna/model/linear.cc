#include "lacuna/model/linear.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "lacuna/format/rows.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/kernels/linear_csr/linear_csr.h"
#include "lacuna/model/coded_weight.h"
#include "lacuna/model/device_compact.h"
#include "lacuna/model/few_tokens.h"
#include "lacuna/model/gpu_weight.h"
#include "lacuna/model/scratch.h"

namespace lacuna::model {
namespace {

using format::CompactMatrix;
using format::PatternKind;

LinearClock* linear_clock = nullptr;

/// Expands on the CPU in parallel tiles of rows, converting when the values have another type.
void expand_into(const CompactMatrix& matrix, at::Tensor& out) {
  const at::ScalarType stored = scalar_type(matrix.values_dtype);
  const bool converts = stored != out.scalar_type();
  const int64_t row_bytes = matrix.columns * static_cast<int64_t>(out.element_size());
  auto* data = static_cast<std::byte*>(out.data_ptr());
  const int64_t tiles = (matrix.rows + format::kRowGroup - 1) / format::kRowGroup;
  torch_executor().parallel_for(tiles, [&](int64_t tile) {
    const int64_t first = tile * format::kRowGroup;
    const int64_t last = std::min(first + format::kRowGroup, matrix.rows);
    std::byte* rows = data + first * row_bytes;
    if (!converts) return format::expand_rows(matrix, first, last, rows);
    at::Tensor as_stored = at::empty({last - first, matrix.columns}, stored);
    format::expand_rows(matrix, first, last, as_stored.data_ptr());
    at::from_blob(rows, {last - first, matrix.columns}, out.options()).copy_(as_stored);
  });
}

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

/// The same of slices, whose rows lie scattered.
void expand_into(const format::RowsView& slices, at::Tensor& out) {
  const DType dtype = dtype_of(out.scalar_type());
  void* const data = out.data_ptr();
  torch_executor().parallel_for(kernels::linear_csr::slice_count(slices.rows), [&](int64_t slice) {
    kernels::linear_csr::expand_slice(slices, slice, dtype, data);
  });
}

/// One token through a weight, as candidates are asked about it.
kernels::Problem decode_problem_of(const format::Pattern& pattern, DType values, int64_t rows,
                                   int64_t columns, double sparsity, const Compute& compute) {
  kernels::Problem problem{.values = kernels::values_of(values),
                           .activations = dtype_of(compute.dtype),
                           .outputs = rows,
                           .inputs = columns,
                           .tokens = 1,
                           .pattern = pattern,
                           .sparsity = sparsity};
  const auto* operation = compute.device.is_cuda() ? kernels::linear_operation(pattern.kind)
                                                   : kernels::linear_operation_on_cpu(problem);
  problem.operation = operation->name;
  return problem;
}

/// Share of weights without a value.
double sparsity_of(const CompactMatrix& matrix) {
  const auto elements = static_cast<double>(matrix.rows * matrix.columns);
  const auto kept = static_cast<double>(matrix.values.size() / size_bytes(matrix.values_dtype));
  return elements > 0 ? std::max(0.0, 1.0 - kept / elements) : 0.0;
}

}  // namespace

/// The kernels that take tokens to the rows of a weight in host memory: up to format::kMaxTokens
/// planned once, more when they come.
class Linear::RowKernels {
 public:
  /// @param rows  in the form that the problem's operation takes
  static Result<std::shared_ptr<const RowKernels>> plan(const format::RowsView& rows,
                                                        kernels::Problem problem) {
    LACUNA_TRY(const auto* operation, kernels::find_linear_operation(problem.operation));
    auto kernels = std::make_shared<RowKernels>();
    kernels->operation_ = operation;
    kernels->rows_ = rows;
    for (; problem.tokens <= format::kMaxTokens; ++problem.tokens) {
      LACUNA_TRY(auto plan, operation->plan(problem, kernels::Device::this_cpu()));
      kernels->plans_.push_back(std::move(plan));
    }
    return std::shared_ptr<const RowKernels>(std::move(kernels));
  }

  /// What takes so many tokens of this type, or null: no kernel does without a dense copy.
  /// @param many  holds the plan for more than kMaxTokens
  const kernels::LinearPlan* plan_for(DType dtype, int64_t tokens,
                                      std::optional<kernels::LinearPlan>& many) const {
    if (tokens <= 0 || dtype != decode_problem().activations) return nullptr;
    if (tokens <= format::kMaxTokens) return &plans_[static_cast<size_t>(tokens - 1)];
    kernels::Problem problem = decode_problem();
    problem.tokens = tokens;
    auto plan = operation_->plan(problem, kernels::Device::this_cpu());
    if (!plan.ok()) return nullptr;
    return &many.emplace(std::move(plan).value());
  }

  void run(const kernels::LinearPlan& plan, const format::RowProduct& product,
           const Executor& executor) const {
    run_planned(plan, product,
                [&](const kernels::LinearPlan& of, const format::RowProduct& operands,
                    void* workspace) { of.candidate->run(rows_, operands, workspace, executor); });
  }

  const kernels::Problem& decode_problem() const { return plans_.front().problem; }

  int64_t rows() const { return rows_.rows; }

 private:
  const kernels::LinearOperation* operation_ = nullptr;
  format::RowsView rows_;
  std::vector<kernels::LinearPlan> plans_;  // for 1, 2, ... tokens
};

/// What a compact weight is held as: by rows where kernels multiply it as it is (CPU, no codes), as
/// slices where it is very sparse (CPU, unstructured), as a stream of codes (CPU, int8 and int4),
/// as a matrix (CPU, other codes); on a GPU packed for a kernel, or as it is stored where there is
/// none.
struct Linear::Compact {
  CompactMatrix matrix;  // its sizes alone where it is held on a GPU, as codes or as slices
  std::optional<CodedWeight> coded;
  std::optional<format::CompactRows> rows;
  std::optional<kernels::linear_csr::Slices> slices;
  std::optional<GpuWeight> packed;
  std::optional<DeviceCompact> device;
  Compute compute;

  /// Dense, in the shared scratch: good until the next expansion on this thread.
  at::Tensor expanded() const {
    if (packed) return packed->expanded();
    if (device) return device->expand(compute);
    if (coded) return coded->expanded();
    at::Tensor out = scratch(matrix.rows, matrix.columns, compute);
    slices ? expand_into(slices->view(), out) : expand_into(matrix, out);
    return out;
  }

  size_t bytes() const {
    if (packed) return packed->bytes();
    if (device) return device->bytes();
    if (coded) return coded->bytes();
    if (slices) return slices->size_bytes();
    return rows ? rows->size_bytes() : matrix.size_bytes();
  }
};

Linear Linear::dense(at::Tensor weight, std::optional<at::Tensor> bias) {
  Linear linear;
  linear.bias_ = std::move(bias);
  linear.set_weight(std::move(weight));
  return linear;
}

Result<Linear> Linear::compact(CompactMatrix weight, std::optional<at::Tensor> bias,
                               const Compute& compute) {
  auto compact = std::make_shared<Compact>();
  compact->compute = compute;
  Linear linear;
  compact->matrix = rounded_to(compute.dtype, std::move(weight));
  const CompactMatrix& matrix = compact->matrix;
  const bool coded = !matrix.quantization.none();
  if (compute.device.is_cuda() && coded)
    return dense(wrap(format::expand(matrix)).to(compute.device), std::move(bias));
  const auto keep_sizes_alone = [&] {
    compact->matrix = {.pattern = matrix.pattern,
                       .rows = matrix.rows,
                       .columns = matrix.columns,
                       .values_dtype = matrix.values_dtype,
                       .quantization = matrix.quantization};
  };
  if (compute.device.is_cuda()) {
    DeviceCompact stored(matrix, compute);
    const auto problem = decode_problem_of(matrix.pattern, matrix.values_dtype, matrix.rows,
                                           matrix.columns, sparsity_of(matrix), compute);
    LACUNA_TRY(compact->packed,
               GpuWeight::make(problem, compute, [&] { return stored.expand(compute); }));
    if (!compact->packed) compact->device = std::move(stored);
    keep_sizes_alone();
  } else if (coded && compute.int8_activations) {
    auto packed = CodedWeight::make(matrix, compute);
    if (packed.ok()) {
      compact->coded = std::move(packed).value();
      keep_sizes_alone();
    } else if (packed.error().code != ::lacuna::Code::kNotPossible) {
      return packed.error();  // LACUNA_FORCE
    }
  } else if (!coded) {
    const auto problem = decode_problem_of(matrix.pattern, matrix.values_dtype, matrix.rows,
                                           matrix.columns, sparsity_of(matrix), compute);
    if (problem.operation == kernels::linear_csr::kOperation) {
      LACUNA_TRY(compact->slices, kernels::linear_csr::Slices::pack(matrix, torch_executor()));
      keep_sizes_alone();
      LACUNA_TRY(linear.row_kernels_, RowKernels::plan(compact->slices->view(), problem));
    } else {
      LACUNA_TRY(compact->rows, format::CompactRows::make(matrix));
      LACUNA_TRY(linear.row_kernels_, RowKernels::plan(compact->rows->view(), problem));
    }
  }
  linear.compact_ = std::move(compact);
  linear.bias_ = std::move(bias);
  return linear;
}

Result<std::optional<Linear>> Linear::pack_together(const std::vector<Stored>& parts,
                                                    const Compute& compute) {
  std::vector<CompactMatrix> matrices;
  std::vector<at::Tensor> biases;
  int64_t rows = 0;
  double zeros = 0;
  for (const Stored& part : parts) {
    const auto* stored = std::get_if<CompactMatrix>(&part.weight);
    if (stored == nullptr || !stored->quantization.none() ||
        stored->pattern.kind == PatternKind::kBlock)
      return std::optional<Linear>();
    matrices.push_back(rounded_to(compute.dtype, *stored));
    const CompactMatrix& matrix = matrices.back();
    const CompactMatrix& first = matrices.front();
    if (matrix.pattern != first.pattern || matrix.columns != first.columns ||
        matrix.values_dtype != first.values_dtype)
      return std::optional<Linear>();
    rows += matrix.rows;
    zeros += sparsity_of(matrix) * static_cast<double>(matrix.rows);
    if (part.bias) biases.push_back(*part.bias);
  }
  const CompactMatrix& first = matrices.front();
  auto compact = std::make_shared<Compact>();
  compact->compute = compute;
  compact->matrix = {.pattern = first.pattern,
                     .rows = rows,
                     .columns = first.columns,
                     .values_dtype = first.values_dtype};
  const auto problem =
      decode_problem_of(first.pattern, first.values_dtype, rows, first.columns,
                        rows > 0 ? zeros / static_cast<double>(rows) : 0.0, compute);
  LACUNA_TRY(compact->packed, GpuWeight::make(problem, compute, [&] {
               std::vector<at::Tensor> dense;
               for (const CompactMatrix& matrix : matrices)
                 dense.push_back(DeviceCompact(matrix, compute).expand(compute).clone());
               return at::cat(dense);
             }));
  if (!compact->packed) return std::optional<Linear>();
  Linear whole;
  whole.compact_ = std::move(compact);
  if (!biases.empty()) whole.bias_ = at::cat(biases);
  return std::optional<Linear>(std::move(whole));
}

void Linear::slice(const std::shared_ptr<const Linear>& whole, std::vector<Linear>& parts) {
  int64_t first = 0;
  for (Linear& part : parts) {
    if (!whole->compact_) part.set_weight(whole->dense_.narrow(0, first, part.rows_));
    part.whole_ = whole;
    part.first_ = first;
    first += part.rows_;
  }
}

Result<std::vector<Linear>> Linear::together(std::vector<Stored> parts, const Compute& compute) {
  std::vector<Linear> linears(parts.size());
  const auto with_bias = std::count_if(parts.begin(), parts.end(),
                                       [](const Stored& part) { return part.bias.has_value(); });
  const bool joins = compute.device.is_cuda() && parts.size() > 1 &&
                     (with_bias == 0 || with_bias == static_cast<int64_t>(parts.size()));
  if (joins) {
    LACUNA_TRY(auto packed, pack_together(parts, compute));
    if (packed) {
      for (size_t i = 0; i < parts.size(); ++i) {
        linears[i].rows_ = std::get<CompactMatrix>(parts[i].weight).rows;
        linears[i].bias_ = std::move(parts[i].bias);
      }
      slice(std::make_shared<const Linear>(std::move(*packed)), linears);
      return linears;
    }
  }
  for (size_t i = 0; i < parts.size(); ++i) {
    if (auto* matrix = std::get_if<CompactMatrix>(&parts[i].weight)) {
      LACUNA_TRY(linears[i], compact(std::move(*matrix), std::move(parts[i].bias), compute));
    } else {
      linears[i] =
          dense(std::move(std::get<at::Tensor>(parts[i].weight)), std::move(parts[i].bias));
    }
  }
  if (!joins) return linears;
  std::vector<at::Tensor> weights, biases;
  for (Linear& linear : linears) {
    if (linear.compact_ || linear.dense_.size(1) != linears.front().in_features()) return linears;
    weights.push_back(linear.dense_);
    if (linear.bias_) biases.push_back(*linear.bias_);
    linear.rows_ = linear.dense_.size(0);
  }
  slice(std::make_shared<const Linear>(dense(
            at::cat(weights), biases.empty() ? std::nullopt : std::optional(at::cat(biases)))),
        linears);
  return linears;
}

const Linear* Linear::whole_of(const std::vector<const Linear*>& parts) {
  const Linear* whole = parts.front()->whole_.get();
  if (whole == nullptr) return nullptr;
  int64_t next = 0;
  for (const Linear* part : parts) {
    if (part->whole_.get() != whole || part->first_ != next) return nullptr;
    next += part->rows_;
  }
  return next == whole->out_features() ? whole : nullptr;
}

Compute Linear::compute() const {
  if (in_packed_whole()) return whole_->compute();
  return compact_ ? compact_->compute : Compute{dense_.device(), dense_.scalar_type()};
}

void set_linear_clock(LinearClock* clock) { linear_clock = clock; }

namespace {

/// f(), counted if a clock is set.
template <class F>
auto counted(F&& f) {
  struct Count {
    LinearClock* clock;
    std::chrono::steady_clock::time_point start;
    ~Count() {
      if (clock == nullptr) return;
      clock->nanoseconds +=
          std::chrono::nanoseconds(std::chrono::steady_clock::now() - start).count();
      ++clock->calls;
    }
  };
  const Count count{linear_clock, linear_clock == nullptr ? std::chrono::steady_clock::time_point()
                                                          : std::chrono::steady_clock::now()};
  return f();
}

/// A tensor over raw memory of the device.
at::Tensor view(void* data, at::IntArrayRef shape, const Compute& compute) {
  const auto options = at::TensorOptions().device(compute.device).dtype(compute.dtype);
  return at::for_blob(data, shape).options(options).target_device(compute.device).make_tensor();
}

}  // namespace

at::Tensor Linear::forward(const at::Tensor& x) const {
  return counted([&] { return multiply(x); });
}

at::Tensor Linear::multiply(const at::Tensor& x) const {
  if (in_packed_whole()) return whole_->multiply(x).narrow(-1, first_, rows_).contiguous();
  if (gpu_) return gpu_->multiply(x, bias_);
  if (compact_ && compact_->packed) return compact_->packed->multiply(x, bias_);
  if (compact_ && compact_->coded) return compact_->coded->multiply(x, bias_);
  std::optional<kernels::LinearPlan> many;
  if (row_kernels_ && !x.requires_grad())
    if (const auto* plan = row_kernels_->plan_for(
            dtype_of(x.scalar_type()), x.numel() / std::max<int64_t>(1, x.size(-1)), many))
      return multiply_few_tokens(x, bias_, row_kernels_->rows(),
                                 [&](const format::RowProduct& product) {
                                   row_kernels_->run(*plan, product, torch_executor());
                                 });
  return multiply_expanded(x);
}

at::Tensor Linear::multiply_expanded(const at::Tensor& x) const {
  return at::linear(x, compact_ ? compact_->expanded() : dense_, bias_);
}

void Linear::forward_into(const void* x, int64_t tokens, void* y, const Executor& executor) const {
  counted([&] {
    const Compute compute = this->compute();
    if (compute.device.is_cuda()) return forward_on_gpu(x, tokens, y, compute);
    const format::RowProduct product{.dtype = dtype_of(compute.dtype),
                                     .tokens = tokens,
                                     .x = x,
                                     .x_stride = in_features(),
                                     .y = y,
                                     .y_stride = out_features(),
                                     .bias = bias_ ? bias_->const_data_ptr() : nullptr};
    if (compact_ && compact_->coded && tokens <= kernels::linear_coded::kMaxTokens)
      return compact_->coded->run(product, executor);
    std::optional<kernels::LinearPlan> many;
    if (row_kernels_)
      if (const auto* plan = row_kernels_->plan_for(product.dtype, tokens, many))
        return row_kernels_->run(*plan, product, executor);
    view(y, {tokens, out_features()}, compute)
        .copy_(multiply(view(const_cast<void*>(x), {tokens, in_features()}, compute)));
  });
}

void Linear::forward_on_gpu(const void* x, int64_t tokens, void* y, const Compute& compute) const {
  at::Tensor out = view(y, {tokens, out_features()}, compute);
  const GpuWeight* kernel = gpu_.get();
  if (compact_ && compact_->packed) kernel = &*compact_->packed;
  if (in_packed_whole()) kernel = &*whole_->compact_->packed;
  if (kernel != nullptr && tokens <= kernel->max_tokens() && kernel->workspace_bytes(tokens) == 0) {
    if (in_packed_whole()) {  // all rows into the scratch, whose memory a recording holds
      const at::Tensor all = scratch(tokens, whole_->out_features(), compute);
      kernel->run(x, tokens, all.mutable_data_ptr(), nullptr, /*overlap=*/true);
      out.copy_(all.narrow(1, first_, rows_));
    } else {
      kernel->run(x, tokens, y, nullptr, /*overlap=*/true);
    }
    if (bias_) out.add_(*bias_);
    return;
  }
  const at::Tensor input = view(const_cast<void*>(x), {tokens, in_features()}, compute);
  const at::Tensor weight = in_packed_whole() ? kernel->expanded().narrow(0, first_, rows_)
                            : compact_        ? compact_->expanded()
                                              : dense_;
  if (bias_)
    at::addmm_out(out, *bias_, input, weight.t());
  else
    at::mm_out(out, input, weight.t());
}

bool Linear::recordable() const {
  if (in_packed_whole() || !compact_) return true;
  return compact_->packed.has_value() ||
         (compact_->device && compact_->device->expands_by_kernel(compact_->compute));
}

at::Tensor Linear::rows(const at::Tensor& ids) const {
  if (!compact_) return at::embedding(weight(), ids);
  const CompactMatrix& matrix = compact_->matrix;
  if (matrix.quantization.none()) return at::embedding(compact_->expanded(), ids);
  const at::Tensor flat = ids.to(at::kInt).contiguous().view({-1});
  Shape shape = ids.sizes().vec();
  shape.push_back(matrix.columns);
  at::Tensor out = at::empty(shape, compact_->compute.dtype);
  rows_into(flat.const_data_ptr<int32_t>(), flat.numel(), out.mutable_data_ptr(), torch_executor());
  return out;
}

void Linear::rows_into(const int32_t* ids, int64_t count, void* out,
                       const Executor& executor) const {
  TORCH_CHECK(!in_packed_whole(), "rows_into: the weight is on a GPU");
  const int64_t total = out_features();
  for (int64_t i = 0; i < count; ++i)
    TORCH_CHECK(ids[i] >= 0 && ids[i] < total, "rows: no row ", ids[i], " of ", total);
  const at::ScalarType type = compact_ ? compact_->compute.dtype : dense_.scalar_type();
  const int64_t row_bytes = in_features() * static_cast<int64_t>(c10::elementSize(type));
  auto* to = static_cast<std::byte*>(out);
  if (!compact_) {
    const auto* from = static_cast<const std::byte*>(dense_.const_data_ptr());
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(to + i * row_bytes, from + ids[i] * row_bytes, static_cast<size_t>(row_bytes));
    return;
  }
  const CompactMatrix& matrix = compact_->matrix;
  if (matrix.quantization.none()) {
    const at::Tensor rows = at::embedding(
        compact_->expanded(), at::tensor(at::ArrayRef<int32_t>(ids, static_cast<size_t>(count))));
    std::memcpy(to, rows.const_data_ptr(), static_cast<size_t>(count * row_bytes));
    return;
  }
  executor.parallel_for(count, [&](int64_t i) {
    if (compact_->coded) return compact_->coded->expand_row(ids[i], to + i * row_bytes);
    format::expand_rows(matrix, ids[i], ids[i] + 1, to + i * row_bytes);
  });
}

at::Tensor Linear::weight() const {
  if (in_packed_whole()) return whole_->compact_->expanded().narrow(0, first_, rows_).clone();
  return compact_ ? compact_->expanded().clone() : dense_;
}

void Linear::set_weight(at::Tensor weight) {
  compact_.reset();
  row_kernels_.reset();
  gpu_.reset();
  whole_.reset();
  dense_ = std::move(weight);
  const at::ScalarType dtype = dense_.scalar_type();
  if (dense_.is_cuda() && dense_.is_contiguous() && !dense_.requires_grad() && dense_.numel() > 0) {
    const Compute compute{dense_.device(), dtype};
    auto made = GpuWeight::make(
        decode_problem_of({}, dtype_of(dtype), dense_.size(0), dense_.size(1), 0.0, compute),
        compute, [&] { return dense_; });
    if (made.ok() && made.value())
      gpu_ = std::make_shared<const GpuWeight>(*std::move(made).value());
    return;
  }
  const bool rows = dense_.is_cpu() && dense_.is_contiguous() && !dense_.requires_grad() &&
                    (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
  if (!rows || dense_.numel() == 0) return;
  const auto view =
      format::dense_rows(dense_.const_data_ptr(), dtype_of(dtype), dense_.size(0), dense_.size(1));
  auto plan = RowKernels::plan(
      view, decode_problem_of({}, view.dtype, view.rows, view.columns, 0.0, {at::kCPU, dtype}));
  if (plan.ok()) row_kernels_ = std::move(plan).value();
}

bool Linear::is_compact() const { return compact_ != nullptr || in_packed_whole(); }
int64_t Linear::out_features() const {
  if (in_packed_whole()) return rows_;
  return compact_ ? compact_->matrix.rows : dense_.size(0);
}
int64_t Linear::in_features() const {
  if (in_packed_whole()) return whole_->in_features();
  return compact_ ? compact_->matrix.columns : dense_.size(1);
}

std::optional<kernels::Problem> Linear::decode_problem() const {
  if (!row_kernels_) return std::nullopt;
  return row_kernels_->decode_problem();
}

size_t Linear::weight_bytes() const {
  if (in_packed_whole()) {  // its share; the shares of all slices make up the whole
    const size_t all = whole_->weight_bytes();
    const auto rows = static_cast<size_t>(whole_->out_features());
    const auto before = [&](int64_t row) { return all * static_cast<size_t>(row) / rows; };
    return before(first_ + rows_) - before(first_);
  }
  return compact_ ? compact_->bytes() : dense_.nbytes();
}

}  // namespace lacuna::model
