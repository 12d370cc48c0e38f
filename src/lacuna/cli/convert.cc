#include <map>

#include "lacuna/cli/tool.h"
#include "lacuna/core/memory.h"

namespace lacuna::cli {
namespace {

/// "16x32" as the pattern of such blocks.
Result<format::Pattern> parse_blocks(const std::string& text) {
  auto blocks = format::Pattern::parse("block:" + text);
  if (blocks.ok()) return blocks;
  return usage_error("--block-size: not the size of a block (got {}; need RxC, each 1..4096).",
                     text);
}

nlohmann::json to_json(const std::vector<api::QuantizedWeight>& weights) {
  nlohmann::json all = nlohmann::json::array();
  for (const auto& weight : weights)
    all.push_back({{"name", weight.name},
                   {"pattern", weight.pattern},
                   {"from", weight.from},
                   {"to", weight.to},
                   {"bytes_in", weight.bytes_in},
                   {"bytes_out", weight.bytes_out},
                   {"kept", weight.kept},
                   {"rounded_to_zero", weight.rounded_to_zero}});
  return all;
}

/// A line for all weights that became the same, and one on their masks.
std::string text_of(const std::vector<api::QuantizedWeight>& weights) {
  std::map<std::string, std::vector<const api::QuantizedWeight*>> alike;
  for (const auto& weight : weights)
    alike[fmt::format("{} {} to {}", weight.pattern, weight.from, weight.to)].push_back(&weight);
  std::string text;
  for (const auto& [what, group] : alike) {
    double in = 0, out = 0;
    int64_t kept = 0, rounded = 0;
    for (const auto* weight : group) {
      in += static_cast<double>(weight->bytes_in);
      out += static_cast<double>(weight->bytes_out);
      kept += weight->kept;
      rounded += weight->rounded_to_zero;
    }
    text += fmt::format(
        "  {}, {}: {} from {}; {:.2f} % of what is kept rounds to 0 and stays kept\n",
        group.size() == 1 ? group[0]->name : fmt::format("{} weights", group.size()), what,
        bytes_text(out), bytes_text(in),
        100.0 * static_cast<double>(rounded) / static_cast<double>(std::max<int64_t>(kept, 1)));
  }
  return text + "  masks unchanged in what was written\n";
}

}  // namespace

void add_convert(Tool& tool) {
  auto* verb = tool.verb(
      "convert", "Bring a GGUF file or a model folder into another store, or quantise it.",
      {"lacuna convert SmolLM2-135M-Instruct.Q4_1.gguf -o models/smollm2",
       "lacuna convert models/llama-24 -o models/llama-24-dense --store dense",
       "lacuna convert models/llama-50 -o models/llama-50-csr --format csr",
       "lacuna convert models/llama-50 -o models/llama-50-bsr --format bsr --block-size 16x16",
       "lacuna convert models/llama-24 -o models/llama-24-int4 --quantize int4"});
  struct Flags {
    std::filesystem::path model, out;
    std::string store = "compact", block_size, quantize;
    int64_t group = 0;
    bool zero_points = false, keep_head = false;
    Result<format::Pattern> blocks() const {
      if (block_size.empty()) return format::Pattern();
      if (store != "bsr")
        return usage_error("--block-size: only bsr has blocks (got {}). Say --format bsr.", store);
      return parse_blocks(block_size);
    }
    Result<format::Quantization> quantization() const {
      if (quantize.empty()) return format::Quantization{};
      return parse_codes(quantize, group, zero_points);
    }
  };
  static Flags flags;
  tool.threaded(verb);
  tool.model(verb, flags.model, "model folder, .gguf file, or llama2.c .bin file");
  tool.writes(verb, flags.out);
  verb->add_option("--store,--format", flags.store,
                   "of a folder: compact, dense or compressed-tensors; csr, coo or bsr for other "
                   "programs")
      ->check(accepted_by([](const std::string& text) { return api::parse_store(text); }))
      ->capture_default_str();
  verb->add_option("--block-size", flags.block_size,
                   "bsr: RxC (default: the blocks of the model's pattern, else 32x32)")
      ->check(accepted_by(parse_blocks));
  auto* quantize =
      verb->add_option("--quantize", flags.quantize,
                       "codes for the weights of the blocks: int8, int4, fp8 (int4row: "
                       "one scale a row); embedding and output matrix become int8. "
                       "Masks stay as they are")
          ->check(accepted_by([](const std::string& text) { return parse_codes(text); }));
  verb->add_option("--group", flags.group,
                   "columns that share a scale (int4: 64 unless given; int8, fp8: the whole row)")
      ->check(CLI::IsMember({32, 64, 128}))
      ->needs(quantize);
  verb->add_flag("--zero-points", flags.zero_points, "int4: a zero point for every scale")
      ->needs(quantize);
  verb->add_flag("--keep-head", flags.keep_head, "leave embedding and output matrix as they are")
      ->needs(quantize);
  tool.action(verb, [&tool]() -> Status {
    api::ConvertOptions options{.keep_head = flags.keep_head};
    LACUNA_TRY(options.store, api::parse_store(flags.store));
    LACUNA_TRY(options.blocks, flags.blocks());
    LACUNA_TRY(options.quantization, flags.quantization());
    model::set_threads(tool.compute().threads);
    LACUNA_TRY(const auto report, api::convert(flags.model, flags.out, options, tool.progress()));
    nlohmann::json json = {{"verb", "convert"},
                           {"out", report.out},
                           {"bytes_in", report.bytes_in},
                           {"bytes_out", report.bytes_out}};
    std::string text = fmt::format("{}: {} from {}\n", report.out, bytes_text(report.bytes_out),
                                   bytes_text(report.bytes_in));
    if (!options.quantization.none()) {
      json["quantization"] = options.quantization.text();
      json["quantized"] = to_json(report.quantized);
      json["masks_equal"] = true;  // else it would have failed
      text += text_of(report.quantized);
    }
    tool.print(json, text);
    return {};
  });
}

}  // namespace lacuna::cli
