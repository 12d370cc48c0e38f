// Where weights are expanded to.
#pragma once

#include "lacuna/model/torch.h"

namespace lacuna::model {

/// One matrix of compute.dtype in a buffer that every Linear of this thread shares; it lives until
/// the next call.
at::Tensor scratch(int64_t rows, int64_t columns, const Compute& compute);
/// The buffer itself (undefined before the first call): whoever keeps it keeps its memory.
at::Tensor scratch_buffer();

}  // namespace lacuna::model
