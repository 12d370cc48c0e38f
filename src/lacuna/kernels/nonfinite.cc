#include "lacuna/kernels/nonfinite.h"

#include <limits>

#include "lacuna/format/element.h"

namespace lacuna::kernels {
namespace {

/// All ones in the exponent.
template <class U>
constexpr U exponent_of(DType dtype) {
  return static_cast<U>(sizeof(U) == 4 ? 0x7f800000u : dtype == DType::kBF16 ? 0x7f80u : 0x7c00u);
}

template <class U>
U bits_at(const std::byte* x, int64_t column) {
  return read_unaligned<U>(x + column * static_cast<int64_t>(sizeof(U)));
}

}  // namespace

std::vector<int64_t> nonfinite_columns(const format::RowProduct& product, int64_t token,
                                       int64_t columns) {
  return format::with_bits(product.dtype, [&](auto zero) {
    using U = decltype(zero);
    const U exponent = exponent_of<U>(product.dtype);
    const std::byte* x = static_cast<const std::byte*>(product.x) +
                         token * product.x_stride * static_cast<int64_t>(sizeof(U));
    U any = 0;  // without branches: this is vector code
    for (int64_t k = 0; k < columns; ++k)
      any |= static_cast<U>((bits_at<U>(x, k) & exponent) == exponent);
    std::vector<int64_t> found;
    for (int64_t k = 0; any != 0 && k < columns; ++k)
      if ((bits_at<U>(x, k) & exponent) == exponent) found.push_back(k);
    return found;
  });
}

void set_nan(const format::RowProduct& product, int64_t token, int64_t row) {
  format::write_float(product.y, product.dtype, token * product.y_stride + row,
                      std::numeric_limits<float>::quiet_NaN());
}

}  // namespace lacuna::kernels
