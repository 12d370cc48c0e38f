#include "lacuna/api/mask_delta.h"
#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"

namespace lacuna::cli {

void add_diff(Tool& tool) {
  auto* verb = tool.verb(
      "diff", "Write what a pruned model keeps of a dense one: about a bit a weight.",
      {"lacuna diff models/llama models/llama-wanda-24 -o llama-24.mask.lacuna",
       "lacuna diff models/llama models/llama-alps-50 -o llama-50.mask.lacuna --mask-only"});
  static std::filesystem::path dense, sparse, out;
  static bool mask_only = false;
  verb->add_option("DENSE", dense, "dense model folder")->required();
  verb->add_option("SPARSE", sparse, "the same model, pruned")->required();
  verb->add_option("-o,--out", out, "file to write")->required();
  verb->add_flag(
      "--mask-only", mask_only,
      "also where kept values were changed: the file then gives the mask, not the model");
  tool.action(verb, [&tool]() -> Status {
    LACUNA_TRY(const auto report, api::diff(dense, sparse, out, mask_only, tool.progress()));
    nlohmann::json changed = nlohmann::json::array();
    int64_t values = 0;
    for (const auto& weight : report.changed) {
      changed.push_back(
          {{"name", weight.name}, {"changed", weight.changed}, {"kept", weight.kept}});
      values += weight.changed;
    }
    std::string text = fmt::format(
        "{}: masks of {} weights, {} ({:.3f} bits a weight; the pruned model takes {})\n",
        report.out, report.weights, bytes_text(report.bytes), report.bits_per_weight,
        bytes_text(report.bytes_sparse));
    if (!report.changed.empty())
      text += fmt::format("left out: {} values in {} weights that differ from the dense model\n",
                          values, report.changed.size());
    tool.print({{"verb", "diff"},
                {"path", report.out},
                {"bytes", report.bytes},
                {"bytes_sparse", report.bytes_sparse},
                {"weights", report.weights},
                {"bits_per_weight", report.bits_per_weight},
                {"changed", std::move(changed)}},
               text);
    return {};
  });
}

}  // namespace lacuna::cli
