// What survives a kill: a folder beside OUT with one file for every finished block.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/format/compact.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::prune {

/// `OUT.journal/`: journal.json says which run this is, block-NNN.safetensors holds the pruned
/// weights of one block, densely, in the dtype of the file, or those with codes as the compact
/// store has them. Every file appears whole or not at all.
class Journal {
 public:
  struct Block {
    std::vector<io::NamedTensor> tensors;
    nlohmann::json notes;  ///< what the report says of the block

    /// A weight with codes, as the tensors and the note that carry it.
    Status add(const std::string& name, const format::CompactMatrix& coded);
    /// All of them by name; empty where the weights are dense. @errors kBadInput: damaged
    Result<std::map<std::string, format::CompactMatrix>> coded() const;
  };

  static bool exists(const std::filesystem::path& out);
  /// Whether open() would find a place: before hours of work, and before `run` is known.
  /// @errors kBadInput: OUT.journal is something else than a journal, or holds finished blocks and
  /// `resume` is not set
  static Status check(const std::filesystem::path& out, bool resume);
  /// Opens the journal of `out`. When there is none, or none of its blocks is finished and `resume`
  /// is not set, it starts empty.
  /// @param run  everything that decides the result (model, options, calibration)
  /// @errors as check(); kBadInput: resuming the journal of another run (what differs is named);
  /// kCheckFailed
  static Result<Journal> open(const std::filesystem::path& out, const nlohmann::json& run,
                              bool resume);
  /// This is the journal that an earlier process left.
  bool resumed() const { return resumed_; }
  /// Blocks 0 .. n-1 are finished.
  int64_t finished_blocks() const { return finished_; }
  /// @errors kCheckFailed (disk full, ...)
  Status write(int64_t block, const Block& content);
  /// Tensors of a finished block, mapped. @errors kBadInput: damaged, or another block's
  Result<Block> read(int64_t block) const;
  Status remove() const;

 private:
  std::filesystem::path file_of(int64_t block) const;
  std::filesystem::path folder_;
  bool resumed_ = false;
  int64_t finished_ = 0;
};

}  // namespace lacuna::prune
