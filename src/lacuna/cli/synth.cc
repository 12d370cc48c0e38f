#include "lacuna/model/synth.h"

#include "lacuna/cli/tool.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {

void add_synth(Tool& tool) {
  auto* verb =
      tool.verb("synth", "Write a random-weight model of a known shape, for sizing and timing.",
                {"lacuna synth --like tinyllama-1.1b -o models/random",
                 "lacuna synth --like llama-3.2-1b --pattern 2:4 -o models/random-24"});
  struct Flags {
    model::SynthOptions options;
    std::string out, pattern, store = "compact";
  };
  static Flags flags;
  verb->add_option("--like", flags.options.like, "shape")
      ->required()
      ->check(CLI::IsMember(model::synth_names()));
  verb->add_option("-o,--out", flags.out, "folder to write")->required();
  verb->add_option("--pattern", flags.pattern, "make it sparse: unstructured, KEEP:OF or block:RxC")
      ->check(accepted_by([](const std::string& text) { return format::Pattern::parse(text); }));
  auto* sparsity = verb->add_option("--sparsity", flags.options.sparsity, "share of zeros")
                       ->check(CLI::Range(0.0, 1.0))
                       ->capture_default_str();
  verb->add_option("--store", flags.store, "compact or dense")
      ->check(CLI::IsMember({"compact", "dense"}))
      ->capture_default_str();
  tool.action(verb, [&tool, sparsity]() -> Status {
    if (flags.pattern.empty() && sparsity->count() > 0) flags.pattern = "unstructured";
    if (!flags.pattern.empty()) {
      LACUNA_TRY(flags.options.pattern, format::Pattern::parse(flags.pattern));
    }
    LACUNA_TRY(flags.options.store, api::parse_store(flags.store));
    flags.options.seed = tool.seed();
    model::set_threads(tool.compute().threads);
    LACUNA_TRY(const auto report, model::synth(flags.options, flags.out));
    tool.print({{"verb", "synth"},
                {"out", flags.out},
                {"parameters", report.parameters},
                {"bytes", report.bytes}},
               fmt::format("{}: {} parameters, {}\n", flags.out, report.parameters,
                           report::bytes_text(static_cast<double>(report.bytes))));
    return {};
  });
}

}  // namespace lacuna::cli
