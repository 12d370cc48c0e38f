// Matrices one below the other.
#pragma once

#include <optional>
#include <vector>

#include "lacuna/core/executor.h"
#include "lacuna/format/compact.h"

namespace lacuna::format {

/// The rows of all parts, in order, as one matrix whose large members lie in large pages
/// (core/large_block.h); of one part a copy there. Nothing where the parts can't be one: another
/// pattern, number of columns, type or quantization, or a part that ends inside a group of rows
/// which share an offset (64 of an unstructured matrix, R of block:RxC) and isn't the last.
/// @param parts  at least one, all sound
std::optional<CompactMatrix> stack_rows(const std::vector<CompactMatrix>& parts,
                                        const Executor& executor = Executor::serial());

}  // namespace lacuna::format
