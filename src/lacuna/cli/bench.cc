#include <map>

#include "lacuna/bench/compare.h"
#include "lacuna/bench/compare_gpu.h"
#include "lacuna/bench/record.h"
#include "lacuna/cli/bench_model.h"
#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"
#include "lacuna/io/file.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/report/svg.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {
namespace {

struct Flags {
  std::vector<std::string> problems;
  std::string cases;
  bench::CompareOptions options;
  bool quick = false, compare = false, all = false;
  std::string table, chart;
};

Result<bool> parse_problem(const std::string& text) {
  LACUNA_CHECK(kernels::Problem::parse(text));
  return true;
}

report::Table new_table() {
  return report::Table(
      {"problem", "candidate", "us", "p10", "p90", "GB/s", "share", "weight", "GFLOP/s", "ratio"});
}

void add_rows(const bench::Comparison& comparison, report::Table& table) {
  for (const auto& record : comparison.records)
    table.add({record.problem, record.candidate, fmt::format("{:.1f}", record.us.median),
               fmt::format("{:.1f}", record.us.p10), fmt::format("{:.1f}", record.us.p90),
               fmt::format("{:.1f}", record.gb_per_second),
               record.share ? fmt::format("{:.0f} %", 100 * *record.share) : "-",
               bytes_text(record.weight_bytes), fmt::format("{:.1f}", record.gflop_per_second),
               record.ratio ? fmt::format("{:.2f}", record.ratio->median) : "-"});
}

std::string text_of(const bench::Comparison& comparison) {
  report::Table table = new_table();
  add_rows(comparison, table);
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

/// What problems of one curve share: the types, and where there are several the operation, the
/// size of blocks and the shape.
std::string curve_of(const kernels::Problem& problem, bool operations, bool shapes) {
  std::string name(kernels::text(problem.values));
  if (kernels::dtype_of(problem.values) && kernels::dtype_of(problem.values) != problem.activations)
    name += fmt::format("/{}", kernels::text(kernels::values_of(problem.activations)));
  if (operations) name = problem.operation + " " + name;
  const format::Pattern& pattern = problem.pattern;
  if (pattern.kind == format::PatternKind::kBlock) name += " " + pattern.text();
  if (shapes) name += fmt::format(" {}x{}x{}", problem.outputs, problem.inputs, problem.tokens);
  return name;
}

bool is_sparse(const kernels::Problem& problem) { return problem != bench::dense_problem(problem); }

/// Draws the speedup over dense of each problem's fastest candidate against the share of zeros:
/// where a curve crosses 1, sparsity begins to pay.
Status write_chart(const std::string& file, const std::vector<bench::Comparison>& comparisons) {
  struct Best {
    kernels::Problem problem;
    double ratio = 0;
  };
  std::vector<Best> all;
  bool operations = false, shapes = false;
  for (const auto& comparison : comparisons)
    for (const kernels::Problem& problem : comparison.problems) {
      if (!is_sparse(problem)) continue;
      Best best{problem};
      for (const auto& record : comparison.records)
        if (record.problem == problem.text() && record.ratio)
          best.ratio = std::max(best.ratio, record.ratio->median);
      if (best.ratio == 0) continue;
      all.push_back(best);
      const kernels::Problem& first = all.front().problem;
      operations |= problem.operation != first.operation;
      shapes |= problem.outputs != first.outputs || problem.inputs != first.inputs ||
                problem.tokens != first.tokens;
    }
  if (all.empty()) return {};  // the run's own error says why
  std::map<std::string, report::Series> curves;
  report::Series dense{"dense", {}};
  for (const auto& [problem, ratio] : all) {
    report::Series& curve = curves[curve_of(problem, operations, shapes)];
    curve.points.push_back({problem.sparsity, ratio, problem.text()});
    dense.points.push_back({problem.sparsity, 1, "dense"});
  }
  std::vector<report::Series> series;
  for (auto& [name, curve] : curves) series.push_back({name, std::move(curve.points)});
  series.push_back(std::move(dense));
  for (auto& one : series)
    std::ranges::stable_sort(one.points, [](const auto& a, const auto& b) { return a.x < b.x; });
  return io::write_text(
      file, report::standalone(report::xy_chart({.title = "Speedup over the best dense product",
                                                 .x = "share of zeros",
                                                 .y = "speedup",
                                                 .lines = true},
                                                series)));
}

/// All that was timed, in the form that the file's name asks for.
Status write_table(const std::string& file, const std::vector<bench::Comparison>& comparisons,
                   const bench::Environment& environment) {
  std::string lines;
  report::Table table = new_table();
  for (const auto& comparison : comparisons) {
    add_rows(comparison, table);
    for (const auto& line : lines_of(comparison, environment)) lines += line.dump() + "\n";
  }
  return io::write_text(file, file.ends_with(".csv")  ? table.csv()
                              : file.ends_with(".md") ? table.markdown()
                                                      : lines);
}

/// An error if an output was wrong, or a problem found nobody to compute it.
Status check_all(const std::vector<bench::Comparison>& comparisons) {
  for (const auto& comparison : comparisons)
    if (!comparison.failed.empty()) {
      const bench::Untimed& first = comparison.failed.front();
      return check_failed("{} {}: {}. It was not timed.", first.problem, first.candidate,
                          first.why);
    }
  for (const auto& comparison : comparisons)
    for (const kernels::Problem& asked : comparison.problems)
      if (std::ranges::none_of(comparison.records,
                               [&](const auto& record) { return record.problem == asked.text(); }))
        return not_possible("{}: nothing here can compute it; the lines above say why.",
                            asked.text());
  return {};
}

Status bench_problems(Tool& tool, Flags& flags) {
  LACUNA_TRY(const auto groups, groups_of(flags));
  if (!flags.chart.empty() &&
      std::ranges::none_of(groups, [](const auto& g) { return std::ranges::any_of(g, is_sparse); }))
    return usage_error("--chart: no problem is sparse. Give some with a sparsity.");
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
  std::vector<bench::Comparison> comparisons;
  auto results = nlohmann::json::array();
  Status status;  // what ends the run early doesn't take with it what was measured before
  for (const auto& group : groups) {
    auto comparison =
        on_gpu ? bench::compare_on_gpu(group, flags.options, compute, progress.log,
                                       progress.interrupted)
               : bench::compare(group, flags.options, progress.log, progress.interrupted);
    if (!comparison.ok()) {
      status = comparison.error();
      break;
    }
    if (!tool.json()) tool.print({}, "\n" + text_of(*comparison));
    for (auto& result : results_of(*comparison, environment)) results.push_back(std::move(result));
    comparisons.push_back(std::move(comparison).value());
  }
  if (comparisons.empty()) return status;
  if (tool.json())
    tool.print(results.size() == 1 ? results[0] : nlohmann::json{{"results", results}}, "");
  if (!flags.table.empty()) LACUNA_CHECK(write_table(flags.table, comparisons, environment));
  if (!flags.chart.empty()) LACUNA_CHECK(write_chart(flags.chart, comparisons));
  return status.ok() ? check_all(comparisons) : status;
}

}  // namespace

void add_bench(Tool& tool) {
  auto* verb = tool.verb(
      "bench", "Time kernels on one problem, each checked first, against the best dense product.",
      {"lacuna bench linear_bitmap:bf16:4096x4096x1:0.5 linear_nm:bf16:4096x4096x1:2:4 --compare",
       "lacuna bench --cases bench/cases/decode.txt --json",
       "lacuna bench --cases bench/cases/break_even.txt --chart break-even.svg --table "
       "break-even.csv"});
  tool.runs_sparse(verb);
  tool.seeded(verb);
  static Flags flags;
  verb->add_option("PROBLEM", flags.problems, "OPERATION:VALUES[/ACTIVATIONS]:NxKxT[:SPARSITY]")
      ->check(accepted_by(parse_problem));
  const std::vector<CLI::Option*> of_problems = {
      verb->add_option("--cases", flags.cases, "file of problems, one a line"),
      verb->add_option("--seconds", flags.options.seconds, "of timed products, each round robin")
          ->check(above(0))
          ->capture_default_str(),
      verb->add_flag(
          "--compare", flags.compare,
          "time all problems of one shape together, so that they compare with each other"),
      verb->add_flag(
          "--all", flags.all,
          "time those too that are 8 times as slow as the fastest (they are checked anyway)"),
      verb->add_flag("--quick", flags.quick,
                     "one copy of each weight and a few products: a trial, no measurement"),
      verb->add_option("--table", flags.table,
                       "also write what was timed: .md, .csv, or .jsonl (one record a line)")
          ->check(named_like({".md", ".csv", ".jsonl"})),
      verb->add_option("--chart", flags.chart,
                       "also write a chart of the speedup against the sparsity: .svg")
          ->check(named_like({".svg"}))};

  auto* op = verb->add_subcommand("op", "Time kernels: the same as without this word.");
  auto* model = add_bench_model(verb);
  // PROBLEM, --json, --threads, ... belong to the verb.
  op->fallthrough();
  model->fallthrough();
  // Checked while parsing, so that it is a usage error before anything is made.
  verb->parse_complete_callback([verb, model, of_problems] {
    const bool problems = !flags.problems.empty() || !flags.cases.empty();
    if (model->parsed() && !flags.problems.empty())
      throw CLI::ValidationError("PROBLEM: `bench model` takes a model alone.");
    for (const CLI::Option* option : of_problems)
      if (model->parsed() && option->count() > 0)
        throw CLI::ValidationError(option->get_name() + ": of problems, not of `bench model`.");
    if (!model->parsed() && !problems && verb->parsed())
      throw CLI::RequiredError("PROBLEM or --cases or `model MODEL`");
    if (!model->parsed()) return;
    if (const Status status = check_bench_model(); !status.ok())
      throw CLI::ValidationError(status.error().message);
  });
  tool.action(verb, [&tool, model]() -> Status {
    return model->parsed() ? run_bench_model(tool) : bench_problems(tool, flags);
  });
}

}  // namespace lacuna::cli
