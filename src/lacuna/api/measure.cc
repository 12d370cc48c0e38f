#include "lacuna/api/measure.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>

#include "lacuna/bench/record.h"
#include "lacuna/core/clock.h"
#include "lacuna/core/memory.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/text_source.h"
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
    if (!problem) continue;  // a form that is not measured
    for (const int64_t tokens : job.tokens) {
      problem->tokens = tokens;
      const Problem standing_for = kernels::measured_as(*problem);
      if (std::find(problems.begin(), problems.end(), standing_for) == problems.end())
        problems.push_back(standing_for);
    }
  }
  if (problems.empty())
    return not_possible(
        "{}: all of its layers are held in a form that is not measured (weights that are expanded "
        "for each product). Leave --activations out, or give the model from before it was "
        "quantised.",
        folder.string());
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

Result<model::Decoder> timed_load(const fs::path& folder, const ComputeChoice& choice,
                                  LoadSpeed& load) {
  load.memory_before_bytes = peak_memory_bytes();
  const auto start = Clock::now();
  LACUNA_TRY(auto decoder, load_decoder(folder, choice));
  load.seconds = seconds_since(start);
  load.peak_memory_bytes = peak_memory_bytes();
  LACUNA_TRY(const auto files, io::Checkpoint::open(folder));
  load.file_bytes = files.total_bytes();
  load.gb_per_second = static_cast<double>(load.file_bytes) / 1e9 / load.seconds;
  return decoder;
}

/// @param load  set for a folder
Result<model::Decoder> decoder_of(const BenchModelJob::Source& source, const ComputeChoice& choice,
                                  const JobProgress& progress, std::optional<LoadSpeed>& load) {
  if (const auto* folder = std::get_if<fs::path>(&source))
    return timed_load(*folder, choice, load.emplace());
  const auto& options = std::get<model::SynthOptions>(source);
  LACUNA_TRY(const auto compute, resolve(choice, options.dtype));
  if (progress.log) progress.log(fmt::format("making {} {}", options.like, options.variant()));
  const auto start = Clock::now();
  LACUNA_TRY(const auto checkpoint, model::synth_in_memory(options));
  const double made = seconds_since(start);
  LACUNA_TRY(auto decoder, model::Decoder::load(checkpoint, compute));
  if (progress.log)
    progress.log(
        fmt::format("made in {:.1f} s, loaded in {:.1f} s", made, seconds_since(start) - made));
  return decoder;
}

/// NAME, NAME_p10 and NAME_p90.
void put(json& object, const std::string& name, const bench::Summary& summary) {
  object[name] = summary.median;
  object[name + "_p10"] = summary.p10;
  object[name + "_p90"] = summary.p90;
}

json model_json(const BenchedModel& model) {
  const bench::ModelSpeed& speed = model.speed;
  json out = {{"name", model.name},
              {"prompt_tokens_per_second", speed.prefill_tokens_per_second},
              {"tokens_per_second", speed.decode_tokens_per_second},
              {"weight_bytes", speed.weight_bytes}};
  if (model.load)
    out["load"] = {{"seconds", model.load->seconds},
                   {"file_bytes", model.load->file_bytes},
                   {"gb_per_second", model.load->gb_per_second},
                   {"memory_before_bytes", model.load->memory_before_bytes},
                   {"peak_memory_bytes", model.load->peak_memory_bytes}};
  put(out, "ttft_ms", speed.prefill_ms);
  put(out, "tpot_ms", speed.decode_ms);
  if (speed.prefill_linear_share >= 0) {
    out["prefill_linear_share"] = speed.prefill_linear_share;
    out["decode_linear_share"] = speed.decode_linear_share;
  }
  if (model.speedup_prefill) {
    put(out, "speedup_prefill", *model.speedup_prefill);
    put(out, "speedup_decode", *model.speedup_decode);
    out["memory_saving"] = *model.memory_saving;
  }
  if (model.perplexity) out["perplexity"] = *model.perplexity;
  if (model.ppl_delta) out["ppl_delta"] = *model.ppl_delta;
  return out;
}

void compare_with(const bench::ModelSpeed& baseline, BenchedModel& model) {
  const bench::ModelSpeed& speed = model.speed;
  model.speedup_prefill =
      bench::summarize(bench::paired_ratios(baseline.prefill_samples_ms, speed.prefill_samples_ms));
  model.speedup_decode =
      bench::summarize(bench::paired_ratios(baseline.decode_samples_ms, speed.decode_samples_ms));
  model.memory_saving =
      1 - static_cast<double>(speed.weight_bytes) / static_cast<double>(baseline.weight_bytes);
}

