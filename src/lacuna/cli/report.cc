#include "lacuna/cli/tool.h"
#include "lacuna/report/html.h"

namespace lacuna::cli {

void add_report(Tool& tool) {
  auto* verb = tool.verb("report", "Make one HTML page from the JSON that other verbs printed.",
                         {"lacuna report prune.json eval.json -o report.html",
                          "lacuna report runs/*.json -o report.html --json"});
  static std::vector<std::filesystem::path> runs;
  static std::filesystem::path out;
  verb->add_option("RUN", runs, "JSON files")->required();
  verb->add_option("-o,--out", out, "HTML file to write")->required();
  tool.action(verb, [&tool]() -> Status {
    LACUNA_CHECK(report::write_html(runs, out));
    const std::string path = std::filesystem::absolute(out).string();
    tool.print({{"verb", "report"}, {"path", path}}, path + "\n");
    return {};
  });
}

}  // namespace lacuna::cli
