#include "lacuna/api/sweep.h"

#include <unistd.h>

#include <ATen/ATen.h>

#include <fmt/ranges.h>

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "lacuna/api/calibration.h"
#include "lacuna/api/sweep_judge.h"
#include "lacuna/core/clock.h"
#include "lacuna/format/quantization.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/prune/statistics_folder.h"

namespace lacuna::api {
namespace fs = std::filesystem;
namespace {

/// A folder for models that nobody keeps.
class Scratch {
 public:
  Scratch() = default;
  static Result<std::unique_ptr<Scratch>> make() {
    std::error_code failure;
    std::string name = (fs::temp_directory_path(failure) / "lacuna-sweep-XXXXXX").string();
    if (failure || mkdtemp(name.data()) == nullptr)
      return check_failed("{}: can't be made. Set TMPDIR to another place, or give --write.", name);
    auto scratch = std::make_unique<Scratch>();
    scratch->folder_ = name;
    return scratch;
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(folder_, ignored);
  }
  const fs::path& folder() const { return folder_; }

 private:
  fs::path folder_;
};

/// A part of a folder's name: "2:4" as "2-4", "block:16x16@0.5" as "block-16x16-0.5".
std::string as_name(std::string text) {
  for (char& c : text)
    if (c == ':' || c == '@' || c == '+') c = '-';
  return text;
}

Result<prune::PruneOptions> options_of(const SweepJob& job, const std::string& method,
                                       const SweepPattern& pattern,
                                       const format::Quantization& code = {}) {
  LACUNA_TRY(const prune::MethodChoice choice, parse_sweep_method(method));
  prune::PruneOptions options{.method = choice.method, .refine = choice.refine};
  options.request.pattern = pattern.pattern;
  options.request.rest = pattern.rest;
  options.request.sparsity = pattern.sparsity;
  options.request.damping = job.damping;
  options.request.quantization = code;
  options.statistics = job.statistics;
  options.resume = job.resume;
  return options;
}

/// Every combination, with a row each that says no more than what it is.
struct Plan {
  std::vector<prune::Variant> variants;
  std::vector<SweepRow> rows;
};

/// "alps 2:4", "alps 2:4 int4g64"
std::string name_of(const SweepRow& row) {
  return fmt::format("{} {}{}", row.method, row.pattern, row.code == "none" ? "" : " " + row.code);
}

/// Whether the stages do such a pattern, tried on a small matrix: what they refuse doesn't depend
/// on the weights. @errors kUsage: what they say
Status rehearse(const prune::PruneOptions& options) {
  LACUNA_TRY(const prune::Method method, prune::method_of(options));
  const prune::Request& request = options.request;
  const int64_t rows = std::clamp<int64_t>(2 * request.pattern.block_rows, 8, 128);
  const int64_t columns = std::clamp<int64_t>(
      2 * std::max({request.pattern.block_columns, request.pattern.of, request.rest.of}), 64, 128);
  prune::InputStatistics inputs{.sequences = 1, .tokens = columns};
  inputs.gram = at::eye(columns) * columns;
  inputs.square_sums = at::ones({columns}) * columns;
  inputs.sums = at::zeros({columns});
  const at::Tensor weight = at::arange(rows * columns, at::kFloat).sin().view({rows, columns});
  try {
    const auto pruned = method.prune(weight, inputs, request);
    if (!pruned.ok() && pruned.error().code == Code::kUsage) return pruned.error();
  } catch (const std::exception&) {  // of torch: the run itself will tell
  }
  return {};
}

/// Everything that the stages refuse is told at once, and before anything is pruned.
Status check_combinations(const Plan& plan) {
  std::vector<std::string> whys, advice;
  std::set<std::string> methods;                            // in whys already, for all their rows
  std::map<std::string, std::vector<std::string>> refused;  // method -> pattern and code
  std::map<std::string, size_t> rows_of;                    // method -> rows
  size_t count = 0;
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    const SweepRow& row = plan.rows[i];
    ++rows_of[row.method];
    LACUNA_TRY(const prune::Method method, prune::method_of(plan.variants[i].options));
    Status done;
    if (method.slope() != prune::Slope::kNone) {
      if (methods.insert(row.method).second)
        whys.push_back(
            fmt::format("{}: its gradients need the calibration text itself, which statistics "
                        "don't hold; prune "
                        "by `lacuna prune --method {} --calibration FILE`",
                        row.method, row.method.substr(0, row.method.find('+'))));
    } else if (done = rehearse(plan.variants[i].options); !done.ok()) {
      std::string why = done.error().message;
      if (why.ends_with('.')) why.pop_back();
      whys.push_back(fmt::format("{}: {}", name_of(row), why));
    } else {
      continue;
    }
    refused[row.method].push_back(name_of(row).substr(row.method.size() + 1));
    ++count;
  }
  if (count == 0) return {};
  for (const auto& [method, without] : refused)
    advice.push_back(
        without.size() == rows_of[method]
            ? fmt::format("leave {} out", method)
            : fmt::format("sweep {} apart, without {}", method, fmt::join(without, ", ")));
  advice.front().front() = static_cast<char>(std::toupper(advice.front().front()));
  return usage_error("--methods, --patterns: {} of {} combinations can't be done ({}). {}.", count,
                     plan.rows.size(), fmt::join(whys, "; "), fmt::join(advice, "; "));
}

Result<Plan> plan_of(const SweepJob& job, const fs::path& folder) {
  Plan plan;
  std::set<fs::path> outs;
  for (const std::string& method : job.methods)
    for (const std::string& text : job.patterns)
      for (const std::string& spelled : job.codes) {
        LACUNA_TRY(const auto pattern, SweepPattern::parse(text));
        LACUNA_TRY(const auto code, format::Quantization::parse(spelled));
        LACUNA_TRY(auto options, options_of(job, method, pattern, code));
        SweepRow row{.method = method, .pattern = pattern.text(), .code = code.text()};
        const fs::path out = folder / fmt::format("{}-{}{}", as_name(method), as_name(row.pattern),
                                                  code.none() ? "" : "-" + row.code);
        if (!outs.insert(out).second)
          return usage_error("--methods, --patterns, --quantize: {} is named twice. Leave one out.",
                             name_of(row));
        plan.variants.push_back({out, std::move(options), job.overwrite});
        plan.rows.push_back(std::move(row));
      }
  if (plan.rows.empty()) return usage_error("--methods, --patterns: nothing to sweep.");
  LACUNA_CHECK(check_combinations(plan));
  if (!job.write.empty() && !job.overwrite && !job.resume)
    for (const fs::path& out : outs) LACUNA_CHECK(io::check_free(out));
  return plan;
}

void fill(SweepRow& row, const prune::PruneReport& report) {
  row.sparsity = report.sparsity;
  double sum = 0;
  for (const auto& layer : report.layers) {
    sum += layer.error;
    row.fell_back += layer.fell_back ? 1 : 0;
  }
  row.layer_error = sum / static_cast<double>(report.layers.size());
}

/// What rows of one pattern are compared by.
double badness(const SweepRow& row) { return row.measure.perplexity.value_or(row.layer_error); }

void mark_best(std::vector<SweepRow>& rows) {
  std::map<std::string, SweepRow*> best;
  for (SweepRow& row : rows) {
    SweepRow*& held = best[row.pattern + " " + row.code];
    if (held == nullptr || badness(row) < badness(*held)) held = &row;
  }
  for (auto& [pattern, row] : best) row->best = true;
}

/// A run in a scratch folder was stopped: what is left of the sweep.
Error stopped(const SweepJob& job) {
  if (job.write.empty())
    return {Code::kInterrupted, "interrupted; nothing is kept (with --write it would be)."};
  return {Code::kInterrupted,
          fmt::format("interrupted; the models in {} are kept. Go on with the same command and "
                      "--resume.",
                      job.write.string())};
}

// ---- the same through the pruned blocks ---------------------------------------------------------

/// What statistics.json says of the calibration.
struct Recorded {
  std::string source, hash;
  int64_t samples = 0, length = 0;
};

Result<Recorded> recorded_calibration(const fs::path& statistics) {
  LACUNA_TRY(const auto folder, prune::StatisticsFolder::open(statistics));
  try {
    const nlohmann::json& about = folder.about().at("calibration");
    return Recorded{about.at("source"), about.at("hash"), about.at("samples"), about.at("length")};
  } catch (const nlohmann::json::exception&) {
    return bad_input(
        "{}: doesn't say what it was calibrated with, which --compare-propagated needs. Collect "
        "the statistics again.",
        statistics.string());
  }
}

/// The tokens that the statistics are of: a comparison with others would be one of texts.
Result<prune::Calibration> calibration_of_statistics(const SweepJob& job,
                                                     const io::Checkpoint& checkpoint,
                                                     const io::DecoderSpec& spec,
                                                     const JobProgress& progress) {
  LACUNA_TRY(const Recorded recorded, recorded_calibration(job.statistics));
  if (job.calibration_ids.empty() && job.calibration.empty() && recorded.source != "self")
    return usage_error(
        "--compare-propagated: needs the calibration that the statistics are of, {} x {} tokens of "
        "{}. Give --calibration or --calibration-ids.",
        recorded.samples, recorded.length, recorded.source);
  LACUNA_TRY(const auto source,
             calibration_of({.model = job.model,
                             .ids = job.calibration_ids,
                             .text = job.calibration.empty() ? recorded.source : job.calibration,
                             .samples = recorded.samples,
                             .length = recorded.length,
                             .seed = job.seed,
                             .compute = job.choice},
                            checkpoint, spec, progress));
  LACUNA_TRY(auto calibration, source.make());
  if (calibration.hash() != recorded.hash)
    return usage_error(
        "--compare-propagated: other tokens than those of the statistics (got {} x {} of {}; need "
        "{} x {} of {}). Give the same --calibration and --seed, or the --calibration-ids that "
        "`prune --save-calibration-ids` wrote.",
        calibration.samples(), calibration.length(), calibration.source, recorded.samples,
        recorded.length, recorded.source);
  return calibration;
}

/// Prunes chosen rows again, one after the other, with statistics through the pruned blocks.
Status compare_propagated(const SweepJob& job, const io::Checkpoint& checkpoint,
                          const prune::Calibration& calibration, const Plan& plan,
                          const SweepJudge& judge, const JobProgress& progress,
                          SweepReport& report) {
  const auto start = Clock::now();
  LACUNA_TRY(const auto scratch, Scratch::make());
  const fs::path out = scratch->folder() / "model";
  for (size_t i = 0; i < report.rows.size(); ++i) {
    SweepRow& row = report.rows[i];
    if (job.propagated == Propagated::kBest && !row.best) continue;
    prune::PruneOptions options = plan.variants[i].options;
    LACUNA_TRY(const prune::Method method, prune::method_of(options));
    if (!method.needs_inputs()) {  // what runs through the blocks makes no difference
      row.propagated = row.measure;
      continue;
    }
    options.statistics.clear();
    options.resume = false;
    const std::string name = name_of(row) + " through the pruned blocks";
    const auto pruned =
        prune::prune_model(checkpoint, calibration, out, options,
                           {.step =
                                [&](int64_t done, int64_t total, const std::string& what) {
                                  if (progress.step) progress.step(name + ": " + what, done, total);
                                },
                            .interrupted = progress.interrupted});
    if (!pruned.ok())
      return pruned.error().code == Code::kInterrupted ? stopped(job) : pruned.error();
    LACUNA_TRY(row.propagated, judge.measure(out, /*with_kl=*/true, name));
    std::error_code ignored;
    fs::remove_all(out, ignored);
  }
  report.compare_seconds = seconds_since(start);
  return {};
}

// ---- the frontier -------------------------------------------------------------------------------

/// Looks for the largest sparsity of one method and code that a tolerance allows. Pruned models
/// are shared by the codes.
class Frontier {
 public:
  Frontier(const SweepJob& job, const SweepJudge& judge, std::string method, const fs::path& folder,
           const JobProgress& progress)
      : job_(job),
        judge_(judge),
        method_(std::move(method)),
        folder_(folder),
        progress_(progress),
        most_(*judge.dense().perplexity * (1 + *job.frontier)) {}

