#include "lacuna/prune/statistics_pass.h"

#include <algorithm>

#include "lacuna/model/decoder.h"
#include "lacuna/prune/about.h"
#include "lacuna/prune/statistics.h"

namespace lacuna::prune {
using nlohmann::json;
namespace {

/// Collects the distinct inputs of a block's targets: q, k and v share one, gate and up another.
class InputCollector {
 public:
  InputCollector(const std::vector<std::string>& targets, int64_t places)
      : targets_(targets), seen_(static_cast<size_t>(places)) {}

  model::LinearObserver observer(int64_t place) {
    return [this, place](std::string_view name, const at::Tensor& input) {
      const auto target = std::find(targets_.begin(), targets_.end(), name);
      if (target == targets_.end()) return;
      // Inputs are held until they are added, so that no two share an address by chance.
      Seen& seen = seen_[static_cast<size_t>(place)];
      const auto same =
          std::find_if(seen.inputs.begin(), seen.inputs.end(),
                       [&](const at::Tensor& held) { return held.data_ptr() == input.data_ptr(); });
      seen.input_of[std::string(name)] = static_cast<size_t>(same - seen.inputs.begin());
      if (same == seen.inputs.end()) seen.inputs.push_back(input);
    };
  }

  /// Adds what the observers saw, in the order of the places.
  void add(const Executor& executor) {
    for (Seen& seen : seen_) {
      if (seen.inputs.empty()) continue;
      if (sums_.empty()) {
        input_of_ = seen.input_of;
        for (const at::Tensor& input : seen.inputs)
          sums_.emplace_back(input.size(-1), input.device());
      }
      for (size_t i = 0; i < sums_.size(); ++i) sums_[i].queue(seen.inputs[i]);
      seen = {};
    }
    add_queued(sums_, executor);
  }

  /// Inputs by target; targets of one input share the object.
  InputsByTarget take() {
    std::vector<std::shared_ptr<InputStatistics>> all;
    for (GramSum& sum : sums_) all.push_back(std::make_shared<InputStatistics>(sum.take()));
    sums_.clear();
    InputsByTarget by_target;
    for (const auto& [name, index] : input_of_) by_target[name] = all[index];
    return by_target;
  }

 private:
  struct Seen {
    std::vector<at::Tensor> inputs;
    std::map<std::string, size_t> input_of;
  };
  const std::vector<std::string>& targets_;
  std::vector<Seen> seen_;
  std::map<std::string, size_t> input_of_;
  std::vector<GramSum> sums_;
};

Status collect_dense_statistics(Run& run) {
  LACUNA_TRY(const json about, about_statistics(run));
  LACUNA_TRY(StatisticsFolder folder, StatisticsFolder::create(run.options.save_statistics, about));
  LACUNA_CHECK(dense_pass(run, [&](int64_t layer, const InputsByTarget& inputs) {
    run.clock.enter("journal");
    return folder.write(layer, inputs);
  }));
  return folder.finish();
}

}  // namespace

Result<InputsByTarget> collect_inputs(Run& run, Activations& activations, const model::Block& block,
                                      const std::vector<std::string>& targets,
                                      const std::string& what, bool replace) {
  InputCollector collector(targets, activations.at_once());
  run.clock.enter("forward");
  LACUNA_CHECK(activations.run(
      block, replace, [&](int64_t place) { return collector.observer(place); },
      [&](int64_t samples) {
        run.clock.enter("statistics");
        collector.add(activations.executor());
        run.clock.enter("forward");
        return run.progress.step(samples, what);
      }));
  run.clock.enter("statistics");
  return collector.take();
}

Status dense_pass(Run& run,
                  const std::function<Status(int64_t layer, const InputsByTarget& inputs)>& visit) {
  run.progress.begin(run.passes.dense_samples());
  run.clock.enter("load");
  LACUNA_TRY(Activations activations, Activations::embed(run.checkpoint, run.spec, run.calibration,
                                                         run.options, run.states_in));
  std::vector<std::string> all;
  for (const io::LinearSpec& linear : run.spec.block_linears()) all.push_back(linear.name);
  for (int64_t layer = 0; layer < run.spec.layers; ++layer) {
    run.clock.enter("load");
    LACUNA_TRY(const auto block,
               model::Block::load(run.checkpoint, run.spec, layer, run.options.compute));
    const std::string what = fmt::format("statistics {}/{}", layer + 1, run.spec.layers);
    LACUNA_TRY(const auto inputs,
               collect_inputs(run, activations, block, all, what, /*replace=*/true));
    LACUNA_CHECK(visit(layer, inputs));
    for (const std::string& linear : all) run.checkpoint.release(run.weight_name(layer, linear));
  }
  return {};
}

Status open_statistics(Run& run) {
  const bool again = run.options.resume && StatisticsFolder::open(run.options.save_statistics).ok();
  if (!run.options.save_statistics.empty() && !again) LACUNA_CHECK(collect_dense_statistics(run));
  const std::filesystem::path& folder =
      run.options.save_statistics.empty() ? run.options.statistics : run.options.save_statistics;
  if (folder.empty()) return {};
  LACUNA_TRY(run.statistics, StatisticsFolder::open(folder));
  LACUNA_TRY(const json model, about_model(run.checkpoint));
  if (run.statistics->about().value("model", json()) != model)
    return bad_input("{}: statistics of another model. Collect them from {}.", folder.string(),
                     run.checkpoint.folder().string());
  if (run.statistics->about().value("config", json()) != run.checkpoint.config())
    return bad_input(
        "{}: statistics of these weights under another config.json. Collect them from "
        "{}.",
        folder.string(), run.checkpoint.folder().string());
  run.progress.statistics_kept = !run.options.save_statistics.empty();
  return {};
}

Result<InputsByTarget> read_inputs(const StatisticsFolder& folder, int64_t layer,
                                   at::Device device) {
  LACUNA_TRY(InputsByTarget inputs, folder.read(layer));
  for (const auto& [linear, shared] : inputs)  // what is there already stays
    for (at::Tensor* each : {&shared->gram, &shared->square_sums, &shared->sums})
      *each = each->to(device);
  return inputs;
}

}  // namespace lacuna::prune
