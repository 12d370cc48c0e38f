#include <cmath>
#include <iostream>
#include <utility>

#include "lacuna/api/measure.h"
#include "lacuna/bench/compare.h"
#include "lacuna/bench/compare_gpu.h"
#include "lacuna/bench/record.h"
#include "lacuna/cli/tool.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/model/decode_step.h"
#include "lacuna/model/synth.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {
namespace {

namespace fs = std::filesystem;

/// Of `bench model`.
struct ModelFlags {
  fs::path model;
  std::string against, like, pattern, quantize;
  double sparsity = 0.5;
  bool sparsity_given = false, turns = false;
  std::vector<std::string> compare;
  bench::ModelSpeedOptions options;
  uint64_t seed = 0;
};

/// The variant that --pattern, --sparsity and --quantize name together.
Result<std::string> variant_of(const ModelFlags& flags) {
  model::SynthOptions options;
  const bool sparse = !flags.pattern.empty() || flags.sparsity_given;
  if (sparse) {
    LACUNA_TRY(options.pattern,
               sparse_pattern(flags.pattern.empty() ? "unstructured" : flags.pattern));
    LACUNA_TRY(options.sparsity,
               settle_sparsity(options.pattern, flags.sparsity, flags.sparsity_given));
  }
  if (!flags.quantize.empty()) {
    LACUNA_TRY(options.quantization, format::Quantization::parse(flags.quantize));
  }
  return options.variant();
}

/// Refuses flags that have no say beside the others.
Status check_flags(const ModelFlags& flags) {
  if (flags.model.empty() == flags.like.empty())
    return usage_error("MODEL: need one folder, or --like and no folder.");
  const bool of_like = !flags.pattern.empty() || flags.sparsity_given || !flags.quantize.empty() ||
                       !flags.compare.empty();
  if (flags.like.empty() && of_like)
    return usage_error(
        "--like: --pattern, --sparsity, --quantize and --compare belong to it. A folder is "
        "compared by --against.");
  if (!flags.like.empty() && !flags.against.empty())
    return usage_error("--against: names a folder. Beside --like use --compare.");
  for (const std::string& variant : flags.compare)
    LACUNA_CHECK(model::SynthOptions().as_variant(variant));
  LACUNA_CHECK(variant_of(flags));
  return {};
}

struct Flags {
  std::vector<std::string> problems;
  std::string cases;
  bench::CompareOptions options;
  bool quick = false, compare = false, all = false;
  ModelFlags model;
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
  if (comparison.read_before == 0)
    return text + fmt::format("{} rounds; ratio to {}\n", comparison.rounds, comparison.baseline);
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
  if (flags.all) flags.options.slowest = 0;
  flags.options.seed = tool.seed();
  // The CPU unless a GPU is asked for by name.
  auto choice = tool.compute();
  if (choice.device == "auto") choice.device = "cpu";
  LACUNA_TRY(const auto compute, api::resolve(choice, DType::kBF16));
  const bool on_gpu = compute.device.is_cuda();
  auto environment = bench::Environment::here();
  if (on_gpu) environment.machine = kernels::Device::this_gpu().gpu->name;
  const auto progress = tool.stoppable_progress();
  if (!tool.json())
    tool.print({}, fmt::format("{}, {} threads, lacuna {}, libtorch {}\n", environment.machine,
                               environment.threads, environment.lacuna, environment.libtorch));
  std::string failed, untimed;
  for (const auto& group : groups) {
    LACUNA_TRY(const auto comparison,
               on_gpu ? bench::compare_on_gpu(group, flags.options, compute, progress.log,
                                              progress.interrupted)
                      : bench::compare(group, flags.options, progress.log, progress.interrupted));
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

std::string speed_line(const api::BenchedModel& model) {
  const bench::ModelSpeed& speed = model.speed;
  std::string line = fmt::format(
      "{}: prefill {:.1f} tokens/s, decode {:.1f} tokens/s ({:.2f} ms, p10 {:.2f}, p90 {:.2f}), "
      "weights {}\n",
      model.name, speed.prefill_tokens_per_second, speed.decode_tokens_per_second,
      speed.decode_ms.median, speed.decode_ms.p10, speed.decode_ms.p90,
      report::bytes_text(static_cast<double>(speed.weight_bytes)));
  if (speed.prefill_linear_share >= 0)
    line += fmt::format("  in the linear layers: {:.0f} % of prefill, {:.0f} % of decode\n",
                        100 * speed.prefill_linear_share, 100 * speed.decode_linear_share);
  if (model.load)
    line += fmt::format(
        "  loaded in {:.2f} s, {:.2f} GB/s of its files; at most {} of memory ({} before)\n",
        model.load->seconds, model.load->gb_per_second,
        report::bytes_text(static_cast<double>(model.load->peak_memory_bytes)),
        report::bytes_text(static_cast<double>(model.load->memory_before_bytes)));
  return line;
}

std::string comparison_line(const std::string& baseline, const api::BenchedModel& model) {
  return fmt::format(
      "ratio (time of {} / time of {}): prefill {:.2f}, decode {:.2f} ({:.2f} to {:.2f}); {:.0f} % "
      "{} memory for weights\n",
      baseline, model.name, model.speedup_prefill->median, model.speedup_decode->median,
      model.speedup_decode->p10, model.speedup_decode->p90, 100 * std::abs(*model.memory_saving),
      *model.memory_saving < 0 ? "more" : "less");
}

/// The models that the flags name, in the order in which they are reported.
Status choose_models(const ModelFlags& flags, api::BenchModelJob& job) {
  if (flags.like.empty()) {
    job.models = {flags.model};
    if (!flags.against.empty()) job.models.emplace_back(fs::path(flags.against));
    if (!flags.against.empty()) job.baseline = 1;
    return {};
  }
  const model::SynthOptions shape{.like = flags.like, .seed = flags.seed};
  std::vector<std::string> variants = flags.compare;
  const bool one = !flags.pattern.empty() || !flags.quantize.empty() || variants.empty();
  if (one) {
    LACUNA_TRY(const std::string variant, variant_of(flags));
    variants.insert(variants.begin(), variant);
  }
  for (const std::string& text : variants) {
    LACUNA_TRY(auto options, shape.as_variant(text));
    job.models.emplace_back(std::move(options));
  }
  if (!flags.compare.empty()) job.baseline = one ? 1 : 0;
  return {};
}

/// Turns by number from standard input, a line each; what a turn took goes to standard output.
bench::ModelTurns turns_of(Tool& tool, const api::BenchModelJob& job) {
  nlohmann::json names = nlohmann::json::array();
  for (const auto& source : job.models) names.push_back(api::name_of(source));
  bench::ModelTurns turns;
  turns.next = [&tool, greeting = nlohmann::json{{"ready", std::move(names)}},
                greeted = false]() mutable -> std::optional<size_t> {
    if (!std::exchange(greeted, true)) tool.print(greeting, greeting.dump() + "\n");
    size_t model = 0;
    return std::cin >> model ? std::optional(model) : std::nullopt;
  };
  turns.done = [&tool](size_t model, const bench::ModelTurn& turn) {
    const nlohmann::json line = {
        {"model", model}, {"ttft_ms", turn.prefill_ms}, {"tpot_ms", turn.decode_ms}};
    tool.print(line, line.dump() + "\n");
  };
  return turns;
}

Status bench_model(Tool& tool, ModelFlags& flags) {
  flags.seed = tool.seed();
  api::BenchModelJob job{.options = flags.options, .choice = tool.compute()};
  job.options.seed = tool.seed();
  job.choice.batch = job.options.batch;
  LACUNA_CHECK(choose_models(flags, job));
  if (flags.turns) job.turns = turns_of(tool, job);
  LACUNA_TRY(const auto report, api::bench_model(job, tool.stoppable_progress()));
  auto json = to_json(report);
  if (!flags.like.empty()) json["like"] = flags.like;
  json["prompt"] = job.options.prompt;
  json["batch"] = job.options.batch;
  json["tokens"] = job.options.tokens;
  json["repetitions"] = job.options.repetitions;
  std::string text;
  for (const auto& model : report.models) text += speed_line(model);
  for (const auto& model : report.models)
    if (model.speedup_decode) text += comparison_line(report.baseline, model);
  text += fmt::format(
      "{} on {}, prompts: {} of {} tokens, {} new ones, median of {}; at most {} of memory\n",
      report.dtype, report.device, job.options.batch, job.options.prompt, job.options.tokens,
      job.options.repetitions, report::bytes_text(static_cast<double>(report.peak_bytes)));
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
  verb->add_flag(
      "--all", flags.all,
      "time those too that are 8 times as slow as the fastest (they are checked anyway)");
  verb->add_flag("--quick", flags.quick,
                 "one copy of each weight and a few products: a trial, no measurement");

  auto* model =
      verb->add_subcommand("model", "Time a whole model: reading a prompt, writing text.");
  model->fallthrough();  // --json, --threads, ... belong to the verb
  static ModelFlags& of_model = flags.model;
  model->add_option("MODEL", of_model.model, "model folder, dense or compact");
  model
      ->add_option("--like", of_model.like,
                   "instead of MODEL: random weights of this shape, made in memory")
      ->check(CLI::IsMember(model::synth_names()));
  model
      ->add_option("--pattern", of_model.pattern,
                   "with --like: unstructured, KEEP:OF or block:RxC; without it dense")
      ->check(accepted_by(sparse_pattern));
  auto* sparsity = model->add_option("--sparsity", of_model.sparsity, "with --like: share of zeros")
                       ->check(between(0, 1))
                       ->capture_default_str();
  model
      ->add_option("--quantize", of_model.quantize,
                   "with --like: int8, int4, fp8 (gGROUP, z behind it), as `convert` does it")
      ->check(accepted_by(format::Quantization::parse));
  model
      ->add_option("--compare", of_model.compare,
                   "with --like: variants PATTERN[@SPARSITY][/CODE] that take turns, compared with "
                   "the first of them")
      ->expected(1, -1);
  model->add_option("--tokens", of_model.options.tokens, "tokens to write after the first")
      ->check(between(1))
      ->capture_default_str();
  model->add_option("--prompt", of_model.options.prompt, "tokens to read")
      ->check(between(1))
      ->capture_default_str();
  model
      ->add_option("--batch", of_model.options.batch,
                   "prompts that are answered at once; tokens/s are those of all of them")
      ->check(between(1, model::DecodeStep::kMaxSequences))
      ->capture_default_str();
  model
      ->add_option("--repetitions", of_model.options.repetitions,
                   "timed ones, after one that isn't")
      ->check(between(1))
      ->capture_default_str();
  model->add_flag("--profile", of_model.options.profile,
                  "also print the share of the time that the linear layers take");
  model->add_option("--against", of_model.against,
                    "another model that takes turns with MODEL; prints the ratio");
  model->add_flag("--turns", of_model.turns,
                  "wait for numbers on standard input: the model (0, 1, ...) to run once next; for "
                  "programs that alternate it with others");
  model->footer(
      "Examples:\n  lacuna bench model models/llama-50 --against models/llama\n"
      "  lacuna bench model models/llama --prompt 512 --tokens 128 --profile\n"
      "  lacuna bench model --like tinyllama-1.1b --pattern 2:4 --quantize int8\n"
      "  lacuna bench model --like tinyllama-1.1b --compare dense unstructured@0.5 2:4/int8");
  // Checked while parsing, so that it is a usage error before anything is made.
  verb->parse_complete_callback([verb, model, sparsity] {
    const bool problems = !flags.problems.empty() || !flags.cases.empty();
    if (model->parsed() && problems)
      throw CLI::ValidationError("PROBLEM: `bench model` takes a model alone.");
    if (!model->parsed() && !problems && verb->parsed())
      throw CLI::RequiredError("PROBLEM or --cases or `model MODEL`");
    of_model.sparsity_given = sparsity->count() > 0;
    if (!model->parsed()) return;
    if (const Status status = check_flags(of_model); !status.ok())
      throw CLI::ValidationError(status.error().message);
  });
  tool.action(verb, [&tool, model]() -> Status {
    return model->parsed() ? bench_model(tool, flags.model) : bench_problems(tool, flags);
  });
}

}  // namespace lacuna::cli
