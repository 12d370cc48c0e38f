#include "lacuna/api/doctor.h"

#include "lacuna/cli/tool.h"

namespace lacuna::cli {

void add_doctor(Tool& tool) {
  auto* verb =
      tool.verb("doctor", "Say what this machine has, what of it is used, and what is missing.",
                {"lacuna doctor", "lacuna doctor --json"});
  tool.action(verb, [&tool]() -> Status {
    const auto report = api::doctor();
    std::string text =
        fmt::format("cpu       {} ({} cores used)\nfeatures ", report.cpu, report.cores);
    for (const auto& feature : report.features) text += " " + feature;
    text += "\n";
    for (const auto& gpu : report.gpus) text += fmt::format("gpu       {}\n", gpu);
    for (const auto& library : report.libraries) text += fmt::format("library   {}\n", library);
    for (const auto& line : report.missing) text += fmt::format("missing   {}\n", line);
    tool.print(to_json(report), text);
    return {};
  });
}

}  // namespace lacuna::cli
