// Registers of four floats, as every x86-64 and ARMv8 has them: 8 of sums, two of x, one of
// weights, of 16.
#include "lacuna/kernels/tiled/float_lanes.h"

namespace lacuna::kernels::tiled {
namespace {

struct Shape {
  static constexpr int kLanes = 4, kRows = 4, kVectors = 2;
  static format::ExpandRow two_bytes() { return format::row_expanders().back().two_bytes; }
  static format::ExpandRow four_bytes() { return format::row_expanders().back().four_bytes; }
};

}  // namespace

void run_portable(const format::RowsView& rows, const format::RowProduct& product, void* workspace,
                  const Executor& executor) {
  run_float<Shape>(rows, product, workspace, executor);
}

}  // namespace lacuna::kernels::tiled