/// The token ids of the text by each model's tokenizer. Called before hours of timing, so what
/// can't be evaluated is refused by then.
Result<std::vector<std::vector<int32_t>>> ids_of_text(const BenchModelJob& job,
                                                      const std::vector<model::Decoder>& decoders) {
  LACUNA_TRY(const fs::path text, io::find_dataset(job.text, io::Split::kTest));
  std::vector<std::vector<int32_t>> all;
  for (size_t i = 0; i < decoders.size(); ++i) {
    LACUNA_TRY(const auto tokenizer, io::Tokenizer::open(std::get<fs::path>(job.models[i])));
    LACUNA_TRY(auto ids, eval::evaluation_ids(text.string(), job.evaluation.protocol, *tokenizer));
    LACUNA_CHECK(eval::check_evaluation(decoders[i].spec(), ids, job.evaluation));
    all.push_back(std::move(ids));
  }
  return all;
}

/// The perplexity of each, and how far it lies from the baseline's.
Status evaluate_all(const BenchModelJob& job, const std::vector<model::Decoder>& decoders,
                    const std::vector<std::vector<int32_t>>& ids, const JobProgress& progress,
                    std::vector<BenchedModel>& models) {
  for (size_t i = 0; i < models.size(); ++i) {
    const auto step = [&](int64_t done, int64_t total, double) {
      if (progress.step) progress.step("windows of " + models[i].name, done, total);
    };
    LACUNA_TRY(const auto report, eval::perplexity(decoders[i], ids[i], job.evaluation, nullptr,
                                                   step, progress.interrupted));
    if (!std::isfinite(report.perplexity))
      return check_failed("{}: its perplexity is no finite number. `lacuna eval` says why.",
                          models[i].name);
    models[i].perplexity = report.perplexity;
  }
  for (size_t i = 0; job.baseline && i < models.size(); ++i)
    if (i != *job.baseline)
      models[i].ppl_delta = *models[i].perplexity - *models[*job.baseline].perplexity;
  return {};
}

}  // namespace

std::string name_of(const BenchModelJob::Source& source) {
  if (const auto* folder = std::get_if<fs::path>(&source)) return folder->string();
  return std::get<model::SynthOptions>(source).variant();
}

Result<BenchModelReport> bench_model(const BenchModelJob& job, const JobProgress& progress) {
  if (job.models.empty())
    return usage_error("bench model: no model (need at least one). Give one.");
  for (const BenchModelJob::Source& source : job.models)
    if (!job.text.empty() && !std::holds_alternative<fs::path>(source))
      return usage_error("{}: random weights have no perplexity. Give folders.", name_of(source));
  std::vector<model::Decoder> decoders;
  ComputeChoice choice = job.choice;
  std::vector<std::optional<LoadSpeed>> loads(job.models.size());
  for (size_t i = 0; i < job.models.size(); ++i) {
    LACUNA_TRY(auto decoder, decoder_of(job.models[i], choice, progress, loads[i]));
    choice.dtype = long_name(model::dtype_of(decoder.compute().dtype));
    decoders.push_back(std::move(decoder));
  }
  std::vector<const model::Decoder*> all;
  for (const model::Decoder& decoder : decoders) all.push_back(&decoder);
  std::vector<std::vector<int32_t>> ids;
  if (!job.text.empty()) {
    LACUNA_TRY(ids, ids_of_text(job, decoders));
  }
  const auto step = [&](int64_t done, int64_t total) {
    if (progress.step) progress.step("repetitions", done, total);
  };
  LACUNA_TRY(const auto speeds,
             job.turns
                 ? bench::time_models_by_turns(all, job.options, *job.turns, progress.interrupted)
                 : bench::time_models(all, job.options, step, progress.interrupted));
  const model::Compute& compute = decoders.front().compute();
  BenchModelReport report{.dtype = std::string(long_name(model::dtype_of(compute.dtype))),
                          .device = compute.device.str(),
                          .peak_bytes = peak_memory_bytes()};
  if (job.baseline) report.baseline = name_of(job.models[*job.baseline]);
  for (size_t i = 0; i < speeds.size(); ++i) {
    report.models.push_back({.name = name_of(job.models[i]), .load = loads[i], .speed = speeds[i]});
    if (job.baseline && i != *job.baseline)
      compare_with(speeds[*job.baseline], report.models.back());
  }
  if (!job.text.empty()) LACUNA_CHECK(evaluate_all(job, decoders, ids, progress, report.models));
  return report;
}

json to_json(const BenchModelReport& report) {
  // The figures of the first stand at the top too: of most runs it is the one that they are about.
  json out = report.models.empty() ? json::object() : model_json(report.models.front());
  out.update(to_json(bench::Environment::here()));
  out["verb"] = "bench model";
  out["dtype"] = report.dtype;
  out["device"] = report.device;
  out["peak_bytes"] = report.peak_bytes;
  if (!report.baseline.empty()) out["baseline"] = report.baseline;
  out["models"] = json::array();
  for (const BenchedModel& model : report.models) out["models"].push_back(model_json(model));
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
  if (kernels::walked_by_rows(problem.values)) {
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
