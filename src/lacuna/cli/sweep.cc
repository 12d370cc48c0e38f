#include "lacuna/api/sweep.h"

#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <map>

#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"
#include "lacuna/io/file.h"
#include "lacuna/report/svg.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {
namespace {

std::string cell(const std::optional<double>& value, const char* format) {
  return value ? fmt::format(fmt::runtime(format), *value) : "-";
}

/// What speed-up a prediction is of the dense model's: "0.412 (1.61x)".
std::string speed_cell(const api::SweepMeasure& measure, const api::SweepMeasure& dense) {
  if (!measure.milliseconds) return "-";
  const std::string time = fmt::format("{:.3f}", *measure.milliseconds);
  if (!dense.milliseconds) return time;
  return fmt::format("{} ({:.2f}x)", time, *dense.milliseconds / *measure.milliseconds);
}

/// How much perplexity statistics of the dense model cost: "+1.83 %".
std::string lost_cell(const api::SweepRow& row) {
  return row.lost() ? fmt::format("{:+.2f} %", 100 * *row.lost()) : "-";
}

bool any(const api::SweepReport& report, bool (*of)(const api::SweepRow&)) {
  return std::any_of(report.rows.begin(), report.rows.end(), of);
}

/// With columns of codes and of the comparison where there is something to tell.
report::Table table_of(const api::SweepReport& report) {
  const bool coded = any(report, [](const auto& row) { return row.code != "none"; });
  const bool compared = any(report, [](const auto& row) { return row.propagated.has_value(); });
  using Cells = std::vector<std::string>;
  const auto line = [&](Cells cells, const std::string& code, const Cells& figures,
                        const Cells& comparison, const Cells& back) {
    if (coded) cells.push_back(code);
    cells.insert(cells.end(), figures.begin(), figures.end());
    if (compared) cells.insert(cells.end(), comparison.begin(), comparison.end());
    cells.insert(cells.end(), back.begin(), back.end());
    return cells;
  };
  const auto figures = [](const std::string& sparsity, const std::string& error,
                          const api::SweepMeasure& measure) {
    return Cells{sparsity, error, bytes_text(measure.bytes), cell(measure.perplexity, "{:.3f}"),
                 cell(measure.kl, "{:.4f}")};
  };
  report::Table table(line({"method", "pattern"}, "code",
                           {"sparsity", "layer error", "bytes", "perplexity", "KL to dense"},
                           {"propagated", "lost"}, {"ms a token", "best"}));
  table.add(line({"dense", ""}, "", figures("", "", report.dense), {"", ""},
                 {speed_cell(report.dense, report.dense), ""}));
  for (const auto& row : report.rows)
    table.add(
        line({row.method, row.pattern}, row.code,
             figures(fmt::format("{:.4f}", row.sparsity), fmt::format("{:.4f}", row.layer_error),
                     row.measure),
             {row.propagated ? cell(row.propagated->perplexity, "{:.3f}") : "-", lost_cell(row)},
             {speed_cell(row.measure, report.dense), row.best ? "*" : ""}));
  return table;
}

std::string saving(const api::SweepMeasure& measure, const api::SweepMeasure& dense) {
  return fmt::format("{:.1f} %", 100 * (1 - static_cast<double>(measure.bytes) /
                                                static_cast<double>(dense.bytes)));
}

report::Table frontier_table(const api::SweepReport& report) {
  report::Table table(
      {"method", "code", "largest sparsity", "perplexity", "bytes", "memory saved", "ms a token"});
  for (const auto& row : report.frontier)
    table.add({row.method, row.code, row.sparsity ? fmt::format("{:.2f}", *row.sparsity) : "none",
               cell(row.measure.perplexity, "{:.3f}"), bytes_text(row.measure.bytes),
               saving(row.measure, report.dense), speed_cell(row.measure, report.dense)});
  return table;
}

nlohmann::json to_json(const api::SweepMeasure& measure) {
  nlohmann::json json = {{"bytes", measure.bytes}};
  json["perplexity"] = measure.perplexity ? nlohmann::json(*measure.perplexity) : nullptr;
  json["kl_mean"] = measure.kl ? nlohmann::json(*measure.kl) : nullptr;
  json["predicted_ms"] = measure.milliseconds ? nlohmann::json(*measure.milliseconds) : nullptr;
  if (!measure.no_milliseconds.empty()) json["no_prediction"] = measure.no_milliseconds;
  return json;
}

nlohmann::json to_json(const api::SweepReport& report, const api::SweepJob& job) {
  nlohmann::json rows = nlohmann::json::array(), frontier = nlohmann::json::array();
  for (const auto& row : report.rows) {
    nlohmann::json one = to_json(row.measure);
    one.update({{"method", row.method},
                {"pattern", row.pattern},
                {"code", row.code},
                {"sparsity", row.sparsity},
                {"layer_error", row.layer_error},
                {"fell_back", row.fell_back},
                {"best", row.best}});
    if (row.propagated) {
      one["propagated"] = to_json(*row.propagated);
      one["lost"] = row.lost() ? nlohmann::json(*row.lost()) : nullptr;
    }
    if (!row.folder.empty()) one["folder"] = row.folder.string();
    rows.push_back(std::move(one));
  }
  for (const auto& row : report.frontier) {
    nlohmann::json one = to_json(row.measure);
    one.update({{"method", row.method}, {"code", row.code}, {"probes", row.probes}});
    one["sparsity"] = row.sparsity ? nlohmann::json(*row.sparsity) : nullptr;
    frontier.push_back(std::move(one));
  }
  nlohmann::json json = {{"verb", "sweep"},
                         {"model", job.model.string()},
                         {"statistics", job.statistics.string()},
                         {"text", job.text.empty() ? nlohmann::json() : nlohmann::json(job.text)},
                         {"dense", to_json(report.dense)},
                         {"rows", std::move(rows)},
                         {"prune_seconds", report.prune_seconds},
                         {"measure_seconds", report.measure_seconds}};
  if (job.propagated != api::Propagated::kNone) json["compare_seconds"] = report.compare_seconds;
  if (job.frontier) {
    json["frontier"] = std::move(frontier);
    json["frontier_tolerance"] = report.frontier_tolerance;
    json["frontier_seconds"] = report.frontier_seconds;
  }
  return json;
}

/// What a point of the chart says when one points at it.
std::string hover_of(const api::SweepRow& row) {
  std::string text = row.pattern;
  if (row.lost())
    text += fmt::format(", through the pruned blocks {:.3f} ({} lost)", *row.propagated->perplexity,
                        lost_cell(row));
  return text;
}

/// Perplexity against bytes, or where none was measured layer error; a curve a method and code.
std::string chart_of(const api::SweepReport& report) {
  const bool measured = report.dense.perplexity.has_value();
  std::map<std::string, report::Series> series;
  for (const auto& row : report.rows) {
    const std::string name = row.code == "none" ? row.method : row.method + " " + row.code;
    auto& own = series[name];
    own.name = name;
    own.points.push_back({static_cast<double>(row.measure.bytes) / 1e6,
                          row.measure.perplexity.value_or(row.layer_error), hover_of(row)});
  }
  std::vector<report::Series> all;
  for (auto& [method, own] : series) {
    std::stable_sort(own.points.begin(), own.points.end(),
                     [](const auto& a, const auto& b) { return a.x < b.x; });
    all.push_back(own);
  }
  if (measured)
    all.push_back(
        {"dense",
         {{static_cast<double>(report.dense.bytes) / 1e6, *report.dense.perplexity, "dense"}}});
  report::Axes axes{.title = measured ? "Perplexity against size (lower left is better)"
                                      : "Layer error against size (lower left is better)",
                    .x = "size, MB",
                    .y = measured ? "perplexity" : "mean layer error",
                    .lines = true};
  axes.log_y = true;
  return report::standalone(report::xy_chart(axes, all));
}

/// Why times are missing: every reason once, with the rows that it is true of.
/// @param front  of each line
std::string remarks_of(const api::SweepReport& report, std::string_view front = "") {
  std::vector<std::pair<std::string, std::vector<std::string>>> reasons;  // in order of the rows
  const auto note = [&](const std::string& row, const api::SweepMeasure& measure) {
    if (measure.milliseconds) return;
    const auto found = std::find_if(reasons.begin(), reasons.end(), [&](const auto& reason) {
      return reason.first == measure.no_milliseconds;
    });
    auto& rows = found != reasons.end()
                     ? *found
                     : reasons.emplace_back(measure.no_milliseconds, std::vector<std::string>());
    if (std::find(rows.second.begin(), rows.second.end(), row) == rows.second.end())
      rows.second.push_back(row);
  };
  note("dense", report.dense);
  for (const auto& row : report.rows)
    note(row.code == "none" ? row.pattern : row.pattern + " " + row.code, row.measure);
  for (const auto& row : report.frontier) note("frontier " + row.code, row.measure);
  std::string text;
  for (const auto& [reason, rows] : reasons)
    text += fmt::format("{}no predicted time of {}: {}\n", front, fmt::join(rows, ", "), reason);
  return text;
}

std::string text_of(const api::SweepReport& report) {
  std::string text = table_of(report).text();
  if (!report.frontier.empty())
    text += fmt::format("\nwithin {:g} % of the dense perplexity:\n{}",
                        100 * report.frontier_tolerance, frontier_table(report).text());
  text += remarks_of(report) + fmt::format("pruned in {:.1f} s, measured in {:.1f} s",
                                           report.prune_seconds, report.measure_seconds);
  if (report.compare_seconds > 0)
    text += fmt::format(", compared in {:.1f} s", report.compare_seconds);
  if (!report.frontier.empty())
    text += fmt::format(", frontier in {:.1f} s", report.frontier_seconds);
  return text + "\n";
}

/// A file that is written at the end: that it can be is known before hours of pruning.
Status check_writable(const char* flag, const std::filesystem::path& file) {
  if (file.empty()) return {};
  namespace fs = std::filesystem;
  const fs::path folder = file.has_parent_path() ? file.parent_path() : fs::path(".");
  std::error_code ignored;
  if (!fs::is_directory(folder, ignored))
    return bad_input("{} {}: there is no folder {}. Make it first.", flag, file.string(),
                     folder.string());
  if (access(folder.c_str(), W_OK | X_OK) != 0)
    return bad_input("{} {}: {} can't be written ({}). Name another place.", flag, file.string(),
                     folder.string(), std::strerror(errno));
  if (fs::is_directory(file, ignored))
    return bad_input("{} {}: is a folder. Name a file.", flag, file.string());
  return {};
}

/// Markdown or CSV, by the file's name.
Status write_table(const api::SweepReport& report, const std::filesystem::path& file) {
  if (file.extension() == ".csv") return io::write_text(file, table_of(report).csv());
  std::string text = table_of(report).markdown();
  if (!report.frontier.empty()) text += "\n" + frontier_table(report).markdown();
  if (const std::string remarks = remarks_of(report, "- "); !remarks.empty())
    text += "\n" + remarks;
  return io::write_text(file, text);
}

}  // namespace

