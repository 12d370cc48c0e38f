// AVX-512: 24 registers of sums, two of x, one of weights, of 32.
#include "lacuna/kernels/tiled/float_lanes.h"

namespace lacuna::kernels::tiled {
namespace {

struct Shape {
  static constexpr int kLanes = 16, kRows = 12, kVectors = 2;
  static constexpr format::ExpandRow two_bytes() { return format::expand_row_u16_avx512; }
  static constexpr format::ExpandRow four_bytes() { return format::expand_row_u32_avx512; }
};

}  // namespace

void run_avx512_fma(const format::RowsView& rows, const format::RowProduct& product,
                    void* workspace, const Executor& executor) {
  run_float<Shape>(rows, product, workspace, executor);
}

}  // namespace lacuna::kernels::tiled
