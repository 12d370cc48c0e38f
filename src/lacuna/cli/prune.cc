#include <fmt/ranges.h>

#include <algorithm>
#include <regex>

#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"
#include "lacuna/prune/budget.h"
#include "lacuna/report/json.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {
namespace {

struct Flags {
  api::PruneJob job;
  std::string pattern = "unstructured", quantize, store = "compact", allocate, budget;
  std::vector<std::string> groups, reconstruct;
  std::string memory;
  std::string coding = "gptq";
  double sparsity = 0.5;
  bool zero_points = false;
};

/// What --pattern takes: a pattern, or "2:4+dense", which is stored as unstructured.
struct PrunePattern {
  format::Pattern stored, rest;
  static Result<PrunePattern> parse(const std::string& text) {
    constexpr std::string_view kBeside = "+dense";
    PrunePattern pattern{format::Pattern::unstructured(), {}};
    if (!text.ends_with(kBeside)) {
      LACUNA_TRY(pattern.stored, sparse_pattern(text));
      return pattern;
    }
    LACUNA_TRY(pattern.rest, sparse_pattern(text.substr(0, text.size() - kBeside.size())));
    if (pattern.rest.kind != format::PatternKind::kKeepOf)
      return usage_error("--pattern: dense columns go with KEEP:OF alone (got {}).", text);
    return pattern;
  }
};

/// --group says two things: what competes for being kept, by name, and how many columns share a
/// scale, by number.
Status settle_groups(const Flags& flags, prune::Request& request) {
  int64_t columns = 0;
  bool named = false;
  for (const std::string& group : flags.groups) {
    const bool by_name = group.find_first_not_of("0123456789") != std::string::npos;
    if (by_name ? named : columns > 0)
      return usage_error("--group: got two of a kind ({}). Leave one out.",
                         fmt::join(flags.groups, ", "));
    named |= by_name;
    if (by_name) {
      LACUNA_TRY(request.group, prune::parse_group(group));
    } else {
      columns = std::stoll(group);
    }
  }
  if (flags.quantize.empty()) {
    if (columns > 0)
      return usage_error(
          "--group: {} columns that share a scale need --quantize. What competes is row, layer or "
          "block128.",
          columns);
    if (flags.zero_points) return usage_error("--zero-points: need --quantize int4.");
    if (request.keep_mask) return usage_error("--keep-mask: nothing to do without --quantize.");
    if (flags.job.options.keep_head)
      return usage_error(
          "--keep-head: embedding and output matrix stay as they are without "
          "--quantize. Leave it out.");
    return {};
  }
  LACUNA_TRY(request.coding, prune::parse_coding(flags.coding));
  LACUNA_TRY(request.quantization, parse_codes(flags.quantize, columns, flags.zero_points));
  return {};
}

/// --allocate and --budget; with a budget alone, layers are weighed by their curves.
Status settle_allocation(Flags& flags, bool sparsity_given) {
  prune::AllocationOptions& allocation = flags.job.options.allocation;
  if (!flags.budget.empty()) {
    LACUNA_TRY(allocation.budget, prune::Budget::parse(flags.budget));
    if (sparsity_given)
      return usage_error("--sparsity: the budget settles it (got {}). Leave --sparsity out.",
                         flags.budget);
  }
  const std::string by = flags.budget.empty() ? "uniform" : "curves";
  LACUNA_TRY(allocation.by, prune::parse_allocation(flags.allocate.empty() ? by : flags.allocate));
  // Times are known when the model is open.
  if (allocation.budget && allocation.budget->kind == prune::Budget::Kind::kMilliseconds) return {};
  return prune::check_allocation(allocation, flags.job.options.request, flags.job.options.store);
}

Result<uint64_t> parse_memory(const std::string& text) {
  if (const auto bytes = parse_bytes(text)) return *bytes;
  return usage_error("--memory: not an amount of memory (got {}; need one like 12GB, 1.5GiB).",
                     text);
}

/// What CLI11 can't check flag by flag. `given`: --sparsity was on the command line.
Status settle(Flags& flags, bool given) {
  prune::Request& request = flags.job.options.request;
  LACUNA_TRY(const auto pattern, PrunePattern::parse(flags.pattern));
  request.pattern = pattern.stored;
  request.rest = pattern.rest;
  LACUNA_TRY(request.sparsity, settle_sparsity(request.pattern, flags.sparsity, given));
  if (request.rest.kind != format::PatternKind::kDense && !given)
    return usage_error(
        "--pattern {}: how many columns stay dense follows from --sparsity. Give it.",
        flags.pattern);
  LACUNA_CHECK(settle_groups(flags, request));
  if (request.keep_mask && (given || flags.pattern != "unstructured"))
    return usage_error("--keep-mask: the mask stays as it is. Leave --sparsity and --pattern out.");
  LACUNA_CHECK(prune::check_pattern(request));
  LACUNA_TRY(flags.job.options.store, api::parse_store(flags.store));
  LACUNA_CHECK(settle_allocation(flags, given));
  for (const std::string& objective : flags.reconstruct)
    LACUNA_CHECK(prune::add_reconstruction(objective, flags.job.options.reconstruct));
  LACUNA_CHECK(prune::method_of(flags.job.options));
  if (!flags.memory.empty()) {
    LACUNA_TRY(flags.job.options.memory, parse_memory(flags.memory));
  }
  return {};
}

Result<bool> parse_regex(const std::string& text) {
  try {
    (void)std::regex(text);
    return true;
  } catch (const std::regex_error& error) {
    return usage_error("not a regular expression (got \"{}\": {}).", text, error.what());
  }
}

std::string layer_table(const prune::PruneReport& report) {
  report::Table table({"layer", "sparsity", "error", "damping", "iterations", "seconds"});
  for (const auto& layer : report.layers)
    table.add({layer.name, fmt::format("{:.4f}", layer.sparsity),
               layer.error < 0 ? "-" : fmt::format("{:.4f}", layer.error),
               fmt::format("{:g}", layer.damping),
               layer.iterations == 0 ? "-" : fmt::format("{}", layer.iterations),
               fmt::format("{:.2f}", layer.seconds)});
  return table.text();
}

/// "forward 12.3 s, statistics 4.5 s, ...": what the time went to.
std::string phase_line(const prune::PruneReport& report) {
  std::vector<std::string> parts;
  for (const auto& [phase, seconds] : report.phases)
    parts.push_back(fmt::format("{} {:.1f} s", phase, seconds));
  return fmt::format("{}\n", fmt::join(parts, ", "));
}

/// "57.3 iterations a layer, 0 of 56 layers fell back"; nothing where no solver iterated or fell
/// back.
std::string solver_line(const prune::PruneReport& report) {
  int64_t iterations = 0, fallen = 0;
  for (const auto& layer : report.layers) {
    iterations += layer.iterations;
    fallen += layer.fell_back ? 1 : 0;
  }
  if (iterations + fallen == 0) return {};
  return fmt::format("{:.1f} iterations a layer, {} of {} layers fell back to a second choice\n",
                     static_cast<double>(iterations) / static_cast<double>(report.layers.size()),
                     fallen, report.layers.size());
}

/// "KL(dense || pruned) on the calibration 0.4121 -> 0.2071 in 8 epochs"; nothing without.
std::string reconstruction_line(const prune::PruneReport& report) {
  if (report.reconstruction.empty()) return {};
  return fmt::format("KL(dense || pruned) on the calibration {:.4f} -> {:.4f} in {} epochs\n",
                     report.reconstruction.front(), report.reconstruction.back(),
                     report.reconstruction.size());
}

/// "budget bytes=2100000000B: reached 2.10 GB (curves)"
std::string budget_line(const prune::PruneReport& report) {
  if (report.budget_reached == 0) return {};
  const auto budget = prune::Budget::parse(report.budget);
  if (!budget.ok()) return {};
  return fmt::format(
      "budget {}: reached {}{} ({})\n", report.budget, budget->told(report.budget_reached),
      budget->kind == prune::Budget::Kind::kMilliseconds ? " as predicted" : "", report.allocation);
}

/// "3 inputs of 2 layers were zero in all of the calibration"; nothing where none was.
std::string dead_line(const prune::PruneReport& report) {
  int64_t inputs = 0, layers = 0;
  for (const auto& layer : report.layers) {
    inputs += layer.dead_inputs;
    layers += layer.dead_inputs > 0 ? 1 : 0;
  }
  if (inputs == 0) return {};
  return fmt::format("{} inputs of {} layers were zero in all of the calibration\n", inputs,
                     layers);
}

/// One line for those who did not ask for the table; nothing where no error was measured.
std::string worst_layer(const prune::PruneReport& report) {
  const auto worst =
      std::max_element(report.layers.begin(), report.layers.end(),
                       [](const auto& one, const auto& other) { return one.error < other.error; });
  if (worst == report.layers.end() || worst->error < 0) return {};
  double sum = 0;
  for (const auto& layer : report.layers) sum += layer.error;
  return fmt::format("layer error {:.4f} on average, at most {:.4f} ({}); -v lists all {} layers\n",
                     sum / static_cast<double>(report.layers.size()), worst->error, worst->name,
                     report.layers.size());
}

}  // namespace

