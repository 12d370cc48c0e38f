// As linear_bitmap: 32 mask bits and their values become a register of weights by vpexpandw.
// "Fixed" steps over the values of a chunk by the constant 32 keep / of; "count" counts bits, for
// any keep:of.
#include "lacuna/format/row_product_avx512.h"
#include "lacuna/kernels/linear_nm/cpu.h"

namespace lacuna::kernels::linear_nm {
namespace {

namespace avx512 = format::avx512;
template <class Chunk>
using Fixed = avx512::BitmapCursor<Chunk, true>;
template <class Chunk>
using Count = avx512::BitmapCursor<Chunk, false>;

}  // namespace

const format::RowImplementations kAvx512FixedFma = {
    avx512::implementation<avx512::F32, Fixed>(),
    avx512::implementation<avx512::BF16AsFloat, Fixed>(),
    avx512::implementation<avx512::F16AsFloat, Fixed>(),
    avx512::implementation<avx512::F8AsFloat, Fixed>()};
const format::RowImplementations kAvx512FixedDot = {
    {}, avx512::implementation<avx512::BF16Dot, Fixed>(), {}, {}};
const format::RowImplementations kAvx512CountFma = {
    avx512::implementation<avx512::F32, Count>(),
    avx512::implementation<avx512::BF16AsFloat, Count>(),
    avx512::implementation<avx512::F16AsFloat, Count>(),
    avx512::implementation<avx512::F8AsFloat, Count>()};
const format::RowImplementations kAvx512CountDot = {
    {}, avx512::implementation<avx512::BF16Dot, Count>(), {}, {}};

}  // namespace lacuna::kernels::linear_nm
