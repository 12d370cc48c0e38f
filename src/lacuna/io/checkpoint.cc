#include "lacuna/io/checkpoint.h"

#include <algorithm>
#include <new>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <stdexcept>

#include "lacuna/format/quantize.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/compact_store.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/legacy_bitmask.h"
#include "lacuna/io/stored_tensors.h"

namespace lacuna::io {
namespace fs = std::filesystem;
using nlohmann::json;

struct Checkpoint::State {
  fs::path folder;
  json config;
  SparseDeclarations declared;
  StoredTensors tensors;
  std::map<std::string, WeightInfo, std::less<>> weights;
  std::optional<Checksums> checksums;
  size_t total_bytes = 0;

  static Result<std::shared_ptr<State>> assemble(json config,
                                                 const std::vector<SafetensorsFile>& files,
                                                 const std::string& config_file);
  Status add_declared();
  Status add_legacy(std::set<std::string>& taken);
  Status add_dense(const std::set<std::string>& taken);
  void rename_old_opt();
};

namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

Result<json> read_json_object(const fs::path& file) {
  LACUNA_TRY(const std::string text, read_text(file));
  return parse_json_object(text, file.string());
}

/// The shards that the index names, each checked against it.
Result<std::vector<SafetensorsFile>> open_shards(const fs::path& folder) {
  const fs::path index_file = folder / kIndexFile;
  LACUNA_TRY(const json index, read_json_object(index_file));
  const auto map = index.find("weight_map");
  if (map == index.end() || !map->is_object())
    return bad_input("{}: has no object \"weight_map\". Get it again.", index_file.string());
  std::map<std::string, std::set<std::string>> names;  // of each shard
  for (const auto& [tensor, shard] : map->items()) {
    // A shard lies beside its index; the name must not lead elsewhere.
    if (!shard.is_string() ||
        fs::path(shard.get<std::string>()).filename() != shard.get<std::string>())
      return bad_input("{}: tensor \"{}\" lies in {} (need the name of a file in the same folder).",
                       index_file.string(), tensor, shard.dump());
    names[shard.get<std::string>()].insert(tensor);
  }
  std::vector<SafetensorsFile> shards;
  for (const auto& [shard, expected] : names) {
    LACUNA_TRY(auto file, SafetensorsFile::open(folder / shard));
    for (const std::string& tensor : expected)
      if (!file.contains(tensor))
        return bad_input("{}: has no tensor \"{}\", which {} promises. Get both again.",
                         file.path(), tensor, kIndexFile);
    for (const auto& entry : file.entries())
      if (!expected.contains(entry.name))
        return bad_input("{}: tensor \"{}\" is not in {}. Get both again.", file.path(), entry.name,
                         kIndexFile);
    shards.push_back(std::move(file));
  }
  return shards;
}

Result<std::vector<SafetensorsFile>> open_files(const fs::path& folder) {
  std::error_code ignored;
  if (!fs::exists(folder / kSingleFile, ignored) && fs::exists(folder / kIndexFile, ignored))
    return open_shards(folder);
  LACUNA_TRY(auto file, SafetensorsFile::open(folder / kSingleFile));
  std::vector<SafetensorsFile> files;
  files.push_back(std::move(file));
  return files;
}

}  // namespace

std::string_view store_name(Store store) {
  switch (store) {
    case Store::kDense:
      return "dense";
    case Store::kCompact:
      return "compact";
    case Store::kSparseBitmask:
      return "sparse-bitmask";
    case Store::kSparse24Bitmask:
      return "sparse-24-bitmask";
    case Store::kCsr:
      return "csr";
    case Store::kCoo:
      return "coo";
    case Store::kBsr:
      return "bsr";
  }
  return "";
}

format::ExchangeKind exchange_kind(Store store) {
  switch (store) {
    case Store::kCsr:
      return format::ExchangeKind::kCsr;
    case Store::kCoo:
      return format::ExchangeKind::kCoo;
    case Store::kBsr:
      return format::ExchangeKind::kBsr;
    default:
      return format::ExchangeKind::kNone;
  }
}

namespace {

/// The store of a weight that is not dense or legacy.
Store store_of(const format::ExchangeForm& form) {
  for (const Store store : {Store::kCsr, Store::kCoo, Store::kBsr})
    if (exchange_kind(store) == form.kind) return store;
  return Store::kCompact;
}

}  // namespace

Status Checkpoint::State::add_declared() {
  for (const auto& [name, declaration] : declared) {
    const auto parts = compact_part_names(name, declaration);
    const bool present = std::any_of(parts.begin(), parts.end(), [&](const std::string& part) {
      return tensors.contains(part);
    });
    if (!present) continue;  // dense or legacy under a declared pattern
    LACUNA_CHECK(check_parts(name, declaration, tensors));
    WeightInfo info{.name = name,
                    .shape = {declaration.rows, declaration.columns},
                    .dtype = declaration.values,
                    .store = store_of(declaration.form),
                    .pattern = declaration.pattern,
                    .quantization = declaration.quantization,
                    .form = declaration.form,
                    .parts = parts};
    for (const std::string& part : parts) info.bytes += tensors.at(part).tensor.bytes.size();
    weights[name] = std::move(info);
  }
  return {};
}

