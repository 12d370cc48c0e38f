// What the candidates of linear_csr share: x prepared, slices split over the executor, outputs.
#pragma once

#include "lacuna/format/row_product.h"
#include "lacuna/kernels/linear_csr/cpu.h"

namespace lacuna::kernels::linear_csr {

size_t slice_product_workspace_bytes(int64_t tokens, int64_t columns);
/// linear_csr.h says what is computed.
void run_slice_product(SliceKernel kernel, const format::RowsView& rows,
                       const format::RowProduct& product, void* workspace,
                       const Executor& executor);
/// The same by definition, sums in float64.
void run_reference_slice_product(const format::RowsView& rows, const format::RowProduct& product);

}  // namespace lacuna::kernels::linear_csr
