#include "lacuna/api/inspect.h"

#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {

void add_inspect(Tool& tool) {
  auto* verb =
      tool.verb("inspect", "Say what a model folder holds: tensors, bytes, patterns, sparsity.",
                {"lacuna inspect models/llama", "lacuna inspect models/llama-24 --json"});
  static std::filesystem::path model;
  tool.model(verb, model, "model folder");
  tool.action(verb, [&tool]() -> Status {
    LACUNA_TRY(const auto report, api::inspect(model));
    report::Table table({"layer", "shape", "values", "format", "pattern", "sparsity", "bytes"});
    for (const auto& layer : report.layers)
      table.add({layer.name, shape_text(layer.shape),
                 layer.quantization == "none" ? layer.dtype : layer.quantization, layer.format,
                 layer.pattern, fmt::format("{:.4f}", layer.sparsity), bytes_text(layer.bytes)});
    tool.print(
        to_json(report),
        fmt::format("{}{}: {} parameters in {} tensors, {} ({} dense), sparsity of the block "
                    "layers {:.4f}\n",
                    table.text(), report.architecture, report.parameters, report.tensors,
                    bytes_text(report.bytes), bytes_text(report.bytes_dense), report.sparsity));
    return {};
  });
}

}  // namespace lacuna::cli