void add_prune(Tool& tool) {
  auto* verb = tool.verb(
      "prune", "Make a dense model sparse and write it small.",
      {"lacuna prune models/llama -o models/llama-50 --calibration c4.jsonl",
       "lacuna prune models/llama -o models/llama-24 --pattern 2:4 --method alps",
       "lacuna prune models/llama -o models/llama-70 --sparsity 0.7 --score wanda --solve alps "
       "--refine swaps,polish",
       "lacuna prune models/llama -o models/llama-50 --method alps --reconstruct model "
       "--calibration c4.jsonl",
       "lacuna prune models/llama -o models/llama-60 --sparsity 0.6 --statistics "
       "llama.statistics",
       "lacuna prune models/llama -o models/llama-24-int4 --pattern 2:4 --method alps --quantize "
       "int4 "
       "--group 64",
       "lacuna prune models/llama -o models/llama-2g --budget bytes=2.1GB --statistics "
       "llama.statistics",
       "lacuna prune models/llama -o models/llama-70 --sparsity 0.7 --allocate owl",
       "lacuna prune models/llama -o models/llama-50 --calibration c4.jsonl --memory 12GB",
       "lacuna prune models/llama -o models/llama-50 --score regional --calibration c4.jsonl"});
  static Flags flags;
  static std::vector<std::string> methods;
  for (const auto* method : prune::methods()) methods.emplace_back(method->name());
  auto& options = flags.job.options;
  tool.computes(verb);
  tool.seeded(verb);
  tool.model(verb, flags.job.model, "dense model folder");
  tool.writes(verb, flags.job.out);
  auto* method = verb->add_option("--method", options.method,
                                  "a usual combination of the three stages (docs/methods.md)")
                     ->check(CLI::IsMember(methods))
                     ->capture_default_str();
  auto* score =
      verb->add_option("--score", options.score,
                       "what ranks the weights (own: the solver's own choice; gradient, fisher and "
                       "regional: by gradients, docs/methods/gradient.md)")
          ->check(CLI::IsMember(prune::score_names()));
  auto* solve = verb->add_option("--solve", options.solve, "what makes good for dropped weights")
                    ->check(CLI::IsMember(prune::solver_names()));
  verb->add_option("--refine", options.refine, "what betters the result, one after the other")
      ->delimiter(',')
      ->check(CLI::IsMember(prune::refinement_names()));
  verb->add_option("--refine-target", options.refine_target,
                   "only weights whose name matches one of these regular expressions are refined")
      ->check(accepted_by(parse_regex));
  auto* reconstruct =
      verb->add_option("--reconstruct", flags.reconstruct,
                       "train the kept weights on the calibration towards the dense model: block "
                       "(each block's outputs, on the way), model (its predictions, at the end; "
                       "needs the whole model in memory) or both (docs/methods/reconstruction.md)")
          ->delimiter(',')
          ->check(CLI::IsMember({"block", "model"}));
  verb->add_option("--epochs", options.reconstruct.epochs,
                   "with --reconstruct: passes over the calibration, of each objective")
      ->check(between(1, 1000))
      ->needs(reconstruct)
      ->capture_default_str();
  verb->add_option("--learning-rate", options.reconstruct.rate,
                   "with --reconstruct: the highest of Adam's, reached after a twentieth")
      ->check(above(0))
      ->needs(reconstruct)
      ->capture_default_str();
  verb->add_option("--batch", options.reconstruct.batch, "with --reconstruct: samples a step")
      ->check(between(1, 1024))
      ->needs(reconstruct)
      ->capture_default_str();
  verb->add_option(
          "--pattern", flags.pattern,
          "unstructured, KEEP:OF (2:4 keeps two of four), block:RxC, or 2:4+dense: 2:4 but "
          "for the columns that matter most, as many as --sparsity below 0.5 leaves")
      ->check(accepted_by(PrunePattern::parse))
      ->capture_default_str();
  auto* sparsity = verb->add_option("--sparsity", flags.sparsity, "share of zeros, 0..1")
                       ->check(share())
                       ->capture_default_str();
  verb->add_option("--allocate", flags.allocate,
                   "who gives up more: uniform, owl, error or curves (docs/methods/allocation.md; "
                   "default: uniform, with --budget curves)")
      ->check(CLI::IsMember(prune::allocation_names()));
  verb->add_option("--budget", flags.budget,
                   "what the layers come to together: sparsity=0.6, bytes=2.1GB (the finished "
                   "compact model) or tpot=12.5ms (in the linear layers, by `lacuna tune`)")
      ->check(accepted_by(prune::Budget::parse));
  verb->add_option("--group", flags.groups,
                   "what competes: row, layer or block128 (default: the method's own); with "
                   "--quantize also how many columns share a scale: 32, 64 or 128")
      ->check(CLI::IsMember({"row", "layer", "block128", "32", "64", "128"}))
      ->allow_extra_args(false);
  auto* quantize =
      verb->add_option(
              "--quantize", flags.quantize,
              "codes for the kept weights, rounding and pruning made good together: int8, int4, "
              "fp8 (int4row: one scale a row); embedding and output matrix become int8")
          ->check(accepted_by([](const std::string& text) { return parse_codes(text); }));
  verb->add_flag("--zero-points", flags.zero_points, "int4: a zero point for every scale");
  verb->add_option(
          "--coding", flags.coding,
          "with --quantize: gptq (errors are spread, then codes bettered one by one) or awq "
          "(ranges by the inputs' energy, then the nearest code)")
      ->check(CLI::IsMember({"gptq", "awq"}))
      ->needs(quantize)
      ->capture_default_str();
  verb->add_flag("--keep-mask", options.request.keep_mask,
                 "with --quantize: the mask that the model has, codes alone");
  verb->add_flag("--keep-head", options.keep_head,
                 "with --quantize: leave embedding and output matrix as they are");
  auto* calibration = verb->add_option("--calibration", flags.job.calibration,
                                       "text or .jsonl with a `text` field, a data set name, or "
                                       "`self`: the model's own samples")
                          ->capture_default_str();
  auto* ids = verb->add_option(
      "--calibration-ids", flags.job.calibration_ids,
      "token ids: safetensors with int32 `ids` [samples, length], or a JSON list of lists");
  auto* save_ids = verb->add_option("--save-calibration-ids", flags.job.save_calibration_ids,
                                    "write the token ids used there, for --calibration-ids");
  auto* saved = verb->add_option("--save-statistics", options.save_statistics,
                                 "calibrate the dense model in one pass, keep the statistics in "
                                 "this folder and prune by them");
  auto* statistics =
      verb->add_option("--statistics", options.statistics,
                       "prune by the statistics of such a folder, without calibration")
          ->excludes(saved);
  auto* samples = verb->add_option("--samples", flags.job.samples, "calibration samples")
                      ->check(between(1, prune::kMostSamples))
                      ->capture_default_str();
  auto* length = verb->add_option("--length", flags.job.length, "tokens a sample")
                     ->check(between(2, prune::kLongestSample))
                     ->capture_default_str();
  for (CLI::Option* of_calibration : {calibration, ids, save_ids, samples, length})
    statistics->excludes(of_calibration);
  verb->add_option("--target", options.target,
                   "only weights whose name matches one of these regular expressions")
      ->check(accepted_by(parse_regex));
  verb->add_option("--exclude", options.exclude, "not those that match one of these")
      ->check(accepted_by(parse_regex));
  verb->add_option("--damping", options.request.damping,
                   "added to the Hessian, relative to its mean diagonal")
      ->check(above(0))
      ->capture_default_str();
  verb->add_option("--store,--format", flags.store,
                   "compact, dense, compressed-tensors, csr, coo or bsr")
      ->check(accepted_by([](const std::string& text) { return api::parse_store(text); }))
      ->capture_default_str();
  verb->add_option(
          "--memory", flags.memory,
          "that the run keeps to (12GB, 1.5GiB): where its activations don't fit, they lie "
          "in a file beside OUT while it runs")
      ->check(accepted_by(parse_memory));
  verb->add_flag("--resume", options.resume, "go on where an interrupted run stopped");
  // Checked while parsing, so that a contradiction is a usage error before anything is read.
  verb->parse_complete_callback([sparsity, method, score, solve] {
    // Stages that are spelled out stand alone, unless a combination is named beside them.
    if (method->count() == 0 && score->count() + solve->count() > 0)
      flags.job.options.method.clear();
    if (const Status status = settle(flags, sparsity->count() > 0); !status.ok())
      throw CLI::ValidationError(status.error().message);
  });
  tool.action(verb, [&tool]() -> Status {
    flags.job.choice = tool.compute("float32");
    flags.job.options.seed = tool.seed();
    LACUNA_TRY(const auto report, api::prune(flags.job, tool.stoppable_progress()));
    tool.print(
        report::to_json(report),
        fmt::format("{}{}{}{}{}{}: sparsity {:.4f}, {} (dense {}), {:.1f} s\n",
                    tool.verbose() ? layer_table(report) + phase_line(report) : worst_layer(report),
                    solver_line(report), dead_line(report), reconstruction_line(report),
                    budget_line(report), report.out.string(), report.sparsity,
                    bytes_text(report.bytes_out), bytes_text(report.bytes_dense), report.seconds));
    return {};
  });
}

}  // namespace lacuna::cli
