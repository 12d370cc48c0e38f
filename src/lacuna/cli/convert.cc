#include "lacuna/cli/tool.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {

void add_convert(Tool& tool) {
  auto* verb = tool.verb("convert", "Bring a GGUF file or a model folder into another store.",
                         {"lacuna convert SmolLM2-135M-Instruct.Q4_1.gguf -o models/smollm2",
                          "lacuna convert models/llama-24 -o models/llama-24-dense --store dense"});
  struct Flags {
    std::filesystem::path model;
    std::string out, store = "compact";
  };
  static Flags flags;
  tool.threaded(verb);
  tool.model(verb, flags.model, "model folder, .gguf file, or llama2.c .bin file");
  verb->add_option("-o,--out", flags.out, "folder to write")->required();
  verb->add_option("--store", flags.store, "compact, dense or compressed-tensors (for a folder)")
      ->check(accepted_by([](const std::string& text) { return api::parse_store(text); }))
      ->capture_default_str();
  tool.action(verb, [&tool]() -> Status {
    LACUNA_TRY(const auto store, api::parse_store(flags.store));
    model::set_threads(tool.compute().threads);
    LACUNA_TRY(const auto report, api::convert(flags.model, flags.out, store, tool.progress()));
    tool.print({{"verb", "convert"},
                {"out", report.out},
                {"bytes_in", report.bytes_in},
                {"bytes_out", report.bytes_out}},
               fmt::format("{}: {} from {}\n", report.out,
                           report::bytes_text(static_cast<double>(report.bytes_out)),
                           report::bytes_text(static_cast<double>(report.bytes_in))));
    return {};
  });
}

}  // namespace lacuna::cli
