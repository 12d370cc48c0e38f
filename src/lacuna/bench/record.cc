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

namespace {

using nlohmann::json;

/// Null where it wasn't measured.
template <class T>
json or_null(const std::optional<T>& value) {
  return value ? json(*value) : json();
}

json to_json(const Record& record) {
  json object = {{"name", record.candidate},
                 {"median_us", record.us.median},
                 {"p10_us", record.us.p10},
                 {"p90_us", record.us.p90},
                 {"gbps", record.gb_per_second},
                 {"share_of_limit", or_null(record.share)},
                 {"gflops", record.gflop_per_second},
                 {"weight_bytes", record.weight_bytes},
                 {"scratch_bytes", record.scratch_bytes},
                 {"copies", record.copies},
                 {"max_error", record.max_error}};
  const auto& ratio = record.ratio;
  object["speedup"] = ratio ? json(ratio->median) : json();
  object["speedup_p10"] = ratio ? json(ratio->p10) : json();
  object["speedup_p90"] = ratio ? json(ratio->p90) : json();
  return object;
}

json of_run(const Comparison& comparison, const Environment& environment) {
  json object = to_json(environment);
  object["verb"] = "bench";
  object["rounds"] = comparison.rounds;
  object["read_gbps"] =
      comparison.read_before > 0 ? json{comparison.read_before, comparison.read_after} : json();
  return object;
}

/// Those of `untimed` that belong to a problem or to the dense one beside it.
json reasons(const std::vector<Untimed>& untimed, const std::string& problem,
             const std::string& dense) {
  json all = json::array();
  for (const Untimed& one : untimed)
    if (one.problem == problem || one.problem == dense)
      all.push_back({{"problem", one.problem}, {"name", one.candidate}, {"why", one.why}});
  return all;
}

}  // namespace

std::vector<json> results_of(const Comparison& comparison, const Environment& environment) {
  std::vector<json> results;
  for (const kernels::Problem& asked : comparison.problems) {
    const std::string problem = asked.text(), dense = dense_problem(asked).text();
    json result = of_run(comparison, environment);
    result["problem"] = problem;
    result["dense"] = json();
    result["candidates"] = result["other_dense"] = json::array();
    for (const Record& record : comparison.records) {
      const json object = to_json(record);
      if (record.problem + " " + record.candidate == comparison.baseline)
        result["dense"] = object;
      else if (record.problem == dense && dense != problem)
        result["other_dense"].push_back(object);
      if (record.problem == problem) result["candidates"].push_back(object);
    }
    result["refused"] = reasons(comparison.refused, problem, dense);
    result["failed"] = reasons(comparison.failed, problem, dense);
    results.push_back(std::move(result));
  }
  return results;
}

std::vector<json> lines_of(const Comparison& comparison, const Environment& environment) {
  std::vector<json> lines;
  const auto add = [&](const std::string& problem, const json& object) {
    json& line = lines.emplace_back(of_run(comparison, environment));
    for (const kernels::Problem& asked : comparison.problems) line["asked"].push_back(asked.text());
    line["problem"] = problem;
    line["baseline"] = comparison.baseline.empty() ? json() : json(comparison.baseline);
    line.update(object);
  };
  for (const Record& record : comparison.records) add(record.problem, to_json(record));
  for (const auto& [list, key] :
       {std::pair{&comparison.refused, "refused"}, std::pair{&comparison.failed, "failed"}})
    for (const Untimed& one : *list) add(one.problem, {{"name", one.candidate}, {key, one.why}});
  return lines;
}

}  // namespace lacuna::bench
