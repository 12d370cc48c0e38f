// As linear_bitmap: 8 mask bits select a shuffle. "Fixed" steps by the constant 8 keep / of;
// "count" counts bits, for any keep:of.
#include "lacuna/format/row_product_avx2.h"
#include "lacuna/kernels/linear_nm/cpu.h"

namespace lacuna::kernels::linear_nm {
namespace {

namespace avx2 = format::avx2;
template <class Values>
using Fixed = avx2::BitmapCursor<Values, true>;
template <class Values>
using Count = avx2::BitmapCursor<Values, false>;

}  // namespace

const format::RowImplementations kAvx2FixedShuffle = avx2::implementations<Fixed>();
const format::RowImplementations kAvx2CountShuffle = avx2::implementations<Count>();

}  // namespace lacuna::kernels::linear_nm