  /// By halves between 0 and 95 %: perplexity rises with sparsity.
  Result<FrontierRow> find(const format::Quantization& code) {
    FrontierRow row{.method = method_, .code = code.text()};
    int low = 0, high = 96;  // percent: what is allowed, and what isn't
    SweepMeasure allowed = judge_.dense();
    if (!code.none()) {
      LACUNA_TRY(allowed, probe(0, code, row));
      if (*allowed.perplexity > most_) {
        row.measure = allowed;
        return row;
      }
    }
    while (high - low > 1) {
      const int middle = (low + high) / 2;
      LACUNA_TRY(const SweepMeasure there, probe(middle, code, row));
      if (*there.perplexity <= most_)
        low = middle, allowed = there;
      else
        high = middle;
    }
    row.sparsity = low / 100.0;
    row.measure = allowed;
    return row;
  }

 private:
  Result<SweepMeasure> probe(int percent, const format::Quantization& code, FrontierRow& row) {
    ++row.probes;
    fs::path folder = job_.model;
    if (percent > 0) {
      LACUNA_TRY(folder, pruned(percent));
    }
    const std::string what = fmt::format("{} {} % {}", method_, percent, code.text());
    if (code.none()) return judge_.measure(folder, /*with_kl=*/false, what);
    const fs::path coded = folder_ / fmt::format("coded-{}-{}", percent, code.text());
    LACUNA_CHECK(convert(folder, coded, {.quantization = code}));
    auto measured = judge_.measure(coded, /*with_kl=*/false, what);
    std::error_code ignored;
    fs::remove_all(coded, ignored);
    return measured;
  }

