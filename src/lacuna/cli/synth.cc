#include "lacuna/model/synth.h"
#include "lacuna/core/memory.h"

#include "lacuna/cli/tool.h"

namespace lacuna::cli {
namespace {

struct Flags {
  model::SynthOptions options;
  std::filesystem::path out;
  std::string pattern, quantize, store = "compact";
};

/// `given`: --sparsity was on the command line.
Status settle(Flags& flags, bool given) {
  model::SynthOptions& options = flags.options;
  if (flags.pattern.empty() && given) flags.pattern = "unstructured";
  if (!flags.pattern.empty()) {
    LACUNA_TRY(options.pattern, sparse_pattern(flags.pattern));
    LACUNA_TRY(options.sparsity, settle_sparsity(options.pattern, options.sparsity, given));
  }
  LACUNA_TRY(options.store, api::parse_store(flags.store));
  if (flags.quantize.empty()) return {};
  LACUNA_TRY(options.quantization, format::Quantization::parse(flags.quantize));
  if (options.store != io::Store::kCompact)
    return usage_error("--quantize: the compact store alone has codes (got --store {}).",
                       flags.store);
  return {};
}

}  // namespace

void add_synth(Tool& tool) {
  auto* verb = tool.verb(
      "synth", "Write a random-weight model of a known shape, for sizing and timing.",
      {"lacuna synth --like tinyllama-1.1b -o models/random",
       "lacuna synth --like llama-3.2-1b --pattern 2:4 -o models/random-24",
       "lacuna synth --like llama-3.2-1b --pattern 2:4 --quantize int8 -o models/24-int8"});
  static Flags flags;
  tool.threaded(verb);
  tool.seeded(verb);
  verb->add_option("--like", flags.options.like, "shape")
      ->required()
      ->check(CLI::IsMember(model::synth_names()));
  tool.writes(verb, flags.out);
  verb->add_option("--pattern", flags.pattern, "make it sparse: unstructured, KEEP:OF or block:RxC")
      ->check(accepted_by(sparse_pattern));
  auto* sparsity = verb->add_option("--sparsity", flags.options.sparsity, "share of zeros")
                       ->check(share())
                       ->capture_default_str();
  verb->add_option("--quantize", flags.quantize,
                   "int8, int4, fp8 (gGROUP, z behind it) for the weights of the blocks, as "
                   "`convert` does it; embedding and output matrix become int8")
      ->check(accepted_by(format::Quantization::parse));
  verb->add_option("--store", flags.store, "compact or dense")
      ->check(CLI::IsMember({"compact", "dense"}))
      ->capture_default_str();
  // Checked while parsing, so that a contradiction is a usage error before anything is written.
  verb->parse_complete_callback([sparsity] {
    if (const Status status = settle(flags, sparsity->count() > 0); !status.ok())
      throw CLI::ValidationError(status.error().message);
  });
  tool.action(verb, [&tool]() -> Status {
    flags.options.seed = tool.seed();
    model::set_threads(tool.compute().threads);
    LACUNA_TRY(const auto report, model::synth(flags.options, flags.out));
    tool.print({{"verb", "synth"},
                {"out", flags.out.string()},
                {"parameters", report.parameters},
                {"bytes", report.bytes}},
               fmt::format("{}: {} parameters, {}\n", flags.out.string(), report.parameters,
                           bytes_text(report.bytes)));
    return {};
  });
}

}  // namespace lacuna::cli
