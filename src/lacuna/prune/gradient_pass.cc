#include "lacuna/prune/gradient_pass.h"

#include "lacuna/model/decoder.h"

namespace lacuna::prune {
namespace {

GradientPlan plan_of(const Run& run) {
  return {run.passes.slope,          run.spec,
          run.calibration.samples(), run.calibration.length(),
          run.options.compute,       run.options.working_bytes};
}

}  // namespace

Status loss_gradient_pass(Run& run) {
  if (!run.passes.wants_loss_gradients()) return {};
  run.clock.enter("gradients");
  run.progress.begin(run.passes.dense_samples());
  LACUNA_TRY(run.gradients, loss_gradients(run.checkpoint, run.spec, run.calibration, run.targets,
                                           plan_of(run), run.progress.counter("gradients")));
  return {};
}

Status regional_gradient_pass(Run& run, int64_t layer, const Activations& activations) {
  run.clock.enter("gradients");
  // Of a block of its own: a graph changes how weights are held, and with that the bits of what
  // comes after.
  LACUNA_TRY(auto block, model::Block::load(run.checkpoint, run.spec, layer, run.options.compute));
  LACUNA_TRY(Gradients found, regional_gradients(block, run.targets_of(layer), activations.rotary(),
                                                 activations.hidden(), plan_of(run),
                                                 run.progress.counter(run.block_text(layer))));
  for (auto& [linear, gradient] : found)
    run.gradients[run.weight_name(layer, linear)] = std::move(gradient);
  return {};
}

}  // namespace lacuna::prune
