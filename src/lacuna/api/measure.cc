#include "lacuna/api/measure.h"

#include <algorithm>
#include <chrono>
#include <nlohmann/json.hpp>

#include "lacuna/bench/record.h"
#include "lacuna/core/memory.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/kernels/linear_coded/linear_coded.h"
#include "lacuna/kernels/measured.h"

namespace lacuna::api {
namespace fs = std::filesystem;
namespace {

using kernels::Problem;
using nlohmann::json;

/// Each problem once, as the table would look it up.
Result<std::vector<Problem>> problems_of_model(const fs::path& folder, const TuneJob& job) {
  LACUNA_TRY(const auto decoder, load_decoder(folder, job.choice));
  std::vector<Problem> problems;
  for (const model::Linear* linear : decoder.linears()) {
    auto problem = linear->decode_problem();
    if (!problem) continue;  // always a dense product: nothing to choose
    for (const int64_t tokens : job.tokens) {
      problem->tokens = tokens;
      const Problem standing_for = kernels::measured_as(*problem);
      if (std::find(problems.begin(), problems.end(), standing_for) == problems.end())
        problems.push_back(standing_for);
    }
  }
  if (problems.empty())
    return not_possible("{}: no layer of it runs on kernels here (GPU).", folder.string());
  return problems;
}

Result<std::vector<Problem>> problems_of(const TuneJob& job) {
  if (job.what.empty())
    return usage_error("tune: nothing to measure. Give a model folder or problems.");
  if (job.what.size() == 1 && fs::exists(job.what.front()))
    return problems_of_model(job.what.front(), job);
  std::vector<Problem> problems;
  for (const std::string& text : job.what) {
    LACUNA_TRY(auto problem, Problem::parse(text));
    problems.push_back(std::move(problem));
  }
  return problems;
}

json summary_json(const bench::Summary& summary) {
  return {{"median", summary.median}, {"p10", summary.p10}, {"p90", summary.p90}};
}

json speed_json(const bench::ModelSpeed& speed) {
  json out = {{"prefill_ms", summary_json(speed.prefill_ms)},
              {"decode_ms", summary_json(speed.decode_ms)},
              {"prefill_tokens_per_second", speed.prefill_tokens_per_second},
              {"decode_tokens_per_second", speed.decode_tokens_per_second},
              {"weight_bytes", speed.weight_bytes}};
  if (speed.prefill_linear_share >= 0) {
    out["prefill_linear_share"] = speed.prefill_linear_share;
    out["decode_linear_share"] = speed.decode_linear_share;
  }
  return out;
}

json load_json(const LoadSpeed& load) {
  return {{"seconds", load.seconds},
          {"file_bytes", load.file_bytes},
          {"gb_per_second", load.gb_per_second},
          {"memory_before_bytes", load.memory_before_bytes},
          {"peak_memory_bytes", load.peak_memory_bytes}};
}

Result<model::Decoder> timed_load(const BenchModelJob& job, LoadSpeed& load) {
  load.memory_before_bytes = peak_memory_bytes();
  const auto start = std::chrono::steady_clock::now();
  LACUNA_TRY(auto decoder, load_decoder(job.model, job.choice));
  load.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  load.peak_memory_bytes = peak_memory_bytes();
  LACUNA_TRY(const auto files, io::Checkpoint::open(job.model));
  load.file_bytes = files.total_bytes();
  load.gb_per_second = static_cast<double>(load.file_bytes) / 1e9 / load.seconds;
  return decoder;
}

}  // namespace

Result<BenchModelReport> bench_model(const BenchModelJob& job, const JobProgress& progress) {
  LoadSpeed load;
  LACUNA_TRY(const auto decoder, timed_load(job, load));
  std::vector<const model::Decoder*> decoders = {&decoder};
  std::optional<model::Decoder> against;
  if (job.against) {
    ComputeChoice same = job.choice;
    same.dtype = long_name(model::dtype_of(decoder.compute().dtype));
    LACUNA_TRY(against, load_decoder(*job.against, same));
    decoders.push_back(&*against);
  }
  LACUNA_TRY(const auto speeds, bench::time_models(
                                    decoders, job.options,
                                    [&](int64_t done, int64_t total) {
                                      if (progress.step) progress.step("repetitions", done, total);
                                    },
                                    progress.interrupted));
  BenchModelReport report{.dtype = std::string(long_name(model::dtype_of(decoder.compute().dtype))),
                          .device = decoder.compute().device.str(),
                          .load = load,
                          .model = speeds.front(),
                          .peak_memory_bytes = peak_memory_bytes()};
  if (against) {
    report.against = speeds.back();
    report.prefill_ratio = bench::summarize(
        bench::paired_ratios(report.against->prefill_samples_ms, report.model.prefill_samples_ms));
    report.decode_ratio = bench::summarize(
        bench::paired_ratios(report.against->decode_samples_ms, report.model.decode_samples_ms));
  }
  return report;
}

json to_json(const BenchModelReport& report) {
  json out = to_json(bench::Environment::here());
  out["verb"] = "bench model";
  out["dtype"] = report.dtype;
  out["device"] = report.device;
  out["load"] = load_json(report.load);
  out["speed"] = speed_json(report.model);
  out["peak_memory_bytes"] = report.peak_memory_bytes;
  if (report.against) {
    out["speed_against"] = speed_json(*report.against);
    out["prefill_ratio"] = summary_json(*report.prefill_ratio);
    out["decode_ratio"] = summary_json(*report.decode_ratio);
  }
  return out;
}

Result<TuneReport> tune(const TuneJob& job, const JobProgress& progress) {
  fs::path file;
  if (job.keep) {
    LACUNA_TRY(file, bench::tune_file());
  }
  model::set_threads(job.choice.threads);
  LACUNA_TRY(const auto problems, problems_of(job));
  TuneReport report{.file = file.string()};
  Status status;
  for (const Problem& problem : problems) {
    if (progress.step)
      progress.step("tune " + problem.text(), static_cast<int64_t>(report.tuned.size()),
                    static_cast<int64_t>(problems.size()));
    auto tuned = bench::tune(problem, job.options, progress.interrupted);
    if (!tuned.ok()) {
      status = std::move(tuned).error();
      break;
    }
    report.tuned.push_back(std::move(tuned).value());
  }
  if (job.keep && !report.tuned.empty()) {
    LACUNA_CHECK(bench::add_tuned(file, report.tuned));
    bench::use_tuned();
  }
  LACUNA_CHECK(status);
  return report;
}

json to_json(const TuneReport& report) {
  json entries = json::array();
  for (const bench::TunedProblem& tuned : report.tuned)
    entries.push_back({{"problem", tuned.problem.text()},
                       {"candidate", tuned.candidate},
                       {"order", tuned.order},
                       {"median_us", tuned.us},
                       {"gain", tuned.gain}});
  json out = to_json(bench::Environment::here());
  out["verb"] = "tune";
  out["file"] = report.file.empty() ? json() : json(report.file);
  out["tuned"] = std::move(entries);
  return out;
}

Result<OperationReport> explain_operation(const std::string& text) {
  LACUNA_TRY(const Problem problem, Problem::parse(text));
  LACUNA_TRY(const auto* operation, kernels::find_linear_operation(problem.operation));
  OperationReport report{.problem = problem.text()};
  const auto& cpu = kernels::Device::this_cpu();
  report.candidates = kernels::explain_linear(*operation, problem, cpu);
  const auto on_gpu = kernels::explain_linear(*operation, problem, kernels::Device::this_gpu());
  report.candidates.insert(report.candidates.end(), on_gpu.begin(), on_gpu.end());
  if (std::any_of(on_gpu.begin(), on_gpu.end(), [](const auto& line) { return line.chosen; }))
    return report;
  if (kernels::dtype_of(problem.values)) {
    if (auto plan = operation->plan(problem, cpu); !plan.ok())
      report.status = std::move(plan).error();
  } else if (auto plan = kernels::linear_coded::plan(problem, cpu); !plan.ok()) {
    report.status = std::move(plan).error();
  }
  return report;
}

json to_json(const OperationReport& report) {
  json candidates = json::array();
  for (const kernels::Explanation& line : report.candidates)
    candidates.push_back({{"candidate", line.candidate},
                          {"supported", static_cast<bool>(line.support)},
                          {"refusal", line.support.refusal()},
                          {"chosen", line.chosen},
                          {"note", line.note}});
  return {{"verb", "doctor"}, {"problem", report.problem}, {"candidates", std::move(candidates)}};
}

}  // namespace lacuna::api
