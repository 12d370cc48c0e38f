#include "lacuna/api/store.h"

#include <nlohmann/json.hpp>

#include "lacuna/api/layers.h"
#include "lacuna/format/compact.h"

namespace lacuna::api {
namespace fs = std::filesystem;
namespace {

/// The pattern under which a dense tensor is worth compacting, or kDense.
format::Pattern compactable(const io::WeightInfo& info, const io::Weight& weight, bool prunable) {
  const format::Pattern pattern = pattern_of(info, weight);
  const bool declared = info.pattern.kind != format::PatternKind::kDense;
  return declared || prunable ? pattern : format::Pattern();
}

}  // namespace

Result<io::Store> parse_store(const std::string& name) {
  if (name == "compact") return io::Store::kCompact;
  if (name == "dense") return io::Store::kDense;
  if (name == "compressed-tensors") return io::Store::kSparseBitmask;
  return usage_error("--store: unknown store (got {}; need compact, dense or compressed-tensors).",
                     name);
}

Result<ConvertReport> convert_store(const fs::path& model, const fs::path& out, io::Store store,
                                    const std::function<void(int64_t, int64_t)>& progress) {
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(model));
  LACUNA_TRY(const auto spec, model::spec_of(checkpoint));
  const auto prunable = block_weights(spec);
  LACUNA_TRY(auto writer, io::CheckpointWriter::create(out, {.store = store}));
  int64_t done = 0;
  const auto total = static_cast<int64_t>(checkpoint.weights().size());
  for (const auto& [name, info] : checkpoint.weights()) {
    LACUNA_TRY(io::Weight weight, checkpoint.weight(name));
    if (const Tensor* dense = std::get_if<Tensor>(&weight)) {
      const format::Pattern pattern = compactable(info, weight, prunable.contains(name));
      if (pattern.kind != format::PatternKind::kDense) {
        LACUNA_TRY(weight, format::compress(*dense, pattern));
      }
    }
    LACUNA_CHECK(std::visit([&](const auto& held) { return writer.add(name, held); }, weight));
    if (progress) progress(++done, total);
  }
  LACUNA_CHECK(io::copy_companion_files(model, writer));
  // What described the old store goes; the writer describes the new one.
  nlohmann::json config = checkpoint.config();
  config.erase("quantization_config");
  config.erase("compression_config");
  LACUNA_CHECK(writer.finish(config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out));
  return ConvertReport{checkpoint.total_bytes(), written.total_bytes(), out.string()};
}

}  // namespace lacuna::api