Status Checkpoint::State::add_legacy(std::set<std::string>& taken) {
  LACUNA_TRY(const auto found, find_legacy(tensors));
  for (const WeightInfo& info : found) {
    taken.insert(info.parts.begin(), info.parts.end());
    if (!weights.try_emplace(info.name, info).second)
      return bad_input("{}: weight \"{}\" lies there twice (in {} and {}). Remove one.",
                       tensors.at(info.parts[0]).file, info.name, weights[info.name].parts[0],
                       info.parts[0]);
  }
  return {};
}

Status Checkpoint::State::add_dense(const std::set<std::string>& taken) {
  for (const auto& [name, stored] : tensors) {
    if (taken.contains(name)) continue;
    for (const char* ours : {".bitmap", ".block_columns", ".weight.columns", ".weight.scales"})
      if (name.ends_with(ours))
        return bad_input(
            "{}: tensor \"{}\" is part of a compact weight that config.json doesn't declare. Use "
            "the config.json that was written with it.",
            stored.file, name);
    const Tensor& tensor = stored.tensor;
    const bool fresh = weights
                           .try_emplace(name, WeightInfo{.name = name,
                                                         .shape = tensor.shape,
                                                         .dtype = tensor.dtype,
                                                         .bytes = tensor.bytes.size(),
                                                         .parts = {name}})
                           .second;
    if (!fresh)
      return bad_input("{}: weight \"{}\" lies there dense and sparse. Remove one.", stored.file,
                       name);
  }
  return {};
}

/// Early OPT checkpoints leave "model." out.
void Checkpoint::State::rename_old_opt() {
  constexpr std::string_view kOld = "decoder.";
  if (!weights.contains("decoder.embed_tokens.weight")) return;
  std::map<std::string, WeightInfo, std::less<>> renamed;
  for (auto& [name, info] : weights) {
    if (name.starts_with(kOld)) info.name = "model." + name;
    renamed[info.name] = std::move(info);
  }
  weights = std::move(renamed);
}

Result<std::shared_ptr<Checkpoint::State>> Checkpoint::State::assemble(
    json config, const std::vector<SafetensorsFile>& files, const std::string& config_file) {
  if (!config.is_object()) return bad_input("{}: not a JSON object. Get it again.", config_file);
  auto state = std::make_shared<State>();
  LACUNA_TRY(state->declared, read_declarations(config, config_file));
  LACUNA_CHECK(check_legacy_config(config, config_file));
  LACUNA_TRY(state->tensors, collect_tensors(files));
  for (const auto& [name, stored] : state->tensors)
    state->total_bytes += stored.tensor.bytes.size();

  LACUNA_CHECK(state->add_declared());
  std::set<std::string> taken;
  for (const auto& [name, info] : state->weights)
    taken.insert(info.parts.begin(), info.parts.end());
  LACUNA_CHECK(state->add_legacy(taken));
  LACUNA_CHECK(state->add_dense(taken));
  for (const auto& [name, declaration] : state->declared) {
    const auto found = state->weights.find(name);
    if (found == state->weights.end())
      return bad_input("{}: weight \"{}\" is declared, but no file holds it. Get the model again.",
                       config_file, name);
    WeightInfo& info = found->second;
    if (info.shape != Shape{declaration.rows, declaration.columns} ||
        info.dtype != declaration.values)
      return bad_input(
          "{}: weight \"{}\" is declared with another type or shape (got {} {}; need {} {}).",
          config_file, name, safetensors_name(declaration.values),
          shape_text({declaration.rows, declaration.columns}), safetensors_name(info.dtype),
          shape_text(info.shape));
    if (info.quantization != declaration.quantization || info.form != declaration.form)
      return bad_input(
          "{}: weight \"{}\" is declared as {}, but lies there {}. Use the config.json that was "
          "written with it.",
          config_file, name,
          declaration.form.none() ? declaration.quantization.text() : declaration.form.text(),
          declaration.form.none() ? "unquantised" : store_name(info.store));
    info.pattern = declaration.pattern;
  }
  if (config.value("model_type", json()) == "opt") state->rename_old_opt();
  state->config = std::move(config);
  return state;
}

Result<Checkpoint> Checkpoint::open(const fs::path& folder) {
  if (fs::is_regular_file(folder))
    return bad_input(
        "{}: is a file (need a model folder). Run `lacuna convert {} -o FOLDER` first.",
        folder.string(), folder.string());
  const fs::path config_file = folder / "config.json";
  LACUNA_TRY(json config, read_json_object(config_file));
  LACUNA_TRY(const auto files, open_files(folder));
  LACUNA_TRY(const auto state, State::assemble(std::move(config), files, config_file.string()));
  state->folder = folder;
  std::error_code ignored;
  if (const fs::path file = folder / "checksums.json"; fs::exists(file, ignored)) {
    LACUNA_TRY(state->checksums, read_checksums(file));
  }
  Checkpoint checkpoint;
  checkpoint.state_ = state;
  return checkpoint;
}

