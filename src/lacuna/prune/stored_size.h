// How large a model will be on disk, before it is pruned.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"
#include "lacuna/io/checkpoint.h"

namespace lacuna::prune {

/// Bytes of a weight's parts in the compact store, of an unstructured or a block pattern; of blocks
/// as many as the kept weights come to.
double compact_bytes(const format::Pattern& pattern, int64_t rows, int64_t columns, DType values,
                     int64_t kept);

/// Bytes of everything else in the finished safetensors files: the weights that stay as they are,
/// and the header (one file's; a further shard adds some 100 bytes).
/// @param pruned  names of the weights that become compact @errors as io::safetensors_header()
Result<double> other_bytes(const io::Checkpoint& checkpoint, const std::vector<std::string>& pruned,
                           const format::Pattern& pattern);

}  // namespace lacuna::prune
