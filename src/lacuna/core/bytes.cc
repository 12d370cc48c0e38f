#include "lacuna/core/bytes.h"

#include <fmt/format.h>

namespace lacuna {

std::optional<int64_t> element_count(const Shape& shape) {
  constexpr int64_t kLimit = int64_t{1} << 62;
  int64_t count = 1;
  bool zero = false;
  for (int64_t extent : shape) {
    if (extent < 0) return std::nullopt;
    if (extent == 0) zero = true;
    if (extent > 0 && count > kLimit / extent) return std::nullopt;
    if (extent > 0) count *= extent;
  }
  return zero ? 0 : count;
}

std::string shape_text(const Shape& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) text += fmt::format("{}{}", i ? ", " : "", shape[i]);
  return text + "]";
}

}  // namespace lacuna
