#include "lacuna/api/measure.h"
#include "lacuna/bench/compare.h"
#include "lacuna/bench/record.h"
#include "lacuna/cli/tool.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {
namespace {

struct Flags {
  std::vector<std::string> problems;
  std::string cases;
  bench::CompareOptions options;
  bool quick = false, compare = false;
  api::BenchModelJob model;
  std::string against;
};

Result<bool> parse_problem(const std::string& text) {
  LACUNA_CHECK(kernels::Problem::parse(text));
  return true;
}

std::string table_of(const bench::Comparison& comparison) {
  report::Table table(
      {"problem", "candidate", "us", "p10", "p90", "GB/s", "share", "weight", "GFLOP/s", "ratio"});
  for (const auto& record : comparison.records)
    table.add({record.problem, record.candidate, fmt::format("{:.1f}", record.us.median),
               fmt::format("{:.1f}", record.us.p10), fmt::format("{:.1f}", record.us.p90),
               fmt::format("{:.1f}", record.gb_per_second),
               record.share ? fmt::format("{:.0f} %", 100 * *record.share) : "-",
               report::bytes_text(static_cast<double>(record.weight_bytes)),
               fmt::format("{:.1f}", record.gflop_per_second),
               record.ratio ? fmt::format("{:.2f}", record.ratio->median) : "-"});
  std::string text = comparison.records.empty() ? "" : table.text();
  // Those that refuse for the same reason share a line.
  std::vector<bench::Untimed> refused;
  for (const auto& untimed : comparison.refused) {
    if (!refused.empty() && refused.back().problem == untimed.problem &&
        refused.back().why == untimed.why) {
      refused.back().candidate += ", " + untimed.candidate;
    } else {
      refused.push_back(untimed);
    }
  }
  for (const auto& untimed : refused)
    text += fmt::format("not run  {} {}: {}\n", untimed.problem, untimed.candidate, untimed.why);
  for (const auto& untimed : comparison.failed)
    text += fmt::format("FAILED   {} {}: {}\n", untimed.problem, untimed.candidate, untimed.why);
  if (comparison.rounds == 0) return text;
  return text +
         fmt::format(
             "streaming read {:.1f} GB/s before, {:.1f} GB/s after; {} rounds; ratio to {}\n",
             comparison.read_before, comparison.read_after, comparison.rounds,
             comparison.baseline.empty() ? "nothing" : comparison.baseline);
}

/// The groups of problems that are timed together: each alone, or with --compare all of one shape.
Result<std::vector<std::vector<kernels::Problem>>> groups_of(const Flags& flags) {
  std::vector<kernels::Problem> problems;
  for (const std::string& text : flags.problems) {
    LACUNA_TRY(auto problem, kernels::Problem::parse(text));
    problems.push_back(std::move(problem));
  }
  if (!flags.cases.empty()) {
    LACUNA_TRY(const auto cases, bench::read_cases(flags.cases));
    problems.insert(problems.end(), cases.begin(), cases.end());
  }
  for (const auto& problem : problems)
    LACUNA_CHECK(kernels::find_linear_operation(problem.operation));
  if (flags.compare) return bench::same_shapes(problems);
  std::vector<std::vector<kernels::Problem>> groups;
  for (auto& problem : problems) groups.push_back({std::move(problem)});
  return groups;
}

Status bench_problems(Tool& tool, Flags& flags) {
  LACUNA_TRY(const auto groups, groups_of(flags));
  if (flags.quick) flags.options = bench::CompareOptions::quick();
  flags.options.seed = tool.seed();
  model::set_threads(tool.compute().threads);
  const auto environment = bench::Environment::here();
  const auto progress = tool.stoppable_progress();
  if (!tool.json())
    tool.print({}, fmt::format("{}, {} threads, lacuna {}, libtorch {}\n", environment.machine,
                               environment.threads, environment.lacuna, environment.libtorch));
  std::string failed, untimed;
  for (const auto& group : groups) {
    LACUNA_TRY(const auto comparison,
               bench::compare(group, flags.options, progress.log, progress.interrupted));
    if (tool.json()) {
      for (const auto& line : to_json(comparison, environment)) tool.print(line, "");
    } else {
      tool.print({}, "\n" + table_of(comparison));
    }
    if (!comparison.failed.empty() && failed.empty())
      failed = fmt::format("{} {}: {}", comparison.failed[0].problem,
                           comparison.failed[0].candidate, comparison.failed[0].why);
    for (const std::string& asked : comparison.problems) {
      const bool timed =
          std::any_of(comparison.records.begin(), comparison.records.end(),
                      [&](const bench::Record& record) { return record.problem == asked; });
      if (!timed && untimed.empty()) untimed = asked;
    }
  }
  if (!failed.empty()) return check_failed("{}. It was not timed.", failed);
  if (!untimed.empty())
    return not_possible("{}: nothing here can compute it; the lines above say why.", untimed);
  return {};
}

std::string speed_line(const std::string& name, const bench::ModelSpeed& speed) {
  std::string line = fmt::format(
      "{}: prefill {:.1f} tokens/s, decode {:.1f} tokens/s ({:.2f} ms, p10 {:.2f}, p90 {:.2f}), "
      "weights {}\n",
      name, speed.prefill_tokens_per_second, speed.decode_tokens_per_second, speed.decode_ms.median,
      speed.decode_ms.p10, speed.decode_ms.p90,
      report::bytes_text(static_cast<double>(speed.weight_bytes)));
  if (speed.prefill_linear_share >= 0)
    line += fmt::format("  in the linear layers: {:.0f} % of prefill, {:.0f} % of decode\n",
                        100 * speed.prefill_linear_share, 100 * speed.decode_linear_share);
  return line;
}

Status bench_model(Tool& tool, Flags& flags) {
  api::BenchModelJob& job = flags.model;
  if (!flags.against.empty()) job.against = flags.against;
  job.options.seed = tool.seed();
  job.choice = tool.compute();
  LACUNA_TRY(const auto report, api::bench_model(job, tool.stoppable_progress()));
  auto json = to_json(report);
  json["model"] = job.model.string();
  json["prompt"] = job.options.prompt;
  json["tokens"] = job.options.tokens;
  json["repetitions"] = job.options.repetitions;
  std::string text = speed_line(job.model.string(), report.model);
  text += fmt::format(
      "  loaded in {:.2f} s, {:.2f} GB/s of its files; at most {} of memory ({} before)\n",
      report.load.seconds, report.load.gb_per_second,
      report::bytes_text(static_cast<double>(report.load.peak_memory_bytes)),
      report::bytes_text(static_cast<double>(report.load.memory_before_bytes)));
  if (report.against) {
    json["against"] = flags.against;
    text += speed_line(flags.against, *report.against);
    text += fmt::format("ratio (time of {} / time of {}): prefill {:.2f}, decode {:.2f}\n",
                        flags.against, job.model.string(), report.prefill_ratio->median,
                        report.decode_ratio->median);
  }
  text += fmt::format(
      "{} on {}, {} prompt tokens, {} new ones, median of {}; at most {} of memory\n", report.dtype,
      report.device, job.options.prompt, job.options.tokens, job.options.repetitions,
      report::bytes_text(static_cast<double>(report.peak_memory_bytes)));
  tool.print(json, text);
  return {};
}

}  // namespace

