// 32 weights a load; the tile of the sparse operations without the expansion, so that a comparison
// shows what sparsity costs and gains and nothing else.
#include "lacuna/format/row_product_avx512.h"
#include "lacuna/kernels/linear_dense/cpu.h"

namespace lacuna::kernels::linear_dense {

namespace avx512 = format::avx512;

const format::RowImplementations kAvx512Fma = {
    avx512::implementation<avx512::F32, avx512::DenseCursor>(),
    avx512::implementation<avx512::BF16AsFloat, avx512::DenseCursor>(),
    avx512::implementation<avx512::F16AsFloat, avx512::DenseCursor>(),
    avx512::implementation<avx512::F8AsFloat, avx512::DenseCursor>()};
const format::RowImplementations kAvx512Dot = {
    {}, avx512::implementation<avx512::BF16Dot, avx512::DenseCursor>(), {}, {}};

}  // namespace lacuna::kernels::linear_dense
