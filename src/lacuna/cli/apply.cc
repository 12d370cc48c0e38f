#include "lacuna/api/mask_delta.h"
#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"

namespace lacuna::cli {

void add_apply(Tool& tool) {
  auto* verb = tool.verb(
      "apply", "Make the pruned model of a dense one and a mask that `diff` wrote.",
      {"lacuna apply models/llama llama-24.mask.lacuna -o models/llama-24",
       "lacuna apply models/llama llama-24.mask.lacuna -o models/llama-24-dense --store dense"});
  static std::filesystem::path model, mask, out;
  static std::string store = "compact";
  tool.model(verb, model, "dense model folder: the one that the mask was taken from");
  verb->add_option("MASK", mask, "file that `diff` wrote")->required();
  tool.writes(verb, out);
  verb->add_option("--store,--format", store, "compact, dense or compressed-tensors")
      ->check(accepted_by([](const std::string& text) { return api::parse_store(text); }))
      ->capture_default_str();
  tool.action(verb, [&tool]() -> Status {
    LACUNA_TRY(const io::Store as, api::parse_store(store));
    LACUNA_TRY(const auto report, api::apply(model, mask, out, as, tool.progress()));
    tool.print({{"verb", "apply"},
                {"out", report.out},
                {"bytes_dense", report.bytes_dense},
                {"bytes_out", report.bytes_out},
                {"weights", report.weights},
                {"sparsity", report.sparsity}},
               fmt::format("{}: {} weights masked, sparsity {:.4f}, {} (dense {})\n", report.out,
                           report.weights, report.sparsity, bytes_text(report.bytes_out),
                           bytes_text(report.bytes_dense)));
    return {};
  });
}

}  // namespace lacuna::cli
