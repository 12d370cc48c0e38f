#include "lacuna/prune/reconstruction_pass.h"

#include "lacuna/model/decoder.h"

namespace lacuna::prune {
namespace {

/// @param weight  of a sample in the progress
Training training(Run& run, const Activations& dense, const std::string& what, int64_t weight) {
  const auto stepped = [&run, what, weight](int64_t epoch, int64_t samples) {
    return run.progress.step(samples * weight, fmt::format("{}, epoch {}/{}", what, epoch + 1,
                                                           run.options.reconstruct.epochs));
  };
  return {run.options.reconstruct, run.options.compute, dense.rotary(), run.options.seed, stepped};
}

/// Few steps at a high rate do harm.
const std::string& warn_of_rise(Run& run, const std::string& what,
                                const std::vector<double>& objectives) {
  return run.warn(fmt::format(
      "{}: the reconstruction's objective rose (from {:.4f} in the first epoch to {:.4f} in the "
      "last). Give a smaller --learning-rate or more calibration.",
      what, objectives.front(), objectives.back()));
}

BlockTraining training_of(const Run& run, int64_t layer, model::Block block,
                          const Journal::Block& finished) {
  std::vector<at::Tensor> weights;
  for (const io::NamedTensor& each : finished.tensors) weights.push_back(model::wrap(each.tensor));
  return BlockTraining(std::move(block), run.targets_of(layer), weights, run.options.compute);
}

}  // namespace

Status reconstruct_block(Run& run, int64_t layer, model::Block& block, const Activations& pruned,
                         const Activations& dense, Journal::Block& finished) {
  run.clock.enter("reconstruct");
  BlockTraining trained = training_of(run, layer, block, finished);
  LACUNA_TRY(const auto objectives, train_block(trained, pruned.hidden(), dense.hidden(),
                                                training(run, dense, run.block_text(layer), 1)));
  run.progress.log(
      fmt::format("block {}: relative error of the outputs {:.5f} in the first epoch, {:.5f} in "
                  "the last",
                  layer, objectives.front(), objectives.back()));
  if (objectives.back() > objectives.front())
    finished.notes["warnings"].push_back(
        warn_of_rise(run, fmt::format("block {}", layer), objectives));
  trained.release();
  for (size_t i = 0; i < finished.tensors.size(); ++i) {
    Tensor& tensor = finished.tensors[i].tensor;
    const at::Tensor stored = trained.weights().rounded(i, model::scalar_type(tensor.dtype));
    tensor = model::unwrap(stored);
    block.linear(run.targets_of(layer)[i]).set_weight(stored.to(run.options.compute.dtype));
  }
  return {};
}

Result<std::map<std::string, Tensor>> reconstruct_model(Run& run, const Journal& journal,
                                                        const Activations& dense) {
  run.clock.enter("reconstruct");
  LACUNA_TRY(const auto ends, model::Ends::load(run.checkpoint, run.spec, run.options.compute));
  std::vector<BlockTraining> blocks;
  for (int64_t layer = 0; layer < run.spec.layers; ++layer) {
    LACUNA_TRY(model::Block block,
               model::Block::load(run.checkpoint, run.spec, layer, run.options.compute));
    LACUNA_TRY(const Journal::Block finished, journal.read(layer));
    blocks.push_back(training_of(run, layer, std::move(block), finished));
  }
  LACUNA_TRY(run.report.reconstruction,
             train_model(blocks, ends, run.calibration, dense.hidden(),
                         training(run, dense, "model", run.spec.layers)));
  if (run.report.reconstruction.back() > run.report.reconstruction.front())
    warn_of_rise(run, "model", run.report.reconstruction);
  std::map<std::string, Tensor> trained;
  for (int64_t layer = 0; layer < run.spec.layers; ++layer) {
    const BlockTraining& block = blocks[static_cast<size_t>(layer)];
    for (size_t i = 0; i < block.names().size(); ++i) {
      const std::string name = run.weight_name(layer, block.names()[i]);
      const at::ScalarType dtype = model::scalar_type(run.checkpoint.weights().at(name).dtype);
      trained[name] = model::unwrap(block.weights().rounded(i, dtype));
    }
  }
  return trained;
}

}  // namespace lacuna::prune
