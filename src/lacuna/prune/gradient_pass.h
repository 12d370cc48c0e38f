// Gradients that a score wants, into Run::gradients (gradients.h).
#pragma once

#include "lacuna/prune/activations.h"
#include "lacuna/prune/run.h"

namespace lacuna::prune {

/// Those of the model's loss, for all targets, if the score wants them.
Status loss_gradient_pass(Run& run);
/// Those of a block's own output. @param activations  before the block
Status regional_gradient_pass(Run& run, int64_t layer, const Activations& activations);

}  // namespace lacuna::prune
