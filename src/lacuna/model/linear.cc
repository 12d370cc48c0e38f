#include "lacuna/model/linear.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <vector>

#include "lacuna/format/rows.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/model/coded_weight.h"
#include "lacuna/model/few_tokens.h"
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

at::Tensor to_device(const Bytes& bytes, DType dtype, int64_t elements, at::Device device) {
  return wrap({dtype, {elements}, bytes}).to(device);
}

/// The parts of a compact matrix as tensors on a GPU, expanded by torch's own operations. The
/// temporaries of an expansion take about ten bytes a weight of that one matrix.
class DeviceCompact {
 public:
  DeviceCompact(const CompactMatrix& matrix, const Compute& compute)
      : pattern_(matrix.pattern), rows_(matrix.rows), columns_(matrix.columns) {
    const at::Device device = compute.device;
    const auto count = static_cast<int64_t>(matrix.values.size() / size_bytes(matrix.values_dtype));
    values_ = to_device(matrix.values, matrix.values_dtype, count, device);
    if (pattern_.kind == PatternKind::kBlock) {
      const auto blocks = static_cast<int64_t>(matrix.block_columns.size() / sizeof(int32_t));
      const int64_t block_rows = (rows_ + pattern_.block_rows - 1) / pattern_.block_rows;
      const at::Tensor offsets = wrap({DType::kI64, {block_rows + 1}, matrix.block_offsets});
      block_columns_ = to_device(matrix.block_columns, DType::kI32, blocks, device).to(at::kLong);
      block_rows_ = at::repeat_interleave(at::arange(block_rows), at::diff(offsets)).to(device);
      values_ = values_.view({blocks, pattern_.block_rows, pattern_.block_columns});
      return;
    }
    const int64_t stride = matrix.bitmap_stride_bytes();
    bitmap_ = to_device(matrix.bitmap, DType::kU8, rows_ * stride, device).view({rows_, stride});
    bits_ = at::tensor({1, 2, 4, 8, 16, 32, 64, 128}, at::kByte).to(device);
    if (pattern_.kind == PatternKind::kKeepOf && columns_ % pattern_.of != 0) {
      // Slots that the short last group of a row leaves unused would shift what follows.
      const int64_t used = columns_ / pattern_.of * pattern_.keep +
                           std::min<int64_t>(pattern_.keep, columns_ % pattern_.of);
      values_ = values_.view({rows_, matrix.values_per_row()}).narrow(1, 0, used).contiguous();
    }
  }

  /// @param out  called with the padded shape; gives the tensor to fill
  at::Tensor expand(const Compute& compute) const {
    const at::Tensor values = values_.to(compute.dtype);
    if (pattern_.kind == PatternKind::kBlock) {
      const int64_t r = pattern_.block_rows, c = pattern_.block_columns;
      const int64_t down = (rows_ + r - 1) / r, across = (columns_ + c - 1) / c;
      at::Tensor out = scratch(down * r, across * c, compute).zero_();
      out.view({down, r, across, c})
          .permute({0, 2, 1, 3})
          .index_put_({block_rows_, block_columns_}, values);
      return out.narrow(0, 0, rows_).narrow(1, 0, columns_);
    }
    const at::Tensor kept = bitmap_.unsqueeze(-1)
                                .bitwise_and(bits_)
                                .to(at::kBool)
                                .view({rows_, -1})
                                .narrow(1, 0, columns_);
    return scratch(rows_, columns_, compute).zero_().masked_scatter_(kept, values);
  }

  size_t bytes() const {
    size_t sum = 0;
    for (const at::Tensor* part : {&values_, &bitmap_, &block_rows_, &block_columns_})
      if (part->defined()) sum += part->nbytes();
    return sum;
  }

 private:
  format::Pattern pattern_;
  int64_t rows_, columns_;
  at::Tensor values_, bitmap_, bits_, block_rows_, block_columns_;
};

}  // namespace

/// The kernels that take up to format::kMaxTokens tokens to the rows of a weight in host memory,
/// planned once.
class Linear::RowKernels {
 public:
  static Result<std::shared_ptr<const RowKernels>> plan(const format::RowsView& rows,
                                                        double sparsity, const Compute& compute) {
    const auto* operation = kernels::linear_operation(rows.pattern.kind);
    TORCH_CHECK(operation != nullptr, "RowKernels: no kernel for ", rows.pattern.text());
    auto kernels = std::make_shared<RowKernels>();
    kernels->rows_ = rows;
    for (int64_t tokens = 1; tokens <= format::kMaxTokens; ++tokens) {
      LACUNA_TRY(auto plan, operation->plan({.operation = std::string(operation->name),
                                             .values = kernels::values_of(rows.dtype),
                                             .activations = dtype_of(compute.dtype),
                                             .outputs = rows.rows,
                                             .inputs = rows.columns,
                                             .tokens = tokens,
                                             .pattern = rows.pattern,
                                             .sparsity = sparsity},
                                            kernels::Device::this_cpu()));
      kernels->plans_.push_back(std::move(plan));
    }
    return std::shared_ptr<const RowKernels>(std::move(kernels));
  }

  /// @param product  in the dtype that was planned for, at most kMaxTokens tokens
  void run(const format::RowProduct& product, const Executor& executor) const {
    run_few_tokens(
        product, plans_,
        [&](const kernels::LinearPlan& plan, const format::RowProduct& operands, void* workspace) {
          plan.candidate->run(rows_, operands, workspace, executor);
        });
  }

  const kernels::Problem& decode_problem() const { return plans_.front().problem; }

