// A model folder as weights: dense and sparse, in shards or one file, ours or the formats others
// left behind.
#pragma once

#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/exchange.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::io {

/// How a weight is stored: its dense tensor, or its kept values only (or codes of all).
using Weight = std::variant<Tensor, format::CompactMatrix>;

/// The weight as codes under the mask that it has. @errors as format::quantize(); `name` is for
/// them
Result<format::CompactMatrix> quantize(const std::string& name, const Weight& weight,
                                       const format::Quantization& code, const Executor& executor);

/// Where a weight's bytes came from.
enum class Store : uint8_t {
  kDense,            ///< one tensor under the weight's own name
  kCompact,          ///< ours: NAME.bitmap, NAME.values, ...
  kSparseBitmask,    ///< compressed-tensors' legacy sparse-bitmask
  kSparse24Bitmask,  ///< compressed-tensors' legacy sparse-24-bitmask
  kCsr,              ///< for exchange: NAME.row_offsets, NAME.columns, NAME.values
  kCoo,              ///< for exchange: NAME.rows, NAME.columns, NAME.values
  kBsr,              ///< for exchange: the compact store of blocks, whatever the pattern
};
std::string_view store_name(Store store);
/// What lies in the stores for exchange; kNone for the others.
format::ExchangeKind exchange_kind(Store store);

/// A weight as the model sees it, whatever tensors carry it.
struct WeightInfo {
  std::string name;  ///< "model.layers.0.self_attn.q_proj.weight"
  Shape shape;       ///< of the dense matrix
  DType dtype;       ///< of the values; of what the codes stand for when quantised
  Store store = Store::kDense;
  format::Pattern pattern;  ///< as the file declares it; dense when it declares nothing
  format::Quantization quantization;
  format::ExchangeForm form;       ///< of the stores for exchange, else none
  size_t bytes = 0;                ///< of all its tensors
  std::vector<std::string> parts;  ///< the safetensors names that carry it
};

/// A read-only model folder: config.json plus model.safetensors or shards with an index. Files are
/// mapped; nothing is read before it is asked for. Opening checks headers, the index against the
/// shards, sizes and offsets.
class Checkpoint {
 public:
  /// @errors kBadInput: missing file, bad header, a name in the index that no shard has, an unknown
  /// format version
  static Result<Checkpoint> open(const std::filesystem::path& folder);

  /// The same over a config and files that are open already; `config_file` is for messages. It has
  /// no folder and no checksums.
  static Result<Checkpoint> from_files(const nlohmann::json& config,
                                       const std::vector<SafetensorsFile>& files,
                                       const std::string& config_file);

  const std::filesystem::path& folder() const;
  /// config.json whole; its key "lacuna" holds what our files add.
  const nlohmann::json& config() const;
  /// Every weight by name, in a fixed order (sorted by name).
  const std::map<std::string, WeightInfo, std::less<>>& weights() const;
  bool contains(std::string_view name) const;
  /// Reads one weight: its dense tensor, or what any other store holds as a CompactMatrix of the
  /// declared pattern, sound by validate().
  /// @errors kBadInput: unknown name; a matrix that breaks its rules (row and column named);
  /// kNotPossible: a store for exchange whose matrix doesn't fit into memory
  Result<Weight> weight(std::string_view name, const Executor& executor = Executor::serial()) const;
  /// Takes a weight's bytes in the files out of this process's memory, once they were copied or
  /// packed; whoever reads them again finds them as they were.
  void release(std::string_view name) const;
  /// The same, dense. @errors as weight()
  Result<Tensor> dense(std::string_view name) const;
  /// One raw tensor of the files by its safetensors name.
  Result<Tensor> part(std::string_view name) const;
  /// Bytes of all safetensors data.
  size_t total_bytes() const;
  bool has_checksums() const;
  /// Compares every 1 MiB chunk of a weight's parts with checksums.json; returns one line per chunk
  /// that differs, naming tensor and chunk. @errors kBadInput: no checksums for it
  Result<std::vector<std::string>> verify_checksums(std::string_view name) const;

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

/// Writes a model folder: weights first, in any order, then finish(). Everything is staged in
/// `OUT.partial/` and the folder is renamed to OUT at the end, so OUT never holds half a model.
/// Shards are cut at `shard_bytes`. The order of tensors in the files is the order of add(); the
/// same calls give the same bytes.
class CheckpointWriter {
 public:
  struct Options {
    Store store = Store::kCompact;  ///< how sparse weights are written; dense tensors stay dense in
                                    ///< every store
    /// kBsr: block:RxC. Dense: the blocks of the matrix's own pattern, 32x32 where it has none.
    format::Pattern blocks;
    uint64_t shard_bytes = uint64_t{5} << 30;
    std::shared_ptr<const OutLock> lock;  ///< on OUT, when the caller has it already
  };
  /// @errors kBadInput: OUT exists and was not written by this tool (no "lacuna" key in its
  /// config.json, not empty) or holds something else beside; another run writes there. kUsage: OUT
  /// is the current folder or above it
  static Result<CheckpointWriter> create(const std::filesystem::path& out, Options options);
  CheckpointWriter(CheckpointWriter&&) noexcept;
  CheckpointWriter& operator=(CheckpointWriter&&) noexcept;
  ~CheckpointWriter();
  /// Adds a dense tensor as it is (embeddings, norms, biases, unpruned weights).
  Status add(const std::string& name, const Tensor& tensor);
  /// Adds a sparse or quantised weight in the store of the options (kDense: expanded with zeros,
  /// codes become the values that they stand for).
  /// @errors kBadInput: codes for a legacy store or one for exchange, which have no place for them
  Status add(const std::string& name, const format::CompactMatrix& matrix);
  /// Copies a companion file (tokenizer.json, generation_config.json, ...) byte by byte.
  Status copy_file(const std::filesystem::path& from);
  /// Writes a companion file of this name and content. @errors kCheckFailed with the system's
  /// reason
  Status add_text(const std::string& name, std::string_view text);
  /// Writes index, checksums.json and config.json (`config` as given; the caller has put the
  /// "lacuna" key in) and renames the folder. @errors kCheckFailed (disk full, ...)
  Status finish(const nlohmann::json& config);

 private:
  CheckpointWriter();
  struct State;
  std::unique_ptr<State> state_;
};

/// Copies tokenizer, generation config and the other small files of a model folder (never weights
/// or config.json).
Status copy_companion_files(const std::filesystem::path& from, CheckpointWriter& writer);

/// XXH3-64 of every 1 MiB of `bytes`, as 16 hex digits each.
std::vector<std::string> chunk_checksums(const Bytes& bytes);

}  // namespace lacuna::io
