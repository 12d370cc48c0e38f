// Where weights are expanded to.
#pragma once

#include "lacuna/format/compact.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {

/// One matrix of compute.dtype in a buffer that every Linear of this thread shares; it lives until
/// the next call.
at::Tensor scratch(int64_t rows, int64_t columns, const Compute& compute);
/// Writes a matrix densely into one on the CPU, all threads on it, rounding where the values have
/// another type.
void expand_into(const format::CompactMatrix& matrix, at::Tensor& out);
/// The buffer itself (undefined before the first call): whoever keeps it keeps its memory.
at::Tensor scratch_buffer();

}  // namespace lacuna::model
