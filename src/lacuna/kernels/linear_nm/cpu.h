// The CPU implementations of linear_nm, one file for each instruction set.
#pragma once

#include "lacuna/format/row_product.h"

namespace lacuna::kernels::linear_nm {

extern const format::RowImplementations kAvx512FixedDot;
extern const format::RowImplementations kAvx512FixedFma;
extern const format::RowImplementations kAvx512CountDot;
extern const format::RowImplementations kAvx512CountFma;
extern const format::RowImplementations kAvx2FixedShuffle;
extern const format::RowImplementations kAvx2CountShuffle;
extern const format::RowImplementations kPortable;

}  // namespace lacuna::kernels::linear_nm
