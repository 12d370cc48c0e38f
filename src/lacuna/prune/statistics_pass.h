// Statistics of the inputs of a model's Linears: collected while samples run, or read from a
// folder.
#pragma once

#include "lacuna/prune/activations.h"
#include "lacuna/prune/run.h"

namespace lacuna::prune {

/// Runs all samples through a block, and sums up the inputs of some of its Linears.
Result<InputsByTarget> collect_inputs(Run& run, Activations& activations, const model::Block& block,
                                      const std::vector<std::string>& targets,
                                      const std::string& what, bool replace);
/// Runs the calibration once through the dense blocks; `visit` gets the inputs of each, which are
/// those that the dense blocks before it gave.
Status dense_pass(Run& run,
                  const std::function<Status(int64_t layer, const InputsByTarget& inputs)>& visit);
/// Opens the statistics of the dense model, if they are asked for, after they are collected, if
/// that is asked for. @errors kBadInput: they are of another model
Status open_statistics(Run& run);
/// Of one block, from a folder to where the weights are.
Result<InputsByTarget> read_inputs(const StatisticsFolder& folder, int64_t layer,
                                   at::Device device);

}  // namespace lacuna::prune
