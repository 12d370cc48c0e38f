#include "lacuna/prune/finished_model.h"

#include <future>

#include "lacuna/prune/about.h"
#include "lacuna/prune/allocation_pass.h"
#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

using MatricesByName = std::map<std::string, format::CompactMatrix>;

/// The pruned weights of a block in the store's form, all at a time; codes are in it already.
Result<MatricesByName> compressed(const Journal::Block& block, const format::Pattern& pattern) {
  LACUNA_TRY(MatricesByName coded, block.coded());
  if (!coded.empty()) return coded;
  std::vector<std::optional<Result<format::CompactMatrix>>> results(block.tensors.size());
  parallel_chunks(model::torch_executor(), static_cast<int64_t>(results.size()), [&](int64_t i) {
    const auto place = static_cast<size_t>(i);
    results[place].emplace(format::compress(block.tensors[place].tensor, pattern));
  });
  MatricesByName matrices;
  for (size_t i = 0; i < results.size(); ++i) {
    LACUNA_TRY(matrices[block.tensors[i].name], std::move(*results[i]));
  }
  return matrices;
}

/// The same of a block of the journal, beside the caller's work.
/// @param instead  weights by name that take the place of the journal's
std::future<Result<MatricesByName>> start_compressing(
    const Journal& journal, int64_t layer, const format::Pattern& pattern,
    const std::map<std::string, Tensor>& instead) {
  return std::async(std::launch::async, [&, layer]() -> Result<MatricesByName> {
    LACUNA_TRY(Journal::Block block, journal.read(layer));
    for (auto& [name, tensor] : block.tensors)
      if (const auto found = instead.find(name); found != instead.end()) tensor = found->second;
    return compressed(block, pattern);
  });
}

/// The blocks of the weights that are pruned, by name.
std::map<std::string, int64_t> pruned_weights(const Run& run) {
  std::map<std::string, int64_t> pruned;
  for (int64_t layer = 0; layer < run.spec.layers; ++layer)
    for (const std::string& linear : run.targets_of(layer))
      pruned[run.weight_name(layer, linear)] = layer;
  return pruned;
}

io::CheckpointWriter::Options writer_options(const Run& run) {
  return {.store = run.options.store, .blocks = run.options.blocks, .lock = run.lock};
}

/// A weight that is not pruned: as it was, but embedding and output matrix beside codes.
Result<io::Weight> kept_weight(const Run& run, const std::string& name) {
  LACUNA_TRY(io::Weight weight, run.checkpoint.weight(name));
  if (run.options.request.quantization.none() || run.options.keep_head ||
      !run.spec.end_weights().contains(name))
    return weight;
  constexpr format::Quantization kHead{.code = format::Code::kInt8};
  const auto* sparse = std::get_if<format::CompactMatrix>(&weight);
  if (sparse != nullptr && !sparse->quantization.none()) return weight;
  LACUNA_TRY(auto coded, io::quantize(name, weight, kHead, model::torch_executor()));
  return io::Weight(std::move(coded));
}

/// config.json: that of the input, and what the run says of itself.
json config_of(const Run& run) {
  json config = run.checkpoint.config();
  config.erase("quantization_config");  // what described the old store
  config.erase("compression_config");
  json& about = config["lacuna"];
  // Of an input that was pruned before, only what its other weights are.
  json kept = json::object();
  for (const char* key : {"format_version", "weights"})
    if (about.is_object() && about.contains(key)) kept[key] = about[key];
  about = std::move(kept);
  about.update(about_written(run));
  about["sparsity_reached"] = run.report.sparsity;
  json& layers = about["layers"] = json::array();
  for (const LayerReport& layer : run.report.layers) {
    layers.push_back(to_json(layer));
    layers.back().erase("seconds");  // the one thing that two equal runs don't share
  }
  return config;
}

/// Codes are compared by what they stand for.
Tensor dense_of(const io::Weight& weight) {
  if (const auto* tensor = std::get_if<Tensor>(&weight)) return *tensor;
  return format::expand(std::get<format::CompactMatrix>(weight));
}

