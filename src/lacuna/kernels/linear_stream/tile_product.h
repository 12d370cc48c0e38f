// What the candidates of linear_stream share: x prepared, tiles split over the executor, outputs.
#pragma once

#include "lacuna/format/row_product.h"
#include "lacuna/kernels/linear_stream/cpu.h"

namespace lacuna::kernels::linear_stream {

size_t tile_product_workspace_bytes(int64_t tokens, int64_t columns);
/// linear_stream.h says what is computed.
void run_tile_product(const TileKernels& kernels, const format::RowsView& rows,
                      const format::RowProduct& product, void* workspace, const Executor& executor);
/// The same by definition, sums in float64.
void run_reference_tile_product(const format::RowsView& rows, const format::RowProduct& product);

}  // namespace lacuna::kernels::linear_stream
