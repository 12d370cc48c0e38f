// What goes over the blocks of a model, before and while they are pruned.
#pragma once

#include "lacuna/prune/pipeline.h"

namespace lacuna::prune {

/// The passes of one run (an allocation's, which its flag settles, is not among them), settled
/// before the first: what runs them, what progress counts
/// (progress.h) and the plan of memory (memory_plan.cc) go by this. Counts are samples through a
/// block, once each; where no samples run through the blocks, blocks.
struct Passes {
  int64_t layers = 0, samples = 0;
  /// Statistics of the dense model lie in a folder, or one pass puts them there: nothing runs
  /// through the blocks while they are pruned.
  bool on_disk = false;
  Slope slope = Slope::kNone;  ///< what the score wants of gradients; none under a mask that stays
  ReconstructOptions reconstruct;

  Passes() = default;
  /// @param wanted  Method::slope()
  Passes(const io::DecoderSpec& spec, int64_t calibration_samples, const PruneOptions& options,
         Slope wanted)
      : layers(spec.layers),
        samples(calibration_samples),
        on_disk(!options.statistics.empty() || !options.save_statistics.empty()),
        slope(options.request.keep_mask ? Slope::kNone : wanted),
        reconstruct(options.reconstruct) {}

  bool any_statistics() const { return samples > 0 || on_disk; }
  bool through_blocks() const { return samples > 0 && !on_disk; }
  bool wants_regional_gradients() const { return slope == Slope::kRegional; }  ///< of each block
  bool wants_loss_gradients() const { return slope != Slope::kNone && !wants_regional_gradients(); }

  /// Whether activations may lie in a file: training and gradients of a block go to all of them
  /// again and again.
  bool states_may_move() const { return reconstruct.none() && !wants_regional_gradients(); }

  /// One pass over the dense model: for statistics, an allocation, or gradients of the loss.
  int64_t dense_samples() const { return layers * samples; }
  /// Of a block until it is pruned: for statistics, and for its gradients.
  int64_t until_pruned() const { return (wants_regional_gradients() ? 2 : 1) * samples; }
  /// Of a block until the journal has it: also for its reconstruction.
  int64_t until_finished() const {
    return until_pruned() + (reconstruct.block ? reconstruct.epochs : 0) * samples;
  }
  /// Of all blocks: also through what is finished of each, and for a reconstruction through each
  /// as it was, then through all of them together.
  int64_t all_blocks() const {
    if (!through_blocks()) return layers;
    const int64_t dense = reconstruct.none() ? 0 : 1;
    const int64_t together = reconstruct.model ? reconstruct.epochs : 0;
    return layers * (until_finished() + (1 + dense + together) * samples);
  }
};

}  // namespace lacuna::prune
