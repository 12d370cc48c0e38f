#include <algorithm>

#include "lacuna/model/decoder.h"

namespace lacuna::model {
namespace {

constexpr int64_t kFirstCapacity = 64;  // tokens

at::Tensor grown(const at::Tensor& buffer, int64_t length, int64_t capacity) {
  auto shape = buffer.sizes().vec();
  shape[2] = capacity;
  at::Tensor larger = at::empty(shape, buffer.options());
  larger.narrow(2, 0, length).copy_(buffer.narrow(2, 0, length));
  return larger;
}

}  // namespace

KvCache::KvCache(const io::DecoderSpec& spec, int64_t batch, const Compute& compute)
    : capacity_(spec.max_positions) {
  const auto options = at::TensorOptions().device(compute.device).dtype(compute.dtype);
  const int64_t first = std::min(kFirstCapacity, capacity_);
  for (int64_t layer = 0; layer < spec.layers; ++layer) {
    keys_.push_back(at::empty({batch, spec.kv_heads, first, spec.head_dim}, options));
    values_.push_back(at::empty({batch, spec.kv_heads, first, spec.head_dim}, options));
  }
}

void KvCache::reserve(int64_t tokens) {
  TORCH_CHECK(tokens <= capacity_, "KvCache: ", tokens, " tokens do not fit the model's ",
              capacity_, " positions");
  if (tokens <= reserved()) return;
  const int64_t capacity = std::min(std::max(tokens, 2 * reserved()), capacity_);
  for (auto* buffers : {&keys_, &values_})
    for (at::Tensor& buffer : *buffers) buffer = grown(buffer, length_, capacity);
}

std::pair<at::Tensor, at::Tensor> KvCache::append(int64_t layer, const at::Tensor& k,
                                                  const at::Tensor& v) {
  const int64_t tokens = k.size(2), end = length_ + tokens;
  reserve(end);
  at::Tensor& keys = keys_[layer];
  at::Tensor& values = values_[layer];
  keys.narrow(2, length_, tokens).copy_(k);
  values.narrow(2, length_, tokens).copy_(v);
  return {keys.narrow(2, 0, end), values.narrow(2, 0, end)};
}

size_t KvCache::bytes() const {
  size_t bytes = 0;
  for (size_t layer = 0; layer < keys_.size(); ++layer)
    bytes += keys_[layer].nbytes() + values_[layer].nbytes();
  return bytes;
}

}  // namespace lacuna::model
