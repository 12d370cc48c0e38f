// Each 8 mask bits select a shuffle from a table of 256 that spreads the next values to their
// columns (pshufb for two bytes, vpermd for four); float32 multiply-adds follow.
#include "lacuna/format/row_product_avx2.h"
#include "lacuna/kernels/linear_bitmap/cpu.h"

namespace lacuna::kernels::linear_bitmap {
namespace {

namespace avx2 = format::avx2;
template <class Values>
using Cursor = avx2::BitmapCursor<Values, false>;

}  // namespace

const format::RowImplementations kAvx2Shuffle = avx2::implementations<Cursor>();

}  // namespace lacuna::kernels::linear_bitmap
