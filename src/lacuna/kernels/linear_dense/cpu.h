// The CPU implementations of linear_dense, one file for each instruction set.
#pragma once

#include "lacuna/format/row_product.h"

namespace lacuna::kernels::linear_dense {

extern const format::RowImplementations kAvx512Dot;
extern const format::RowImplementations kAvx512Fma;
extern const format::RowImplementations kAvx2Fma;
extern const format::RowImplementations kPortable;

}  // namespace lacuna::kernels::linear_dense
