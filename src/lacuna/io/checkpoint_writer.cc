#include <algorithm>
#include <nlohmann/json.hpp>
#include <optional>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/compact_store.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/legacy_bitmask.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/io/shard_writer.h"

namespace lacuna::io {
namespace fs = std::filesystem;
using format::CompactMatrix;
using nlohmann::json;

namespace {

constexpr const char* kConfig = "config.json";
constexpr const char* kChecksums = "checksums.json";
const format::Pattern kDefaultBlocks = format::Pattern::block(32, 32);

/// The form of a matrix in the stores for exchange.
format::ExchangeForm form_of(const CheckpointWriter::Options& options,
                             const CompactMatrix& matrix) {
  const format::ExchangeKind kind = exchange_kind(options.store);
  if (kind != format::ExchangeKind::kBsr) return {kind};
  for (const format::Pattern& blocks : {options.blocks, matrix.pattern})
    if (blocks.kind == format::PatternKind::kBlock) return format::ExchangeForm::bsr(blocks);
  return format::ExchangeForm::bsr(kDefaultBlocks);
}

/// Is it a companion of the weights: tokenizer, generation config, licence, ...?
bool is_companion(const fs::path& file) {
  static constexpr std::string_view kExtensions[] = {".json", ".txt", ".model",   ".jinja",
                                                     ".bpe",  ".md",  ".tiktoken"};
  const std::string name = file.filename().string(), extension = file.extension().string();
  return std::find(std::begin(kExtensions), std::end(kExtensions), extension) !=
             std::end(kExtensions) ||
         name.starts_with("LICENSE") || name.starts_with("NOTICE");
}

/// The names in a folder, sorted.
Result<std::vector<std::string>> names_in(const fs::path& folder) {
  std::error_code failure;
  std::vector<std::string> names;
  for (fs::directory_iterator entry(folder, failure), end; !failure && entry != end;
       entry.increment(failure))
    names.push_back(entry->path().filename().string());
  if (failure) return bad_input("{}: cannot be listed ({}).", folder.string(), failure.message());
  std::sort(names.begin(), names.end());
  return names;
}

/// By its name: of a folder without a list, and of what a killed run leaves in its staging folder.
bool may_be_written(const std::string& name) {
  return name.ends_with(".partial") || name.ends_with(".safetensors") || name == "before" ||
         is_companion(name);
}

/// Refuses a folder that holds anything but a model that this tool wrote: it is about to be
/// removed. Nothing there is fine.
/// @param staged  the folder is not finished: what is there need not be listed
Status check_ours(const fs::path& folder, bool staged = false) {
  std::error_code failure;
  if (!fs::exists(fs::symlink_status(folder, failure))) return {};
  const auto refuse = [&](const std::string& why) {
    return bad_input(
        "{}: {} (need a new folder, or one that this tool wrote). Choose another name.",
        folder.string(), why);
  };
  if (!fs::is_directory(folder, failure)) return refuse("exists and is not a folder");
  LACUNA_TRY(const auto names, names_in(folder));
  // Empty, or a run was killed before it could mark its staging folder.
  if (names.empty() || names == std::vector<std::string>{kConfig + std::string(".partial")})
    return {};
  const auto text = read_text(folder / kConfig);
  const auto config = text.ok() ? parse_json_object(*text, kConfig) : Result<json>(text.error());
  if (!config.ok() || !config->contains("lacuna"))
    return refuse("exists and was not written by this tool");
  auto written = read_written_files(folder / kChecksums);
  if (written) written->insert(written->end(), {kConfig, kChecksums});
  for (const std::string& name : names) {
    const bool listed = written && std::find(written->begin(), written->end(),
                                             recorded_name(name)) != written->end();
    if (!listed && !((staged || !written) && may_be_written(name)))
      return bad_input(
          "{}: holds {}, which this tool did not write and would remove with the old model. Move "
          "it away, or choose another name.",
          folder.string(), name);
  }
  return {};
}

Status remove_folder(const fs::path& folder) {
  std::error_code failure;
  fs::remove_all(folder, failure);
  if (failure)
    return check_failed("{}: cannot be removed ({}). Remove it by hand.", folder.string(),
                        failure.message());
  return {};
}

fs::path with_suffix(fs::path folder, const char* suffix) {
  folder += suffix;
  return folder;
}

}  // namespace

struct CheckpointWriter::State {
  fs::path out, staging;
  Options options;
  ShardWriter shards;
  SparseDeclarations declared;         // of the matrices
  std::map<std::string, Shape> dense;  // of the tensors
  std::vector<std::string> order;      // of add(), by weight
  std::optional<Store> legacy;         // what the sparse weights of a legacy store lie in
  int64_t elements = 0, zeros = 0;     // zeros: of the sparse weights
  bool finished = false;

