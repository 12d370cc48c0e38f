// What the passes of one run share.
#pragma once

#include "lacuna/io/out_folder.h"
#include "lacuna/prune/gradients.h"
#include "lacuna/prune/passes.h"
#include "lacuna/prune/phase_clock.h"
#include "lacuna/prune/progress.h"
#include "lacuna/prune/statistics_folder.h"
#include "lacuna/prune/targets.h"

namespace lacuna::prune {

/// One run of prune_model(): what it is given, what is settled before its blocks are pruned (by
/// begin() and the passes over the dense model), and what it tells. Private to pipeline.cc and the
/// files that it calls.
struct Run {
  Run(const io::Checkpoint& model, const std::filesystem::path& folder, const PruneOptions& wanted,
      const PruneProgress& told)
      : checkpoint(model),
        given_out(io::folder_path(folder)),
        options(wanted),
        progress(told, given_out),
        clock(wanted.compute.device) {}
  Run(const Run&) = delete;

  const io::Checkpoint& checkpoint;
  const std::filesystem::path given_out;
  std::filesystem::path out;  ///< the same, absolute
  std::shared_ptr<const io::OutLock> lock;
  PruneOptions options;
  Progress progress;
  PhaseClock clock;

  io::DecoderSpec spec;
  std::optional<Method> method, unrefined;  ///< the second where refine_target names some weights
  std::vector<std::regex> refined;          ///< refine_target
  Passes passes;
  std::filesystem::path states_in;  ///< a folder, where memory is too small for the activations
  Targets targets;
  Calibration calibration;                     ///< may be empty
  std::optional<StatisticsFolder> statistics;  ///< of the dense model
  std::map<std::string, double> allotted;      ///< sparsities; none: all as the request says
  Gradients gradients;                         ///< by weight, until it is pruned
  PruneReport report;

  const std::vector<std::string>& targets_of(int64_t layer) const {
    return targets[static_cast<size_t>(layer)];
  }
  std::string weight_name(int64_t layer, const std::string& linear) const {
    return spec.weight_name(layer, linear);
  }
  /// Gives back the pages of a block's targets.
  void release(int64_t layer) const {
    for (const std::string& linear : targets_of(layer))
      checkpoint.release(weight_name(layer, linear));
  }
  std::string block_text(int64_t layer) const {  ///< of the progress
    return fmt::format("block {}/{}", layer + 1, spec.layers);
  }
  const std::string& warn(std::string line) {
    report.warnings.push_back(std::move(line));
    progress.log(report.warnings.back());
    return report.warnings.back();
  }
};

}  // namespace lacuna::prune
