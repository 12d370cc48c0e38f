// The set bits of a chunk, one by one, into 32 floats; no intrinsics.
#include "lacuna/format/row_product_portable.h"
#include "lacuna/kernels/linear_nm/cpu.h"

namespace lacuna::kernels::linear_nm {

const format::RowImplementations kPortable =
    format::portable::implementations<format::portable::BitmapCursor>();

}  // namespace lacuna::kernels::linear_nm