  Result<fs::path> pruned(int percent) {
    const auto [found, fresh] = pruned_.try_emplace(percent);
    if (!fresh) return found->second;
    const SweepPattern pattern{format::Pattern::unstructured(), percent / 100.0};
    LACUNA_TRY(auto options, options_of(job_, method_, pattern));
    options.resume = false;
    options.compute = judge_.compute();
    found->second = folder_ / fmt::format("{}-{}", as_name(method_), pattern.text());
    LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(job_.model));
    const auto pruned = prune::prune_model(checkpoint, prune::CalibrationSource{}, found->second,
                                           options, {.interrupted = progress_.interrupted});
    if (!pruned.ok())
      return pruned.error().code == Code::kInterrupted ? stopped(job_) : pruned.error();
    return found->second;
  }

  const SweepJob& job_;
  const SweepJudge& judge_;
  const std::string method_;
  const fs::path folder_;
  const JobProgress& progress_;
  const double most_;
  std::map<int, fs::path> pruned_;  // percent -> folder
};

/// The method that is best where the fewest unstructured weights go: that is where the frontier
/// lies. The frontier adds codes to finished models, so rows without codes tell more about it.
std::string frontier_method(const std::vector<SweepRow>& rows) {
  const SweepRow* chosen = nullptr;
  for (const SweepRow& row : rows) {
    if (!row.best || row.pattern.find(':') != std::string::npos) continue;
    const auto rank = [](const SweepRow& one) {
      return std::pair(one.code != "none", one.sparsity);
    };
    if (chosen == nullptr || rank(row) < rank(*chosen)) chosen = &row;
  }
  return chosen != nullptr ? chosen->method : rows.front().method;
}

