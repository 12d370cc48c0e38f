#include "lacuna/cli/bench_model.h"

#include <cmath>
#include <iostream>
#include <utility>

#include "lacuna/api/measure.h"
#include "lacuna/core/memory.h"
#include "lacuna/model/decode_step.h"
#include "lacuna/model/synth.h"

namespace lacuna::cli {
namespace {

namespace fs = std::filesystem;

struct Flags {
  fs::path model;
  std::string like, pattern, quantize;
  double sparsity = 0.5;
  bool turns = false;
  CLI::Option* sparsity_option = nullptr;
  std::vector<std::string> compare;
  bench::ModelSpeedOptions options;
  std::string text;
  eval::PerplexityOptions evaluation;
  bool sparsity_given() const { return sparsity_option->count() > 0; }
};
Flags flags;

/// The variant that --pattern, --sparsity and --quantize name together.
Result<std::string> variant_of() {
  model::SynthOptions options;
  const bool sparse = !flags.pattern.empty() || flags.sparsity_given();
  if (sparse) {
    LACUNA_TRY(options.pattern,
               sparse_pattern(flags.pattern.empty() ? "unstructured" : flags.pattern));
    LACUNA_TRY(options.sparsity,
               settle_sparsity(options.pattern, flags.sparsity, flags.sparsity_given()));
  }
  if (!flags.quantize.empty()) {
    LACUNA_TRY(options.quantization, format::Quantization::parse(flags.quantize));
  }
  return options.variant();
}

std::string speed_line(const api::BenchedModel& model) {
  const bench::ModelSpeed& speed = model.speed;
  std::string line = fmt::format(
      "{}: prefill {:.1f} tokens/s, decode {:.1f} tokens/s ({:.2f} ms, p10 {:.2f}, p90 {:.2f}), "
      "weights {}\n",
      model.name, speed.prefill_tokens_per_second, speed.decode_tokens_per_second,
      speed.decode_ms.median, speed.decode_ms.p10, speed.decode_ms.p90,
      bytes_text(speed.weight_bytes));
  if (speed.prefill_linear_share >= 0)
    line += fmt::format("  in the linear layers: {:.0f} % of prefill, {:.0f} % of decode\n",
                        100 * speed.prefill_linear_share, 100 * speed.decode_linear_share);
  if (model.load)
    line += fmt::format(
        "  loaded in {:.2f} s, {:.2f} GB/s of its files; at most {} of memory ({} before)\n",
        model.load->seconds, model.load->gb_per_second, bytes_text(model.load->peak_memory_bytes),
        bytes_text(model.load->memory_before_bytes));
  if (model.perplexity) line += fmt::format("  perplexity {:.4f}", *model.perplexity);
  if (model.ppl_delta) line += fmt::format(" ({:+.4f} to the baseline's)", *model.ppl_delta);
  if (model.perplexity) line += "\n";
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
Status choose_models(uint64_t seed, api::BenchModelJob& job) {
  if (flags.like.empty()) {
    job.models = {flags.model};
    for (const std::string& folder : flags.compare) job.models.emplace_back(fs::path(folder));
    if (!flags.compare.empty()) job.baseline = 1;
    return {};
  }
  const model::SynthOptions shape{.like = flags.like, .seed = seed};
  std::vector<std::string> variants = flags.compare;
  const bool one = !flags.pattern.empty() || flags.sparsity_given() || !flags.quantize.empty() ||
                   variants.empty();
  if (one) {
    LACUNA_TRY(const std::string variant, variant_of());
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

}  // namespace

CLI::App* add_bench_model(CLI::App* bench) {
  auto* model =
      bench->add_subcommand("model", "Time a whole model: reading a prompt, writing text.");
  model->add_option("MODEL", flags.model, "model folder, dense or compact");
  model
      ->add_option("--like", flags.like,
                   "instead of MODEL: random weights of this shape, made in memory")
      ->check(CLI::IsMember(model::synth_names()));
  model
      ->add_option("--pattern", flags.pattern,
                   "with --like: unstructured, KEEP:OF or block:RxC; without it dense")
      ->check(accepted_by(sparse_pattern));
  flags.sparsity_option =
      model->add_option("--sparsity", flags.sparsity, "with --like: share of zeros")
          ->check(share())
          ->capture_default_str();
  model
      ->add_option("--quantize", flags.quantize,
                   "with --like: int8, int4, fp8 (gGROUP, z behind it), as `convert` does it")
      ->check(accepted_by(format::Quantization::parse));
  model
      ->add_option("--compare", flags.compare,
                   "what takes turns with it; the first of these is the baseline: folders beside "
                   "MODEL, variants PATTERN[@SPARSITY][/CODE] beside --like")
      ->expected(1, -1);
  model
      ->add_option("--tokens,--new-tokens", flags.options.tokens, "tokens to write after the first")
      ->check(between(1))
      ->capture_default_str();
  model->add_option("--prompt,--prompt-tokens", flags.options.prompt, "tokens to read")
      ->check(between(1))
      ->capture_default_str();
  model
      ->add_option("--batch", flags.options.batch,
                   "prompts that are answered at once; tokens/s are those of all of them")
      ->check(between(1, model::DecodeStep::kMaxSequences))
      ->capture_default_str();
  model->add_option("--repetitions", flags.options.repetitions, "timed ones, after one that isn't")
      ->check(between(1))
      ->capture_default_str();
  model->add_flag("--profile", flags.options.profile,
                  "also print the share of the time that the linear layers take");
  auto* text = model->add_option(
      "--text", flags.text,
      "then measure the perplexity of each on this text or .jsonl file, or data set");
  model->add_option("--length", flags.evaluation.length, "with --text: tokens a window")
      ->needs(text)
      ->check(between(2, 1 << 20))
      ->capture_default_str();
  model
      ->add_option("--windows", flags.evaluation.windows,
                   "with --text: this many, evenly spread (0 = all)")
      ->needs(text)
      ->check(between(0))
      ->capture_default_str();
  model->add_flag("--turns", flags.turns,
                  "wait for numbers on standard input: the model (0, 1, ...) to run once next; for "
                  "programs that alternate it with others");
  model->footer(
      "The flags of `lacuna bench` hold here too: --device, --memory, --dtype, --activations, "
      "--threads, --seed, --json.\n"
      "Examples:\n  lacuna bench model models/llama-50 --compare models/llama --text "
      "wiki.test.raw\n"
      "  lacuna bench model models/llama --prompt 512 --tokens 128 --profile\n"
      "  lacuna bench model --like tinyllama-1.1b --pattern 2:4 --quantize int8\n"
      "  lacuna bench model --like tinyllama-1.1b --compare dense unstructured@0.5 2:4/int8");
  return model;
}

Status check_bench_model() {
  if (flags.model.empty() == flags.like.empty())
    return usage_error("MODEL: need one folder, or --like and no folder.");
  if (flags.like.empty()) {
    if (!flags.pattern.empty() || flags.sparsity_given() || !flags.quantize.empty())
      return usage_error("--like: --pattern, --sparsity and --quantize belong to it.");
    return {};
  }
  if (!flags.text.empty())
    return usage_error("--text: random weights predict nothing. Leave it out beside --like.");
  for (const std::string& text : flags.compare)
    if (const auto variant = model::SynthOptions().as_variant(text); !variant.ok())
      return usage_error("--compare: {}: {}", text, without_flag(variant.error().message));
  LACUNA_CHECK(variant_of());
  return {};
}

Status run_bench_model(Tool& tool) {
  api::BenchModelJob job{.options = flags.options,
                         .text = flags.text,
                         .evaluation = flags.evaluation,
                         .choice = tool.compute()};
  job.options.seed = tool.seed();
  job.choice.batch = job.options.batch;
  LACUNA_CHECK(choose_models(tool.seed(), job));
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
      job.options.repetitions, bytes_text(report.peak_bytes));
  tool.print(json, text);
  return {};
}

}  // namespace lacuna::cli
