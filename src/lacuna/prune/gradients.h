// Gradients of a dense model's weights, by autograd, one block at a time: memory holds a block's
// graph and the inputs of the blocks, never the graph of the model.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <map>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/model/decoder.h"
#include "lacuna/prune/calibration.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

/// float32 [out, in] by the names of weights; regional ones by the names of a block's Linears.
using Gradients = std::map<std::string, at::Tensor>;
/// Tells how many sequences more are done; an error ends the work.
using CountSequences = std::function<Status(int64_t sequences)>;

/// What of a block's weights the gradients are asked of, and how they run.
struct GradientPlan {
  Slope slope = Slope::kNone;
  model::Compute compute;
  int64_t at_once = 1;  ///< sequences, each on one thread; the bits don't depend on it
  int64_t group = 1;    ///< sequences whose blocks' inputs are held together (loss_gradients())
  uint64_t bytes = 0;   ///< that all of it takes at most beside what is returned
  /// @param working_bytes  bounds what sequences hold together, where one alone takes less
  GradientPlan(Slope slope, const io::DecoderSpec& spec, int64_t samples, int64_t length,
               const model::Compute& compute, uint64_t working_bytes);
};

/// Slope::kMean or kMeanSquare of each sequence's loss: the mean over its next tokens of their
/// cross entropy. Sequences go through the model in groups; the inputs of every block are kept,
/// then each block, from the last to the first, runs again with a graph and turns the gradient of
/// its outputs into those of its weights and its inputs.
/// @param targets  names of Linears by block
/// @errors kUsage: an embedding or output matrix of codes, which has no gradient to pass on
/// @cost four forward passes @determinism the same bits for any number of threads and any group
Result<Gradients> loss_gradients(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                                 const Calibration& calibration,
                                 const std::vector<std::vector<std::string>>& targets,
                                 const GradientPlan& plan, const CountSequences& count);

/// Slope::kRegional of one block: of |f(x)|_2 for each sequence's output f(x) [T, hidden].
/// @param hidden  the block's inputs [sequences, T, hidden]
/// @param block   its Linears hold plain copies of their weights afterwards
/// @cost three forward passes of the block @determinism as loss_gradients()
Result<Gradients> regional_gradients(model::Block& block, const std::vector<std::string>& targets,
                                     const model::Rotary& rotary, const at::Tensor& hidden,
                                     const GradientPlan& plan, const CountSequences& count);

}  // namespace lacuna::prune