Status find_frontier(const SweepJob& job, const SweepJudge& judge, const JobProgress& progress,
                     SweepReport& report) {
  const auto start = Clock::now();
  LACUNA_TRY(const auto scratch, Scratch::make());
  Frontier frontier(job, judge, frontier_method(report.rows), scratch->folder(), progress);
  for (const char* code : {"none", "int8", "int4"}) {
    LACUNA_TRY(const auto quantization, format::Quantization::parse(code));
    LACUNA_TRY(auto row, frontier.find(quantization));
    report.frontier.push_back(std::move(row));
  }
  report.frontier_tolerance = *job.frontier;
  report.frontier_seconds = seconds_since(start);
  return {};
}

}  // namespace

std::optional<double> SweepRow::lost() const {
  if (!propagated || !propagated->perplexity || !measure.perplexity) return std::nullopt;
  return *measure.perplexity / *propagated->perplexity - 1;
}

Result<Propagated> parse_propagated(const std::string& name) {
  if (name == "best") return Propagated::kBest;
  if (name == "all") return Propagated::kAll;
  return usage_error("--compare-propagated: unknown choice of rows (got {}; need best or all).",
                     name);
}

Result<SweepPattern> SweepPattern::parse(const std::string& text) {
  const auto wrong = [&] {
    return usage_error(
        "--patterns: not a pattern of a sweep (got {}; need a sparsity as 0.5, KEEP:OF, "
        "block:RxC@SPARSITY, or KEEP:OF+dense@SPARSITY with less than KEEP:OF takes).",
        text);
  };
  constexpr std::string_view kBeside = "+dense";
  const size_t at = text.find('@');
  const bool has_share = at != std::string::npos;
  std::string name = text.substr(0, at);
  const bool bare = !has_share && text.find(':') == std::string::npos;
  const bool beside = !bare && name.ends_with(kBeside);
  if (beside) name.resize(name.size() - kBeside.size());
  SweepPattern result{format::Pattern::unstructured(), 0};
  if (!bare) {
    const auto pattern = format::Pattern::parse(name);
    if (!pattern.ok()) return wrong();
    (beside ? result.rest : result.pattern) = *pattern;
  }
  if (result.pattern.kind == format::PatternKind::kKeepOf) {
    result.sparsity = result.pattern.sparsity();
    return has_share ? wrong() : Result<SweepPattern>(result);
  }
  const std::string number = has_share ? text.substr(at + 1) : text;
  char* end = nullptr;
  result.sparsity = std::strtod(number.c_str(), &end);
  if (number.empty() || *end != '\0' || !(result.sparsity > 0 && result.sparsity < 1))
    return wrong();
  const bool fits = beside ? result.rest.kind == format::PatternKind::kKeepOf &&
                                 result.sparsity < result.rest.sparsity()
                           : bare || result.pattern.kind == format::PatternKind::kBlock;
  return fits ? Result<SweepPattern>(result) : wrong();
}

