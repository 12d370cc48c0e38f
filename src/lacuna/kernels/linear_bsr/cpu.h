// The CPU implementations of linear_bsr, one file for each instruction set.
#pragma once

#include "lacuna/format/row_product.h"

namespace lacuna::kernels::linear_bsr {

extern const format::RowImplementations kAvx512ChunkDot;
extern const format::RowImplementations kAvx512ChunkFma;
extern const format::RowImplementations kAvx512FlatFma;
extern const format::RowImplementations kAvx512PieceFma;
extern const format::RowImplementations kAvx2PieceFma;
extern const format::RowImplementations kPortablePiece;

}  // namespace lacuna::kernels::linear_bsr
