// Tensors as they come, into safetensors files of bounded size.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/io/checksums.h"
#include "lacuna/io/file.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::io {

/// A header comes first and is known last, so a shard's data is spooled to a file of its own and
/// copied behind the header when the shard is full: one shard more of disk, no memory.
class ShardWriter {
 public:
  ShardWriter(std::filesystem::path folder, uint64_t shard_bytes)
      : folder_(std::move(folder)), shard_bytes_(shard_bytes) {}
  /// Appends tensors that stay together in one shard. @errors kBadInput: a name that was there
  /// before; kCheckFailed with the system's reason
  Status add(const std::vector<NamedTensor>& tensors);
  /// Closes the last shard; what was written so far lies in files().
  Status close();
  /// The shards, in order, under their preliminary names.
  const std::vector<std::filesystem::path>& files() const { return files_; }
  const Checksums& checksums() const { return checksums_; }
  /// Closes and gives the shards their final names: model.safetensors, or numbered ones with an
  /// index.
  Status finish();

 private:
  std::filesystem::path folder_;
  uint64_t shard_bytes_;
  std::vector<std::filesystem::path> files_;
  std::vector<std::vector<std::string>> names_;  ///< of the tensors of each closed shard
  Checksums checksums_;
  uint64_t total_bytes_ = 0;
  std::optional<AtomicFile> spool_;  ///< never gets its name: it goes when the shard is written
  std::vector<SafetensorsFile::Entry> entries_;  ///< of the open shard
};

}  // namespace lacuna::io
