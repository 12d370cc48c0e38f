// The stages that come with the library.
#pragma once

#include "lacuna/prune/stages.h"

namespace lacuna::prune {

const Score& magnitude_score();
const Score& wanda_score();
const Score& ria_score();
const Score& hessian_score();
const Score& gradient_score();
const Score& fisher_score();
const Score& regional_score();

const Solver& no_solver();
const Solver& sparsegpt_solver();
const Solver& alps_solver();
const Solver& exact_solver();

const Refinement& swaps_refinement();
const Refinement& polish_refinement();
const Refinement& dsnot_refinement();

/// At least one of the names' stages needs these; each does it once an input.
Status prepare_factor(InputStatistics& statistics, const Request& request);
Status prepare_damped(InputStatistics& statistics, const Request& request);

}  // namespace lacuna::prune