std::string SweepPattern::text() const {
  if (rest.kind != format::PatternKind::kDense)
    return fmt::format("{}+dense@{}", rest.text(), sparsity);
  if (pattern.kind == format::PatternKind::kUnstructured) return fmt::format("{}", sparsity);
  if (pattern.kind == format::PatternKind::kKeepOf) return pattern.text();
  return fmt::format("{}@{}", pattern.text(), sparsity);
}

Result<prune::MethodChoice> parse_sweep_method(const std::string& text) {
  prune::MethodChoice choice;
  size_t begin = 0;
  while (begin <= text.size()) {
    const size_t end = std::min(text.find('+', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    if (begin == 0)
      choice.method = part;
    else
      choice.refine.push_back(part);
    begin = end + 1;
  }
  LACUNA_CHECK(prune::compose(choice));
  return choice;
}

Result<SweepReport> sweep(const SweepJob& job, const JobProgress& progress) {
  if (job.frontier && job.text.empty())
    return usage_error("--frontier: is one of perplexity. Give --text.");
  if (job.propagated != Propagated::kNone && job.text.empty())
    return usage_error("--compare-propagated: compares perplexities. Give --text.");
  if (job.resume && job.write.empty())
    return usage_error("--resume: needs the folder of the run that stopped. Give --write.");
  std::unique_ptr<Scratch> scratch;
  fs::path folder = job.write;
  if (folder.empty()) {
    LACUNA_TRY(scratch, Scratch::make());
    folder = scratch->folder();
  }
  LACUNA_TRY(Plan plan, plan_of(job, folder));
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(job.model));
  LACUNA_TRY(const auto spec, model::spec_of(checkpoint));
  LACUNA_TRY(const auto compute, resolve(job.choice, spec.dtype));
  LACUNA_TRY(auto ids, SweepJudge::read_text(job, spec));
  prune::Calibration calibration;
  if (job.propagated != Propagated::kNone) {
    LACUNA_TRY(calibration, calibration_of_statistics(job, checkpoint, spec, progress));
  }
  for (prune::Variant& variant : plan.variants)
    variant.options.compute = {.device = compute.device, .dtype = at::kFloat};
  if (progress.log)
    progress.log(fmt::format("{} models; at most {:.2f} GB of disk in {}", plan.rows.size(),
                             1.7 * static_cast<double>(plan.rows.size()) *
                                 static_cast<double>(checkpoint.total_bytes()) / 1e9,
                             folder.string()));
  SweepReport report;
  const auto start = Clock::now();
  const auto reports =
      prune::prune_variants(checkpoint, plan.variants,
                            {progress.log,
                             [&](int64_t done, int64_t total, const std::string& what) {
                               if (progress.step) progress.step(what, done, total);
                             },
                             progress.interrupted});
  if (!reports.ok()) {
    if (reports.error().code != Code::kInterrupted || !job.write.empty()) return reports.error();
    return stopped(job);
  }
  report.prune_seconds = seconds_since(start);
  const auto measuring = Clock::now();
  LACUNA_TRY(const auto judge, SweepJudge::open(job, std::move(ids), progress));
  report.dense = judge.dense();
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    SweepRow& row = plan.rows[i];
    fill(row, (*reports)[i]);
    LACUNA_TRY(row.measure, judge.measure(plan.variants[i].out, /*with_kl=*/true, name_of(row)));
    std::error_code ignored;
    if (job.write.empty())
      fs::remove_all(plan.variants[i].out, ignored);
    else
      row.folder = plan.variants[i].out;
  }
  report.rows = plan.rows;
  mark_best(report.rows);
  report.measure_seconds = seconds_since(measuring);
  if (job.propagated != Propagated::kNone)
    LACUNA_CHECK(compare_propagated(job, checkpoint, calibration, plan, judge, progress, report));
  if (job.frontier) LACUNA_CHECK(find_frontier(job, judge, progress, report));
  return report;
}

}  // namespace lacuna::api
