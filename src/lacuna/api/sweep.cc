#include "lacuna/api/sweep.h"

#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "lacuna/api/sweep_judge.h"
#include "lacuna/core/clock.h"
#include "lacuna/format/quantization.h"
#include "lacuna/io/out_folder.h"

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
                                       const SweepPattern& pattern) {
  LACUNA_TRY(const prune::MethodChoice choice, parse_sweep_method(method));
  prune::PruneOptions options{.method = choice.method, .refine = choice.refine};
  options.request.pattern = pattern.pattern;
  options.request.sparsity = pattern.sparsity;
  options.request.damping = job.damping;
  options.statistics = job.statistics;
  options.resume = job.resume;
  return options;
}

/// Every combination, with a row each that says no more than what it is.
struct Plan {
  std::vector<prune::Variant> variants;
  std::vector<SweepRow> rows;
};

Result<Plan> plan_of(const SweepJob& job, const fs::path& folder) {
  Plan plan;
  for (const std::string& method : job.methods)
    for (const std::string& text : job.patterns) {
      LACUNA_TRY(const auto pattern, SweepPattern::parse(text));
      LACUNA_TRY(auto options, options_of(job, method, pattern));
      const fs::path out = folder / fmt::format("{}-{}", as_name(method), as_name(pattern.text()));
      if (std::any_of(plan.variants.begin(), plan.variants.end(),
                      [&](const auto& other) { return other.out == out; }))
        return usage_error("--methods, --patterns: {} {} is named twice.", method, text);
      if (!job.write.empty() && !job.overwrite && !job.resume) LACUNA_CHECK(io::check_free(out));
      plan.variants.push_back({out, std::move(options), job.overwrite});
      plan.rows.push_back({.method = method, .pattern = pattern.text()});
    }
  if (plan.rows.empty()) return usage_error("--methods, --patterns: nothing to sweep.");
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
    SweepRow*& held = best[row.pattern];
    if (held == nullptr || badness(row) < badness(*held)) held = &row;
  }
  for (auto& [pattern, row] : best) row->best = true;
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
    LACUNA_CHECK(prune::prune_model(checkpoint, prune::CalibrationSource{}, found->second, options,
                                    {.interrupted = progress_.interrupted}));
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
/// lies.
std::string frontier_method(const std::vector<SweepRow>& rows) {
  const SweepRow* chosen = nullptr;
  for (const SweepRow& row : rows) {
    if (!row.best || row.pattern.find(':') != std::string::npos) continue;
    if (chosen == nullptr || row.sparsity < chosen->sparsity) chosen = &row;
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

Result<SweepPattern> SweepPattern::parse(const std::string& text) {
  const auto wrong = [&] {
    return usage_error(
        "--patterns: not a pattern of a sweep (got {}; need a sparsity as 0.5, KEEP:OF, or "
        "block:RxC@SPARSITY).",
        text);
  };
  const size_t at = text.find('@');
  const std::string number = at == std::string::npos ? text : text.substr(at + 1);
  SweepPattern result{format::Pattern::unstructured(), 0};
  const bool bare = at == std::string::npos && text.find(':') == std::string::npos;
  if (!bare) {
    const auto pattern = format::Pattern::parse(text.substr(0, at));
    if (!pattern.ok()) return wrong();
    result.pattern = *pattern;
  }
  if (result.pattern.kind == format::PatternKind::kKeepOf) {
    result.sparsity = result.pattern.sparsity();
    return at == std::string::npos ? Result<SweepPattern>(result) : wrong();
  }
  char* end = nullptr;
  result.sparsity = std::strtod(number.c_str(), &end);
  const bool block = result.pattern.kind == format::PatternKind::kBlock;
  if (number.empty() || *end != '\0' || !(result.sparsity > 0 && result.sparsity < 1) ||
      (!bare && !block))
    return wrong();
  return result;
}

std::string SweepPattern::text() const {
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
    return Error{Code::kInterrupted, "interrupted; nothing is kept (with --write it would be)."};
  }
  report.prune_seconds = seconds_since(start);
  const auto measuring = Clock::now();
  LACUNA_TRY(const auto judge, SweepJudge::open(job, progress));
  report.dense = judge.dense();
  for (size_t i = 0; i < plan.rows.size(); ++i) {
    SweepRow& row = plan.rows[i];
    fill(row, (*reports)[i]);
    LACUNA_TRY(row.measure, judge.measure(plan.variants[i].out, /*with_kl=*/true,
                                          fmt::format("{} {}", row.method, row.pattern)));
    std::error_code ignored;
    if (job.write.empty())
      fs::remove_all(plan.variants[i].out, ignored);
    else
      row.folder = plan.variants[i].out;
  }
  report.rows = std::move(plan.rows);
  mark_best(report.rows);
  report.measure_seconds = seconds_since(measuring);
  if (job.frontier) LACUNA_CHECK(find_frontier(job, judge, progress, report));
  return report;
}

}  // namespace lacuna::api
