// Random weight matrices with zeros by a pattern, for models and benchmarks of known shapes.
#pragma once

#include <cstdint>

#include "lacuna/core/bytes.h"
#include "lacuna/format/pattern.h"

namespace lacuna::model {

/// W [rows, columns], normal with deviation 0.02, with zeros by the pattern (dense: none). Counts
/// are exact: every row (unstructured), group (keep:of) or row of blocks keeps the same number,
/// each choice equally likely. The same (seed, stream) gives the same bytes on any number of
/// threads.
/// @param dtype  f32, bf16 or f16
Tensor random_weight(int64_t rows, int64_t columns, DType dtype, const format::Pattern& pattern,
                     double sparsity, uint64_t seed, uint64_t stream);

}  // namespace lacuna::model
