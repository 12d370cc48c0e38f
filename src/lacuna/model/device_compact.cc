#include "lacuna/model/device_compact.h"

#include <algorithm>

#include "lacuna/format/codes.h"
#include "lacuna/format/rows.h"
#include "lacuna/kernels/gpu_linear.h"
#include "lacuna/model/scratch.h"

namespace lacuna::model {
namespace {

using format::PatternKind;

at::Tensor to_device(const Bytes& bytes, DType dtype, int64_t elements, at::Device device) {
  return wrap({dtype, {elements}, bytes}).to(device);
}

/// @param count  of all values
at::Tensor values_before_rows(const format::CompactMatrix& matrix, int64_t count) {
  const int64_t stride = matrix.bitmap_stride_bytes();
  const auto* bits = reinterpret_cast<const uint8_t*>(matrix.bitmap.data());
  at::Tensor before = at::empty({matrix.rows}, at::kLong);
  int64_t values = 0;
  for (int64_t row = 0; row < matrix.rows; ++row, bits += stride) {
    before.mutable_data_ptr<int64_t>()[row] = values;
    values += format::count_bits(bits, stride);
  }
  TORCH_CHECK(values == count, "The bitmap keeps ", values, " weights, but there are ", count,
              " values. Check the file with `lacuna verify`.");
  return before;
}

}  // namespace

DeviceCompact::DeviceCompact(const format::CompactMatrix& matrix, const Compute& compute)
    : Weight(matrix.rows, matrix.columns, compute), pattern_(matrix.pattern) {
  const at::Device device = compute.device;
  const DType stored = matrix.quantization.none() ? matrix.values_dtype
                                                  : format::stored_dtype(matrix.quantization.code);
  const auto count = static_cast<int64_t>(matrix.values.size() / size_bytes(stored));
  values_ = to_device(matrix.values, stored, count, device);
  if (pattern_.kind == PatternKind::kDense) {
    values_ = values_.view({rows(), columns()});
    return;
  }
  if (pattern_.kind == PatternKind::kBlock) {
    const auto blocks = static_cast<int64_t>(matrix.block_columns.size() / sizeof(int32_t));
    const int64_t block_rows = (rows() + pattern_.block_rows - 1) / pattern_.block_rows;
    const at::Tensor offsets = wrap({DType::kI64, {block_rows + 1}, matrix.block_offsets});
    block_columns_ = to_device(matrix.block_columns, DType::kI32, blocks, device).to(at::kLong);
    block_rows_ = at::repeat_interleave(at::arange(block_rows), at::diff(offsets)).to(device);
    values_ = values_.view({blocks, pattern_.block_rows, pattern_.block_columns});
    return;
  }
  const int64_t stride = matrix.bitmap_stride_bytes();
  bitmap_ = to_device(matrix.bitmap, DType::kU8, rows() * stride, device).view({rows(), stride});
  if (gpu_library_refusal()) {
    bits_ = at::tensor({1, 2, 4, 8, 16, 32, 64, 128}, at::kByte).to(device);
  } else if (pattern_.kind == PatternKind::kUnstructured) {
    row_values_ = values_before_rows(matrix, count).to(device);
  }
  if (pattern_.kind == PatternKind::kKeepOf) {
    // Slots that the short last group of a row leaves unused would shift what follows.
    const int64_t used = columns() / pattern_.of * pattern_.keep +
                         std::min<int64_t>(pattern_.keep, columns() % pattern_.of);
    values_ = values_.view({rows(), matrix.values_per_row()}).narrow(1, 0, used).contiguous();
  }
}

at::Tensor DeviceCompact::expanded() const {
  const at::Tensor values = values_.to(compute().dtype);
  if (pattern_.kind == PatternKind::kDense) return values;
  return pattern_.kind == PatternKind::kBlock ? expand_blocks(values) : expand_bitmap(values);
}

at::Tensor DeviceCompact::expand_blocks(const at::Tensor& values) const {
  const int64_t r = pattern_.block_rows, c = pattern_.block_columns;
  const int64_t down = (rows() + r - 1) / r, across = (columns() + c - 1) / c;
  at::Tensor out = scratch(down * r, across * c, compute()).zero_();
  out.view({down, r, across, c})
      .permute({0, 2, 1, 3})
      .index_put_({block_rows_, block_columns_}, values);
  return out.narrow(0, 0, rows()).narrow(1, 0, columns());
}

at::Tensor DeviceCompact::expand_bitmap(const at::Tensor& values) const {
  at::Tensor out = scratch(rows(), columns(), compute());
  if (!bits_.defined()) {
    const kernels::GpuTable& library = **kernels::gpu_library();
    const kernels::GpuBitmapMatrix matrix{
        .rows = rows(),
        .columns = columns(),
        .element_bytes = static_cast<int32_t>(values.element_size()),
        .bitmap = bitmap_.const_data_ptr<uint8_t>(),
        .values = values.const_data_ptr(),
        .row_values = row_values_.defined() ? row_values_.const_data_ptr<int64_t>() : nullptr,
        .values_per_row = row_values_.defined() ? 0 : values.size(-1)};
    const int error = library.expand(&matrix, out.mutable_data_ptr(), gpu_stream(compute().device));
    TORCH_CHECK(error == 0, "a weight can't be expanded: ", library.error_text(error));
    return out;
  }
  const at::Tensor kept = bitmap_.unsqueeze(-1)
                              .bitwise_and(bits_)
                              .to(at::kBool)
                              .view({rows(), -1})
                              .narrow(1, 0, columns());
  return out.zero_().masked_scatter_(kept, values);
}

bool DeviceCompact::recordable() const {
  return pattern_.kind != PatternKind::kBlock && !bits_.defined() &&
         values_.scalar_type() == compute().dtype;
}

size_t DeviceCompact::bytes() const {
  size_t sum = 0;
  for (const at::Tensor* part : {&values_, &bitmap_, &row_values_, &block_rows_, &block_columns_})
    if (part->defined()) sum += part->nbytes();
  return sum;
}

}  // namespace lacuna::model
