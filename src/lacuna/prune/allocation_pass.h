// The sparsity of each layer, where they differ, and what the budget came to.
#pragma once

#include "lacuna/prune/run.h"

namespace lacuna::prune {

/// Settles Run::allotted, from statistics of the dense model where the allocation needs them.
Status allocation_pass(Run& run);
/// Tells what the budget came to in the finished model, and warns where that is off.
void check_budget(Run& run);

}  // namespace lacuna::prune
