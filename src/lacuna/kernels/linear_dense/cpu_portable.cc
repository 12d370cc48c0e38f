// Plain C++.
#include "lacuna/format/row_product_portable.h"
#include "lacuna/kernels/linear_dense/cpu.h"

namespace lacuna::kernels::linear_dense {

const format::RowImplementations kPortable =
    format::portable::implementations<format::portable::DenseCursor>();

}  // namespace lacuna::kernels::linear_dense
