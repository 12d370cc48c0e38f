#include "lacuna/model/scratch.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>

namespace lacuna::model {
namespace {

at::Tensor& shared_buffer() {
  static thread_local at::Tensor buffer;
  return buffer;
}

}  // namespace

at::Tensor scratch_buffer() { return shared_buffer(); }

at::Tensor scratch(int64_t rows, int64_t columns, const Compute& compute) {
  at::Tensor& buffer = shared_buffer();
  const int64_t bytes = rows * columns * static_cast<int64_t>(c10::elementSize(compute.dtype));
  if (!buffer.defined() || buffer.device() != compute.device || buffer.size(0) < bytes) {
    const c10::InferenceMode off(false);  // written in any mode
    buffer.reset();                       // give the old one back first
    buffer = at::empty({bytes}, at::TensorOptions().device(compute.device).dtype(at::kByte));
  }
  return buffer.narrow(0, 0, bytes).view(compute.dtype).view({rows, columns});
}

void expand_into(const format::CompactMatrix& matrix, at::Tensor& out) {
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

}  // namespace lacuna::model