/// Whether a finished model has the weights that this run would leave alone.
Result<bool> keeps_the_others(const Run& run, const io::Checkpoint& finished) {
  const auto pruned = pruned_weights(run);
  if (finished.weights().size() != run.checkpoint.weights().size()) return false;
  for (const auto& [name, info] : run.checkpoint.weights()) {
    if (!finished.contains(name)) return false;
    if (pruned.contains(name)) continue;
    LACUNA_TRY(const io::Weight before, kept_weight(run, name));
    LACUNA_TRY(const io::Weight after, finished.weight(name));
    if (sampled_hashes(dense_of(before).bytes) != sampled_hashes(dense_of(after).bytes))
      return false;
  }
  return true;
}

}  // namespace

Status probe_out(const Run& run) {
  LACUNA_CHECK(io::CheckpointWriter::create(run.out, writer_options(run)));
  return {};  // given up again; write_model() opens its own
}

Status write_model(Run& run, const Journal& journal, const std::map<std::string, Tensor>& instead) {
  LACUNA_TRY(auto writer, io::CheckpointWriter::create(run.out, writer_options(run)));
  const auto pruned = pruned_weights(run);
  // In the order of the input's names, whose blocks follow each other closely.
  std::vector<int64_t> order;
  for (const auto& [name, info] : run.checkpoint.weights())
    if (const auto found = pruned.find(name);
        found != pruned.end() && (order.empty() || order.back() != found->second))
      order.push_back(found->second);
  size_t next = 0;
  const auto start_next = [&] {  // while the last is written
    return start_compressing(journal, order[next++], run.options.request.pattern, instead);
  };
  auto coming = start_next();  // there is one: a run without targets is refused
  MatricesByName matrices;     // of the block that was read last
  int64_t held = -1, zeros = 0, elements = 0;
  for (const auto& [name, info] : run.checkpoint.weights()) {
    run.report.bytes_dense +=
        static_cast<uint64_t>(element_count(info.shape).value_or(0)) * size_bytes(info.dtype);
    const auto found = pruned.find(name);
    if (found == pruned.end()) {
      LACUNA_TRY(const io::Weight weight, kept_weight(run, name));
      LACUNA_CHECK(std::visit([&](const auto& kept) { return writer.add(name, kept); }, weight));
      run.checkpoint.release(name);
      continue;
    }
    if (found->second != held) {
      matrices.clear();
      LACUNA_TRY(matrices, coming.get());
      if (next < order.size()) coming = start_next();
      held = found->second;
    }
    const format::CompactMatrix& matrix = matrices.at(name);
    const int64_t size = matrix.rows * matrix.columns;
    zeros += matrix.quantization.none() ? format::count_zeros(matrix)
                                        : size - format::count_kept(matrix);
    elements += size;
    LACUNA_CHECK(writer.add(name, matrix));
  }
  run.report.sparsity = static_cast<double>(zeros) / static_cast<double>(elements);
  LACUNA_CHECK(io::copy_companion_files(run.checkpoint.folder(), writer));
  LACUNA_CHECK(writer.finish(config_of(run)));
  LACUNA_TRY(const auto written, io::Checkpoint::open(run.out));
  run.report.bytes_out = written.total_bytes();
  check_budget(run);
  return {};
}

Result<std::optional<PruneReport>> finished_before(Run& run, const Journal& journal,
                                                   bool overwrite) {
  std::error_code failure;
  if (!run.options.resume || journal.finished_blocks() > 0 ||
      !fs::exists(run.out / "config.json", failure))
    return std::optional<PruneReport>();
  LACUNA_TRY(const auto finished, io::Checkpoint::open(run.out));
  const json about = finished.config().value("lacuna", json::object());
  const json wanted = about_written(run);
  bool same = about.contains("layers") && about.contains("sparsity_reached");
  for (const auto& [key, value] : wanted.items()) same = same && about.value(key, json()) == value;
  if (same) {
    LACUNA_TRY(same, keeps_the_others(run, finished));
  }
  if (!same) {
    if (overwrite) return std::optional<PruneReport>();
    (void)journal.remove();
    return bad_input(
        "{}: holds another finished model. Move it away, or replace it by --overwrite.",
        run.given_out.string());
  }
  LACUNA_CHECK(journal.remove());
  for (const json& layer : about.at("layers")) run.report.layers.push_back(layer_from(layer));
  run.report.sparsity = about.at("sparsity_reached");
  run.report.bytes_dense = run.checkpoint.total_bytes();
  run.report.bytes_out = finished.total_bytes();
  return std::optional<PruneReport>(std::move(run.report));
}

}  // namespace lacuna::prune
