// Bytes with an owner, and the one view type for tensors that lie in memory or in a mapped file.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "lacuna/core/dtype.h"

namespace lacuna {

/// Read-only bytes that keep whatever holds them (a mapped file, a heap block) alive.
class Bytes {
 public:
  Bytes() = default;
  Bytes(std::shared_ptr<const void> owner, const std::byte* data, size_t size)
      : owner_(std::move(owner)), data_(data), size_(size) {}
  /// Takes over a vector of any trivially copyable type.
  template <class T>
  static Bytes take(std::vector<T> values) {
    auto held = std::make_shared<std::vector<T>>(std::move(values));
    const auto* data = reinterpret_cast<const std::byte*>(held->data());
    const size_t size = held->size() * sizeof(T);
    return {std::move(held), data, size};
  }
  const std::byte* data() const { return data_; }
  size_t size() const { return size_; }
  bool empty() const { return size_ == 0; }
  std::span<const std::byte> span() const { return {data_, size_}; }
  Bytes slice(size_t begin, size_t size) const { return {owner_, data_ + begin, size}; }
  /// The bytes as values of T. Files don't promise alignment: use read_unaligned() unless known.
  template <class T>
  const T* as() const {
    return reinterpret_cast<const T*>(data_);
  }

 private:
  std::shared_ptr<const void> owner_;
  const std::byte* data_ = nullptr;
  size_t size_ = 0;
};

template <class T>
T read_unaligned(const void* at) {
  T value;
  std::memcpy(&value, at, sizeof(T));
  return value;
}

using Shape = std::vector<int64_t>;

/// Product of the extents; nothing when an extent is negative or the product passes 2^62.
std::optional<int64_t> element_count(const Shape& shape);
/// "[4096, 1024]"
std::string shape_text(const Shape& shape);

/// A dense row-major tensor that lies somewhere in memory.
struct Tensor {
  DType dtype = DType::kF32;
  Shape shape;
  Bytes bytes;

  int64_t elements() const { return element_count(shape).value_or(0); }
};

}  // namespace lacuna
