#include "lacuna/bench/record.h"

#include <ATen/Parallel.h>
#include <torch/version.h>

#include <nlohmann/json.hpp>

#include "lacuna/bench/commit.h"
#include "lacuna/core/cpu.h"
#include "lacuna/core/version.h"

namespace lacuna::bench {

Environment Environment::here() {
  return {cpu_features().name, at::get_num_threads(), kVersion, TORCH_VERSION, built_from()};
}

nlohmann::json to_json(const Environment& environment) {
  return {{"machine", environment.machine},
          {"threads", environment.threads},
          {"commit", environment.commit},
          {"versions", {{"lacuna", environment.lacuna}, {"libtorch", environment.libtorch}}}};
}

std::vector<nlohmann::json> to_json(const Comparison& comparison, const Environment& environment) {
  std::vector<nlohmann::json> lines;
  const auto line = [&](const std::string& problem, const std::string& candidate) {
    nlohmann::json object = to_json(environment);
    object["verb"] = "bench";
    object["asked"] = comparison.problems;
    object["problem"] = problem;
    object["candidate"] = candidate;
    return object;
  };
  for (const Record& record : comparison.records) {
    nlohmann::json object = line(record.problem, record.candidate);
    object["median_us"] = record.us.median;
    object["p10_us"] = record.us.p10;
    object["p90_us"] = record.us.p90;
    object["rounds"] = comparison.rounds;
    object["copies"] = record.copies;
    object["weight_bytes"] = record.weight_bytes;
    object["scratch_bytes"] = record.scratch_bytes;
    object["flops"] = record.flops;
    object["gb_per_second"] = record.gb_per_second;
    object["gflop_per_second"] = record.gflop_per_second;
    object["read_gb_per_second"] = {comparison.read_before, comparison.read_after};
    object["share"] = record.share ? nlohmann::json(*record.share) : nlohmann::json();
    object["ratio"] = record.ratio ? nlohmann::json(record.ratio->median) : nlohmann::json();
    object["ratio_p10"] = record.ratio ? nlohmann::json(record.ratio->p10) : nlohmann::json();
    object["ratio_p90"] = record.ratio ? nlohmann::json(record.ratio->p90) : nlohmann::json();
    object["baseline"] =
        comparison.baseline.empty() ? nlohmann::json() : nlohmann::json(comparison.baseline);
    lines.push_back(std::move(object));
  }
  for (const auto& [list, key] :
       {std::pair{&comparison.refused, "refused"}, std::pair{&comparison.failed, "failed"}})
    for (const Untimed& untimed : *list) {
      lines.push_back(line(untimed.problem, untimed.candidate));
      lines.back()[key] = untimed.why;
    }
  return lines;
}

}  // namespace lacuna::bench
