// 8 weights a load, float32 multiply-adds.
#include "lacuna/format/row_product_avx2.h"
#include "lacuna/kernels/linear_dense/cpu.h"

namespace lacuna::kernels::linear_dense {

const format::RowImplementations kAvx2Fma =
    format::avx2::implementations<format::avx2::DenseCursor>();

}  // namespace lacuna::kernels::linear_dense
