#include "lacuna/bench/tune.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "lacuna/core/cpu.h"
#include "lacuna/core/version.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/file.h"
#include "lacuna/kernels/measured.h"

namespace lacuna::bench {
namespace fs = std::filesystem;
namespace {

using nlohmann::json;

constexpr int kFileVersion = 1;
/// A candidate must gain this much over the list's own choice to take its place.
constexpr double kLeastGain = 1.02;

/// The candidate that the order of the list takes, timed or not.
Result<std::string> first_supporting(const kernels::Problem& problem) {
  LACUNA_TRY(const auto* operation, kernels::find_linear_operation(problem.operation));
  std::string refusals;
  for (const auto& line :
       kernels::explain_linear(*operation, problem, kernels::Device::this_cpu())) {
    if (line.support) return line.candidate;
    refusals += fmt::format("{}{} {}", refusals.empty() ? "" : "; ", line.candidate,
                            line.support.refusal());
  }
  return not_possible("{}: no kernel supports this problem ({}).", problem.text(), refusals);
}

Result<TunedProblem> parse_entry(const json& entry) {
  TunedProblem tuned;
  LACUNA_TRY(tuned.problem, kernels::Problem::parse(entry.at("problem").get<std::string>()));
  tuned.candidate = entry.at("candidate").get<std::string>();
  tuned.order = entry.at("order").get<std::string>();
  tuned.us = entry.at("median_us").get<double>();
  tuned.gain = entry.at("gain").get<double>();
  tuned.threads = entry.at("threads").get<int>();
  return tuned;
}

std::string table_text(const std::vector<TunedProblem>& table, const TuneKey& key) {
  json entries = json::array();
  for (const TunedProblem& tuned : table)
    entries.push_back({{"problem", tuned.problem.text()},
                       {"candidate", tuned.candidate},
                       {"order", tuned.order},
                       {"median_us", tuned.us},
                       {"gain", tuned.gain},
                       {"threads", tuned.threads}});
  const json file = {{"lacuna_tune", kFileVersion},
                     {"cpu", key.cpu},
                     {"version", key.version},
                     {"entries", std::move(entries)}};
  return file.dump(1) + "\n";
}

}  // namespace

Result<TunedProblem> tune(const kernels::Problem& problem, const CompareOptions& options,
                          const std::atomic<bool>* interrupted) {
  LACUNA_TRY(const std::string order, first_supporting(problem));
  CompareOptions ours = options;
  ours.rivals = false;
  ours.stream_bytes = 0;
  ours.slowest = 0;  // the one that the fixed order names is timed, however slow
  LACUNA_TRY(const Comparison comparison, compare({problem}, ours, {}, interrupted));
  if (!comparison.failed.empty())
    return check_failed("{}: {}: {}. Nothing was kept; please report it.", problem.text(),
                        comparison.failed.front().candidate, comparison.failed.front().why);
  const Record *best = nullptr, *own = nullptr;
  for (const Record& record : comparison.records) {
    if (best == nullptr || record.us.median < best->us.median) best = &record;
    if (record.candidate == order) own = &record;
  }
  if (best == nullptr)
    return not_possible("{}: only the reference supports this problem; there is nothing to time.",
                        problem.text());
  TunedProblem tuned{.problem = problem, .order = order, .threads = at::get_num_threads()};
  if (own != nullptr)
    tuned.gain = summarize(paired_ratios(own->samples_us, best->samples_us)).median;
  if (own != nullptr && tuned.gain < kLeastGain) best = own, tuned.gain = 1;
  tuned.candidate = best->candidate;
  tuned.us = best->us.median;
  return tuned;
}

TuneKey TuneKey::here() { return {cpu_features().name, kVersion}; }

Result<fs::path> tune_file(const TuneKey& key) {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return fs::path(value != nullptr ? value : "");
  };
  fs::path cache = variable("XDG_CACHE_HOME");
  if (cache.empty() && !variable("HOME").empty()) cache = variable("HOME") / ".cache";
  if (cache.empty())
    return not_possible("tune: no cache folder (neither XDG_CACHE_HOME nor HOME is set). Set one.");
  const std::string text = key.cpu + "\n" + key.version;
  const auto hash = io::chunk_checksums(Bytes::take(std::vector<char>(text.begin(), text.end())));
  return cache / "lacuna" / fmt::format("tune-{}.json", hash.front());
}

Result<std::vector<TunedProblem>> read_tuned(const fs::path& file, const TuneKey& key) {
  const auto wrong = [&](const std::string& what) {
    return bad_input("{}: {}. Delete it, or run `lacuna tune` again.", file.string(), what);
  };
  LACUNA_TRY(const std::string text, io::read_text(file));
  const json table = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!table.is_object() || !table.contains("lacuna_tune")) return wrong("no measured table");
  if (table["lacuna_tune"] != kFileVersion)
    return wrong(fmt::format("unknown version of the table (got {}; need {})",
                             table["lacuna_tune"].dump(), kFileVersion));
  try {
    const TuneKey found{table.at("cpu").get<std::string>(), table.at("version").get<std::string>()};
    if (found != key)
      return wrong(fmt::format("measured elsewhere (got \"{}\", lacuna {}; need \"{}\", lacuna {})",
                               found.cpu, found.version, key.cpu, key.version));
    std::vector<TunedProblem> tuned;
    for (const json& entry : table.at("entries")) {
      auto parsed = parse_entry(entry);
      if (!parsed.ok())
        return wrong(fmt::format("entry {}: {}", tuned.size(), parsed.error().message));
      tuned.push_back(std::move(parsed).value());
    }
    return tuned;
  } catch (const json::exception& error) {
    return wrong(fmt::format("no measured table ({})", error.what()));
  }
}

Status add_tuned(const fs::path& file, const std::vector<TunedProblem>& fresh, const TuneKey& key) {
  std::vector<TunedProblem> table;
  if (auto old = read_tuned(file, key); old.ok()) table = std::move(old).value();
  for (const TunedProblem& tuned : fresh) {
    std::erase_if(table, [&](const TunedProblem& old) { return old.problem == tuned.problem; });
    table.push_back(tuned);
  }
  std::error_code failed;
  fs::create_directories(file.parent_path(), failed);
  if (failed)
    return check_failed("{}: cannot be made ({}). Set XDG_CACHE_HOME to another place.",
                        file.parent_path().string(), failed.message());
  return io::write_text(file, table_text(table, key));
}

TunedUse use_tuned() {
  TunedUse use;
  kernels::set_measured_winners({});
  const char* variable = std::getenv("LACUNA_TUNE");
  if (variable != nullptr && std::string_view(variable) == "off") {
    use.state = "off (LACUNA_TUNE)";
    return use;
  }
  use.state = "none (run `lacuna tune`)";
  const auto file = tune_file();
  if (!file.ok() || !fs::exists(*file)) return use;  // never tuned
  use.file = file->string();
  const auto tuned = read_tuned(*file);
  if (!tuned.ok()) {
    use.state = "ignored: " + tuned.error().message;
    use.remark = "the measured table is ignored: " + tuned.error().message;
    return use;
  }
  std::vector<kernels::MeasuredWinner> winners;
  for (const TunedProblem& entry : *tuned) winners.push_back({entry.problem, entry.candidate});
  kernels::set_measured_winners(winners);
  use.problems = winners.size();
  use.state = fmt::format("{} problems in {}", use.problems, use.file);
  return use;
}

}  // namespace lacuna::bench
