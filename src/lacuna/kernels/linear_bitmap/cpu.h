// The CPU implementations of linear_bitmap, one file for each instruction set.
#pragma once

#include "lacuna/format/row_product.h"

namespace lacuna::kernels::linear_bitmap {

extern const format::RowImplementations kAvx512ExpandDot;
extern const format::RowImplementations kAvx512ExpandFma;
extern const format::RowImplementations kAvx2Shuffle;
extern const format::RowImplementations kPortable;

}  // namespace lacuna::kernels::linear_bitmap