void add_sweep(Tool& tool) {
  auto* verb = tool.verb(
      "sweep", "Prune a model in many ways from one calibration and hold the results together.",
      {"lacuna prune models/llama -o models/llama-50 --save-statistics llama.statistics",
       "lacuna sweep models/llama --statistics llama.statistics --methods wanda,sparsegpt,alps "
       "--patterns 0.5,0.6,0.7,2:4 --text wiki.test.raw",
       "lacuna sweep models/llama --statistics llama.statistics --methods alps,alps+swaps "
       "--patterns 0.5,4:8 --write models/sweep --table sweep.md --chart sweep.svg",
       "lacuna sweep models/llama --statistics llama.statistics --methods alps --patterns 0.5 "
       "--text wiki.test.raw --frontier 0.05",
       "lacuna sweep models/llama --statistics llama.statistics --methods wanda,alps --patterns "
       "0.5,2:4,2:4+dense@0.4 --quantize none,int4 --text wiki.test.raw --compare-propagated "
       "--calibration c4.jsonl"});
  static api::SweepJob job;
  static std::string protocol = "raw-file", table, chart, propagated = "best";
  static double frontier = 0.05;
  tool.runs_sparse(verb);
  tool.seeded(verb);
  tool.model(verb, job.model, "dense model folder");
  verb->add_option("--statistics", job.statistics,
                   "of the dense model: what `prune --save-statistics` wrote")
      ->required();
  verb->add_option("--methods", job.methods,
                   "as `prune --method` has them, refinements behind a plus: alps+swaps")
      ->delimiter(',')
      ->required()
      ->check(accepted_by(api::parse_sweep_method));
  verb->add_option("--patterns", job.patterns,
                   "sparsities (0.5), KEEP:OF, block:RxC@SPARSITY or KEEP:OF+dense@SPARSITY")
      ->delimiter(',')
      ->required()
      ->check(accepted_by(api::SweepPattern::parse));
  verb->add_option("--quantize", job.codes,
                   "codes for the kept weights, made in the same pass as `prune --quantize` does: "
                   "none, int8, int4, int4g32, fp8, ...; every combination with each")
      ->delimiter(',')
      ->check(
          accepted_by([](const std::string& text) { return format::Quantization::parse(text); }))
      ->capture_default_str();
  verb->add_option("--text", job.text,
                   "text or .jsonl file, or a data set name, to measure perplexity and KL on");
  verb->add_option("--protocol", protocol, "as in `eval`: raw-file or hf-rows")
      ->check(accepted_by([](const std::string& text) { return eval::parse_protocol(text); }))
      ->capture_default_str();
  verb->add_option("--length", job.evaluation.length, "tokens a window")
      ->check(between(2, 1 << 20))
      ->capture_default_str();
  verb->add_option("--windows", job.evaluation.windows, "this many, evenly spread (0 = all)")
      ->check(between(0))
      ->capture_default_str();
  verb->add_option("--damping", job.damping, "as in `prune`")
      ->check(above(0))
      ->capture_default_str();
  auto* write =
      verb->add_option("--write", job.write, "keep the models in this folder, METHOD-PATTERN each");
  verb->add_flag("--overwrite", job.overwrite, "replace finished models there")->needs(write);
  verb->add_flag("--resume", job.resume, "go on where an interrupted sweep stopped")->needs(write);
  verb->add_option("--table", table, "also write the table: .md or .csv")
      ->check(named_like({".md", ".csv"}));
  verb->add_option("--chart", chart, "also write a chart: .svg")->check(named_like({".svg"}));
  auto* edge = verb->add_option(
      "--frontier", frontier,
      "look for the largest sparsity, alone and with int8 and int4, whose perplexity is at most "
      "this much (0.05: 5 %) above the dense model's");
  edge->expected(0, 1)->default_str("0.05")->check(above(0));
  auto* compared = verb->add_option(
      "--compare-propagated", propagated,
      "also prune through the pruned blocks, as `prune` does without --statistics, and tell what "
      "statistics of the dense model lose: best (row of each pattern) or all");
  compared->expected(0, 1)->default_str("best")->check(accepted_by(api::parse_propagated));
  verb->add_option("--calibration", job.calibration,
                   "with --compare-propagated: what the statistics were calibrated with, as in "
                   "`prune`; samples and length are those of the statistics")
      ->needs(compared);
  verb->add_option("--calibration-ids", job.calibration_ids,
                   "with --compare-propagated: its token ids, as in `prune`")
      ->needs(compared);
  tool.action(verb, [&tool, edge, compared]() -> Status {
    LACUNA_CHECK(check_writable("--table", table));
    LACUNA_CHECK(check_writable("--chart", chart));
    if (edge->count() > 0) job.frontier = frontier;
    if (compared->count() > 0) {
      LACUNA_TRY(job.propagated, api::parse_propagated(propagated));
    }
    job.seed = tool.seed();
    LACUNA_TRY(job.evaluation.protocol, eval::parse_protocol(protocol));
    job.choice = tool.compute();
    LACUNA_TRY(const auto report, api::sweep(job, tool.stoppable_progress()));
    if (!table.empty()) LACUNA_CHECK(write_table(report, table));
    if (!chart.empty()) LACUNA_CHECK(io::write_text(chart, chart_of(report)));
    tool.print(to_json(report, job), text_of(report));
    return {};
  });
}

}  // namespace lacuna::cli
