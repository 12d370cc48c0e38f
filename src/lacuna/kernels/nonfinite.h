// Infinite and NaN inputs, for kernels that never touch dropped weights: 0 times infinity is NaN in
// a dense product, and so it is here.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/format/row_product.h"

namespace lacuna::kernels {

/// Where a token's x is infinite or NaN, ascending. Allocates only where there is such a thing.
std::vector<int64_t> nonfinite_columns(const format::RowProduct& product, int64_t token,
                                       int64_t columns);
/// y[token, row] = NaN.
void set_nan(const format::RowProduct& product, int64_t token, int64_t row);

}  // namespace lacuna::kernels
