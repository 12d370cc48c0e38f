// One Linear from the checkpoint through its method into the journal's block.
#pragma once

#include "lacuna/prune/journal.h"
#include "lacuna/prune/run.h"

namespace lacuna::prune {

/// Compiles PruneOptions::refine_target, and makes the method of what it doesn't name.
Status choose_refined(Run& run);
/// @param inputs  its statistics; null: none  @param finished  gets the weight and its notes
/// @return the pruned weight in the dtype of the file
Result<at::Tensor> prune_linear(Run& run, const std::string& name, InputStatistics* inputs,
                                Journal::Block& finished);

}  // namespace lacuna::prune
