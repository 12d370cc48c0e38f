// The trainings of pruned weights (reconstruct.h) as passes of a run.
#pragma once

#include "lacuna/prune/activations.h"
#include "lacuna/prune/journal.h"
#include "lacuna/prune/run.h"

namespace lacuna::prune {

/// Trains what is finished of a block, and puts it into the block.
/// @param pruned, dense  what the pruned blocks before it give, and what the dense block gives
Status reconstruct_block(Run& run, int64_t layer, model::Block& block, const Activations& pruned,
                         const Activations& dense, Journal::Block& finished);
/// Trains all blocks of the journal together.
/// @param dense  after the dense model's last block
/// @return weights by name, in place of the journal's
Result<std::map<std::string, Tensor>> reconstruct_model(Run& run, const Journal& journal,
                                                        const Activations& dense);

}  // namespace lacuna::prune