  bool takes(DType dtype, int64_t tokens) const {
    return tokens > 0 && tokens <= format::kMaxTokens &&
           dtype == plans_.front().problem.activations;
  }

  int64_t rows() const { return rows_.rows; }

 private:
  format::RowsView rows_;
  std::vector<kernels::LinearPlan> plans_;  // for 1, 2, ... tokens
};

/// What a compact weight is held as: by rows where kernels multiply it as it is (CPU, a pattern
/// with a bitmap), as a stream of codes (CPU, int8 and int4), as a matrix (CPU, blocks and other
/// codes), or on the GPU.
struct Linear::Compact {
  CompactMatrix matrix;  // its sizes alone where `device` or `coded` is set; views of `rows` there
  std::optional<CodedWeight> coded;
  std::optional<format::CompactRows> rows;
  std::optional<DeviceCompact> device;
  Compute compute;

  /// Dense, in the shared scratch: good until the next expansion on this thread.
  at::Tensor expanded() const {
    if (device) return device->expand(compute);
    if (coded) return coded->expanded();
    at::Tensor out = scratch(matrix.rows, matrix.columns, compute);
    expand_into(matrix, out);
    return out;
  }

  size_t bytes() const {
    if (device) return device->bytes();
    if (coded) return coded->bytes();
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
    compact->device.emplace(matrix, compute);
    keep_sizes_alone();
  } else if (coded && compute.int8_activations) {
    auto packed = CodedWeight::make(matrix, compute);
    if (packed.ok()) {
      compact->coded = std::move(packed).value();
      keep_sizes_alone();
    } else if (packed.error().code != ::lacuna::Code::kNotPossible) {
      return packed.error();  // LACUNA_FORCE
    }
  } else if (matrix.pattern.kind != PatternKind::kBlock && !coded) {
    LACUNA_TRY(compact->rows, format::CompactRows::make(matrix));
    const auto elements = static_cast<double>(matrix.rows * matrix.columns);
    const auto kept = static_cast<double>(matrix.values.size() / size_bytes(matrix.values_dtype));
    const double sparsity = elements > 0 ? std::max(0.0, 1.0 - kept / elements) : 0.0;
    LACUNA_TRY(linear.few_tokens_, RowKernels::plan(compact->rows->view(), sparsity, compute));
  }
  linear.compact_ = std::move(compact);
  linear.bias_ = std::move(bias);
  return linear;
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

}  // namespace

at::Tensor Linear::forward(const at::Tensor& x) const {
  return counted([&] { return multiply(x); });
}

at::Tensor Linear::multiply(const at::Tensor& x) const {
  if (compact_ && compact_->coded) return compact_->coded->multiply(x, bias_);
  if (few_tokens_ && !x.requires_grad() &&
      few_tokens_->takes(dtype_of(x.scalar_type()), x.numel() / std::max<int64_t>(1, x.size(-1))))
    return multiply_few_tokens(
        x, bias_, few_tokens_->rows(),
        [&](const format::RowProduct& product) { few_tokens_->run(product, torch_executor()); });
  return at::linear(x, compact_ ? compact_->expanded() : dense_, bias_);
}

void Linear::forward_into(const void* x, int64_t tokens, void* y, const Executor& executor) const {
  counted([&] {
    const at::ScalarType type = compact_ ? compact_->compute.dtype : dense_.scalar_type();
    const format::RowProduct product{.dtype = dtype_of(type),
                                     .tokens = tokens,
                                     .x = x,
                                     .x_stride = in_features(),
                                     .y = y,
                                     .y_stride = out_features(),
                                     .bias = bias_ ? bias_->const_data_ptr() : nullptr};
    if (compact_ && compact_->coded && tokens <= kernels::linear_coded::kMaxTokens)
      return compact_->coded->run(product, executor);
    if (few_tokens_ && few_tokens_->takes(product.dtype, tokens))
      return few_tokens_->run(product, executor);
    const auto options = at::TensorOptions().dtype(type);
    const at::Tensor input = at::from_blob(const_cast<void*>(x), {tokens, in_features()}, options);
    at::from_blob(y, {tokens, out_features()}, options).copy_(multiply(input));
  });
}

at::Tensor Linear::rows(const at::Tensor& ids) const {
  if (!compact_) return at::embedding(dense_, ids);
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

at::Tensor Linear::weight() const { return compact_ ? compact_->expanded().clone() : dense_; }

void Linear::set_weight(at::Tensor weight) {
  compact_.reset();
  few_tokens_.reset();
  dense_ = std::move(weight);
  const at::ScalarType dtype = dense_.scalar_type();
  const bool rows = dense_.is_cpu() && dense_.is_contiguous() && !dense_.requires_grad() &&
                    (dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf);
  if (!rows || dense_.numel() == 0) return;
  auto plan = RowKernels::plan(
      format::dense_rows(dense_.const_data_ptr(), dtype_of(dtype), dense_.size(0), dense_.size(1)),
      0.0, {at::kCPU, dtype});
  if (plan.ok()) few_tokens_ = std::move(plan).value();
}

bool Linear::is_compact() const { return compact_ != nullptr; }
int64_t Linear::out_features() const { return compact_ ? compact_->matrix.rows : dense_.size(0); }
int64_t Linear::in_features() const { return compact_ ? compact_->matrix.columns : dense_.size(1); }

std::optional<kernels::Problem> Linear::decode_problem() const {
  if (!few_tokens_) return std::nullopt;
  return few_tokens_->decode_problem();
}

size_t Linear::weight_bytes() const { return compact_ ? compact_->bytes() : dense_.nbytes(); }

}  // namespace lacuna::model