  State(fs::path folder, Options given)
      : out(std::move(folder)),
        staging(with_suffix(out, ".partial")),
        options(std::move(given)),
        shards(staging, options.shard_bytes) {}
  ~State() {
    if (!finished) (void)remove_folder(staging);
  }

  Result<std::vector<NamedTensor>> parts(const std::string& name, const CompactMatrix& matrix);
  Status recode_as_bitmask();
  json describe(json config) const;
};

CheckpointWriter::CheckpointWriter() = default;
CheckpointWriter::CheckpointWriter(CheckpointWriter&&) noexcept = default;
CheckpointWriter& CheckpointWriter::operator=(CheckpointWriter&&) noexcept = default;
CheckpointWriter::~CheckpointWriter() = default;

Result<CheckpointWriter> CheckpointWriter::create(const fs::path& out, Options options) {
  LACUNA_TRY(fs::path folder, out_folder(out));
  if (!options.lock) {
    LACUNA_TRY(options.lock, OutLock::take(folder));
  }
  auto state = std::make_unique<State>(std::move(folder), std::move(options));
  state->finished = true;  // nothing of ours to clean up yet
  LACUNA_CHECK(check_ours(state->out));
  LACUNA_CHECK(check_ours(state->staging, /*staged=*/true));  // what a killed run left
  LACUNA_CHECK(remove_folder(state->staging));
  std::error_code failure;
  fs::create_directories(state->staging, failure);
  if (failure)
    return check_failed("{}: cannot be created ({}). Choose another place.",
                        state->staging.string(), failure.message());
  state->finished = false;
  LACUNA_CHECK(write_text(state->staging / kConfig, "{\"lacuna\": {}}\n"));  // marks it as ours
  CheckpointWriter writer;
  writer.state_ = std::move(state);
  return writer;
}

Status CheckpointWriter::add(const std::string& name, const Tensor& tensor) {
  State& state = *state_;
  LACUNA_CHECK(state.shards.add({{name, tensor}}));
  state.dense[name] = tensor.shape;
  state.order.push_back(name);
  state.elements += tensor.elements();
  return {};
}

Status CheckpointWriter::add(const std::string& name, const CompactMatrix& matrix) {
  State& state = *state_;
  LACUNA_CHECK(check_sound(matrix, fmt::format("{}: weight \"{}\"", state.out.string(), name)));
  LACUNA_TRY(const auto parts, state.parts(name, matrix));
  LACUNA_CHECK(state.shards.add(parts));
  SparseDeclaration declaration = declaration_of(matrix);
  declaration.form = form_of(state.options, matrix);
  if (state.options.store != Store::kCompact) declaration.quantization = {};
  // Without its codes a dense matrix is a dense tensor like others.
  if (declaration.pattern.kind == format::PatternKind::kDense && declaration.quantization.none()) {
    state.dense[name] = {matrix.rows, matrix.columns};
  } else {
    state.declared[name] = declaration;
  }
  state.order.push_back(name);
  state.elements += matrix.rows * matrix.columns;
  state.zeros += format::count_zeros(matrix);
  return {};
}

/// The tensors that carry a matrix in the writer's store.
Result<std::vector<NamedTensor>> CheckpointWriter::State::parts(const std::string& name,
                                                                const CompactMatrix& matrix) {
  if (options.store == Store::kDense)
    return std::vector<NamedTensor>{{name, format::expand(matrix)}};
  if (!is_legacy(options.store)) return compact_parts(name, matrix, form_of(options, matrix));
  const bool two_of_four = fits_sparse24(matrix);
  if (legacy == Store::kSparse24Bitmask && !two_of_four) LACUNA_CHECK(recode_as_bitmask());
  if (!legacy) legacy = two_of_four ? Store::kSparse24Bitmask : Store::kSparseBitmask;
  return legacy_parts(name, matrix, *legacy);
}

/// A folder in a legacy store is all sparse-24-bitmask or all sparse-bitmask. This writes anew what
/// went out as the former, when a matrix turns up that it can't hold.
Status CheckpointWriter::State::recode_as_bitmask() {
  LACUNA_CHECK(shards.close());
  const fs::path before = staging / "before";
  std::error_code failure;
  fs::create_directory(before, failure);
  std::vector<SafetensorsFile> files;
  for (const fs::path& file : shards.files()) {
    LACUNA_CHECK(rename_durably(file, before / file.filename()));
    LACUNA_TRY(auto opened, SafetensorsFile::open(before / file.filename()));
    files.push_back(std::move(opened));
  }
  LACUNA_TRY(const auto written, Checkpoint::from_files(json::object(), files, staging.string()));
  shards = ShardWriter(staging, options.shard_bytes);
  legacy = Store::kSparseBitmask;
  for (const std::string& name : order) {
    LACUNA_TRY(const Weight weight, written.weight(name));
    if (const Tensor* tensor = std::get_if<Tensor>(&weight)) {
      LACUNA_CHECK(shards.add({{name, *tensor}}));
      continue;
    }
    LACUNA_TRY(const auto tensors, legacy_parts(name, std::get<CompactMatrix>(weight), *legacy));
    LACUNA_CHECK(shards.add(tensors));
  }
  return remove_folder(before);
}

Status CheckpointWriter::copy_file(const fs::path& from) {
  LACUNA_TRY(const Bytes bytes, map_file(from));
  return add_text(from.filename().string(),
                  {reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

Status CheckpointWriter::add_text(const std::string& name, std::string_view text) {
  return write_text(state_->staging / name, text);
}

/// The caller's config with what the folder really holds.
json CheckpointWriter::State::describe(json config) const {
  SparseDeclarations all = declared;
  // A dense tensor that came from a dense store keeps the pattern it was declared with.
  if (const auto before = read_declarations(config, kConfig); before.ok()) {
    for (auto [name, declaration] : *before) {
      const auto found = dense.find(name);
      declaration.quantization = {}, declaration.form = {};
      if (found != dense.end() && found->second == Shape{declaration.rows, declaration.columns} &&
          declaration.pattern.kind != format::PatternKind::kDense)
        all[name] = declaration;
    }
  }
  write_declarations(all, config);
  for (const char* key : {"quantization_config", "compression_config"})
    if (config.contains(key) && config[key].is_object() && config[key].contains("sparsity_config"))
      config.erase(key);
  if (legacy) {
    std::vector<std::string> weights;
    for (const auto& [name, declaration] : declared) weights.push_back(name);
    config["quantization_config"] = legacy_config(
        *legacy, weights,
        static_cast<double>(zeros) / static_cast<double>(std::max<int64_t>(elements, 1)));
  }
  return config;
}

Status CheckpointWriter::finish(const json& config) {
  State& state = *state_;
  if (!config.is_object())
    return bad_input("{}: the config is not a JSON object (need one).", state.out.string());
  LACUNA_CHECK(state.shards.finish());
  LACUNA_TRY(auto files, names_in(state.staging));
  std::erase(files, kConfig);  // still the mark of the staging folder
  LACUNA_CHECK(
      write_text(state.staging / kChecksums, checksums_text(state.shards.checksums(), files)));
  std::string text;
  try {
    text = state.describe(config).dump(2) + "\n";
  } catch (const json::exception& error) {
    return bad_input("{}: {} (need UTF-8).", (state.out / kConfig).string(), error.what());
  }
  LACUNA_CHECK(write_text(state.staging / kConfig, text));
  // The old model goes only when the new one has its name; a kill in between loses neither.
  const fs::path replaced = with_suffix(state.out, ".replaced");
  std::error_code failure;
  const bool exists = fs::exists(state.out, failure);
  if (exists) {
    LACUNA_CHECK(check_ours(state.out));  // hours may have passed since create()
    LACUNA_CHECK(check_ours(replaced));
    LACUNA_CHECK(remove_folder(replaced));
    LACUNA_CHECK(rename_durably(state.out, replaced));
  }
  LACUNA_CHECK(rename_durably(state.staging, state.out));
  state.finished = true;
  if (exists) LACUNA_CHECK(remove_folder(replaced));
  state.options.lock = nullptr;
  return {};
}

Status copy_companion_files(const fs::path& from, CheckpointWriter& writer) {
  LACUNA_TRY(const auto names, names_in(from));
  for (const std::string& name : names) {
    const bool own = name == kConfig || name == kChecksums || name.ends_with(".index.json");
    std::error_code ignored;
    if (is_companion(name) && !own && fs::is_regular_file(from / name, ignored))
      LACUNA_CHECK(writer.copy_file(from / name));
  }
  return {};
}

}  // namespace lacuna::io
