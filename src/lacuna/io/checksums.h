// checksums.json: XXH3-64 of every 1 MiB of every tensor.
#pragma once

#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::io {

inline constexpr size_t kChecksumChunkBytes = size_t{1} << 20;

/// Safetensors name -> 16 hex digits a chunk.
using Checksums = std::map<std::string, std::vector<std::string>, std::less<>>;

/// The text of checksums.json.
std::string checksums_text(const Checksums& checksums);
/// @errors kBadInput: not such a file, or another algorithm or chunk size
Result<Checksums> read_checksums(const std::filesystem::path& file);

}  // namespace lacuna::io
