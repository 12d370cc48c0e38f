// AVX2: 12 registers of sums, two of x, one of weights, of 16.
#include "lacuna/kernels/tiled/float_lanes.h"

namespace lacuna::kernels::tiled {
namespace {

struct Shape {
  static constexpr int kLanes = 8, kRows = 6, kVectors = 2;
  static constexpr format::ExpandRow two_bytes() { return format::expand_row_u16_avx2; }
  static constexpr format::ExpandRow four_bytes() { return format::expand_row_u32_avx2; }
};

}  // namespace

void run_avx2_fma(const format::RowsView& rows, const format::RowProduct& product, void* workspace,
                  const Executor& executor) {
  run_float<Shape>(rows, product, workspace, executor);
}

}  // namespace lacuna::kernels::tiled
