#include "lacuna/model/scratch.h"

#include <c10/core/InferenceMode.h>

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

}  // namespace lacuna::model
