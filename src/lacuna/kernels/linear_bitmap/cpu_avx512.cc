// Each 32 mask bits and the values they count become one register of weights (vpexpandw; for f32
// two vpexpandd), which meets every token before the next is made.
//
//   bitmap  |b0 b1 .. b31|        kmov, popcnt -> where the next chunk's values begin
//   values  |v0 v1 v2 ...         one 64-byte load, of which popcnt(mask) are used
//   weights |v0 0 v1 v2 .. 0|     vpexpandw into a zeroed register
//
// Bytes: 1/8 + density * width a weight, each read once, in order; x stays in the nearest cache.
// What was tried and what lost: bench/lab/cpu_linear/README.md.
#include "lacuna/format/row_product_avx512.h"
#include "lacuna/kernels/linear_bitmap/cpu.h"

namespace lacuna::kernels::linear_bitmap {
namespace {

namespace avx512 = format::avx512;
template <class Chunk>
using Cursor = avx512::BitmapCursor<Chunk, false>;

}  // namespace

const format::RowImplementations kAvx512ExpandFma = {
    avx512::implementation<avx512::F32, Cursor>(),
    avx512::implementation<avx512::BF16AsFloat, Cursor>(),
    avx512::implementation<avx512::F16AsFloat, Cursor>(),
    avx512::implementation<avx512::F8AsFloat, Cursor>()};
const format::RowImplementations kAvx512ExpandDot = {
    {}, avx512::implementation<avx512::BF16Dot, Cursor>(), {}, {}};

}  // namespace lacuna::kernels::linear_bitmap
