#include "lacuna/api/doctor.h"

#include <algorithm>

#include "lacuna/api/measure.h"
#include "lacuna/cli/tool.h"

namespace lacuna::cli {
namespace {

/// Every candidate of one problem, with what decided.
Status explain(Tool& tool, const std::string& op) {
  LACUNA_TRY(const auto report, api::explain_operation(op));
  size_t width = 0;
  for (const auto& line : report.candidates) width = std::max(width, line.candidate.size());
  std::string text = report.problem + "\n";
  for (const auto& line : report.candidates)
    text += fmt::format("{} {:{}}  {}{}{}\n", line.chosen ? '*' : ' ', line.candidate, width,
                        line.support ? "yes" : line.support.refusal(),
                        line.note.empty() ? "" : "; ", line.note);
  auto json = to_json(report);
  json["tuned"] = tool.tuned().state;
  tool.print(json, text + fmt::format("measured table: {}\n", tool.tuned().state));
  return report.status;
}

}  // namespace

void add_doctor(Tool& tool) {
  auto* verb =
      tool.verb("doctor", "Say what this machine has, what of it is used, and what is missing.",
                {"lacuna doctor", "lacuna doctor --op linear_stream:bf16:4096x4096x1:0.5"});
  static std::string op;
  verb->add_option("--op", op, "which kernel this problem gets, and why the others don't");
  tool.action(verb, [&tool]() -> Status {
    if (!op.empty()) return explain(tool, op);
    const auto report = api::doctor();
    std::string text =
        fmt::format("cpu       {} ({} cores used)\nfeatures ", report.cpu, report.cores);
    for (const auto& feature : report.features) text += " " + feature;
    text += "\n";
    for (const auto& gpu : report.gpus) text += fmt::format("gpu       {}\n", gpu);
    for (const auto& library : report.libraries) text += fmt::format("library   {}\n", library);
    for (const auto& line : report.missing) text += fmt::format("missing   {}\n", line);
    text += fmt::format("tuned     {}\n", tool.tuned().state);
    auto json = to_json(report);
    json["tuned"] = tool.tuned().state;
    tool.print(json, text);
    return {};
  });
}

}  // namespace lacuna::cli