void add_bench(Tool& tool) {
  auto* verb = tool.verb(
      "bench", "Time kernels on one problem, each checked first, against the best dense product.",
      {"lacuna bench linear_bitmap:bf16:4096x4096x1:0.5 linear_nm:bf16:4096x4096x1:2:4 --compare",
       "lacuna bench --cases bench/cases/decode.txt --json"});
  tool.computes(verb);
  tool.seeded(verb);
  static Flags flags;
  verb->add_option("PROBLEM", flags.problems, "OPERATION:VALUES[/ACTIVATIONS]:NxKxT[:SPARSITY]")
      ->check(accepted_by(parse_problem));
  verb->add_option("--cases", flags.cases, "file of problems, one a line");
  verb->add_option("--seconds", flags.options.seconds, "of timed products, each round robin")
      ->check(above(0))
      ->capture_default_str();
  verb->add_flag("--compare", flags.compare,
                 "time all problems of one shape together, so that they compare with each other");
  verb->add_flag("--quick", flags.quick,
                 "one copy of each weight and a few products: a trial, no measurement");

  auto* model =
      verb->add_subcommand("model", "Time a whole model: reading a prompt, writing text.");
  model->fallthrough();  // --json, --threads, ... belong to the verb
  model->add_option("MODEL", flags.model.model, "model folder, dense or compact")->required();
  model->add_option("--tokens", flags.model.options.tokens, "tokens to write after the first")
      ->check(between(1))
      ->capture_default_str();
  model->add_option("--prompt", flags.model.options.prompt, "tokens to read")
      ->check(between(1))
      ->capture_default_str();
  model
      ->add_option("--repetitions", flags.model.options.repetitions,
                   "timed ones, after one that isn't")
      ->check(between(1))
      ->capture_default_str();
  model->add_flag("--profile", flags.model.options.profile,
                  "also print the share of the time that the linear layers take");
  model->add_option("--against", flags.against,
                    "another model that takes turns with MODEL; prints the ratio");
  model->footer(
      "Examples:\n  lacuna bench model models/llama-50 --against models/llama\n"
      "  lacuna bench model models/llama --prompt 512 --tokens 128 --profile");
  // Checked while parsing, so that it is a usage error before anything is made.
  verb->parse_complete_callback([verb, model] {
    const bool problems = !flags.problems.empty() || !flags.cases.empty();
    if (model->parsed() && problems)
      throw CLI::ValidationError("PROBLEM: `bench model` takes a model alone.");
    if (!model->parsed() && !problems && verb->parsed())
      throw CLI::RequiredError("PROBLEM or --cases or `model MODEL`");
  });
  tool.action(verb, [&tool, model]() -> Status {
    return model->parsed() ? bench_model(tool, flags) : bench_problems(tool, flags);
  });
}

}  // namespace lacuna::cli