Result<Checkpoint> Checkpoint::from_files(const json& config,
                                          const std::vector<SafetensorsFile>& files,
                                          const std::string& config_file) {
  LACUNA_TRY(auto state, State::assemble(config, files, config_file));
  Checkpoint checkpoint;
  checkpoint.state_ = std::move(state);
  return checkpoint;
}

const fs::path& Checkpoint::folder() const { return state_->folder; }
const json& Checkpoint::config() const { return state_->config; }
const std::map<std::string, WeightInfo, std::less<>>& Checkpoint::weights() const {
  return state_->weights;
}
bool Checkpoint::contains(std::string_view name) const {
  return state_->weights.find(name) != state_->weights.end();
}
size_t Checkpoint::total_bytes() const { return state_->total_bytes; }
bool Checkpoint::has_checksums() const { return state_->checksums.has_value(); }

Result<Tensor> Checkpoint::part(std::string_view name) const {
  const auto found = state_->tensors.find(name);
  if (found == state_->tensors.end())
    return bad_input("{}: no file holds a tensor \"{}\".", state_->folder.string(), name);
  return found->second.tensor;
}

void Checkpoint::release(std::string_view name) const {
  const auto found = state_->weights.find(name);
  if (found == state_->weights.end()) return;
  for (const std::string& part : found->second.parts) {
    const StoredTensor& stored = state_->tensors.at(part);
    if (stored.mapped) release_pages(stored.tensor.bytes);
  }
}

Result<format::CompactMatrix> quantize(const std::string& name, const Weight& weight,
                                       const format::Quantization& code, const Executor& executor) {
  const auto* sparse = std::get_if<format::CompactMatrix>(&weight);
  auto coded = sparse ? format::quantize(*sparse, code, executor)
                      : format::quantize(std::get<Tensor>(weight), code, executor);
  if (coded.ok()) return coded;
  return Error{coded.error().code, fmt::format("weight \"{}\": {}", name, coded.error().message)};
}

Result<Weight> Checkpoint::weight(std::string_view name, const Executor& executor) const {
  const auto found = state_->weights.find(name);
  if (found == state_->weights.end())
    return bad_input("{}: no file holds a weight \"{}\".", state_->folder.string(), name);
  const WeightInfo& info = found->second;
  if (info.store == Store::kDense) return Weight(state_->tensors.at(info.parts[0]).tensor);
  if (is_legacy(info.store)) return read_legacy(info, state_->tensors);
  LACUNA_TRY(auto matrix, read_compact(info.name,
                                       {info.pattern, info.shape[0], info.shape[1], info.dtype,
                                        info.quantization, info.form},
                                       state_->tensors, executor));
  return Weight(std::move(matrix));
}

Result<Tensor> Checkpoint::dense(std::string_view name) const {
  LACUNA_TRY(const Weight weight, this->weight(name));
  if (const Tensor* tensor = std::get_if<Tensor>(&weight)) return *tensor;
  const auto& matrix = std::get<format::CompactMatrix>(weight);
  try {
    return format::expand(matrix);
  } catch (const std::exception& error) {  // a few bytes of blocks can stand for any dense size
    return not_possible("{}: weight \"{}\" of shape {} does not fit into memory ({}).",
                        state_->folder.string(), name, shape_text({matrix.rows, matrix.columns}),
                        error.what());
  }
}

Result<std::vector<std::string>> Checkpoint::verify_checksums(std::string_view name) const {
  const auto found = state_->weights.find(name);
  if (found == state_->weights.end())
    return bad_input("{}: no file holds a weight \"{}\".", state_->folder.string(), name);
  std::vector<std::string> differences;
  for (const std::string& part : found->second.parts) {
    const auto& [tensor, file, mapped] = state_->tensors.at(part);
    const auto known = state_->checksums ? state_->checksums->find(part) : Checksums::iterator();
    if (!state_->checksums || known == state_->checksums->end())
      return bad_input("{}: tensor \"{}\" has no checksums (need them in checksums.json).", file,
                       part);
    const auto actual = chunk_checksums(tensor.bytes);
    if (actual.size() != known->second.size())
      differences.push_back(fmt::format("{}: tensor \"{}\" has {} chunks, checksums.json lists {}",
                                        file, part, actual.size(), known->second.size()));
    for (size_t i = 0; i < std::min(actual.size(), known->second.size()); ++i) {
      if (actual[i] == known->second[i]) continue;
      const size_t begin = i * kChecksumChunkBytes;
      differences.push_back(fmt::format(
          "{}: tensor \"{}\", chunk {} of {} (bytes {} to {}) differs from checksums.json", file,
          part, i + 1, actual.size(), begin,
          std::min(begin + kChecksumChunkBytes, tensor.bytes.size())));
    }
  }
  return differences;
}

}  // namespace lacuna::io
