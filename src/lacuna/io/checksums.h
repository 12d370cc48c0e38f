// checksums.json: XXH3-64 of every 1 MiB of every tensor.
#pragma once

#include <filesystem>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/status.h"

namespace lacuna::io {

inline constexpr size_t kChecksumChunkBytes = size_t{1} << 20;

/// Safetensors name -> 16 hex digits a chunk.
using Checksums = std::map<std::string, std::vector<std::string>, std::less<>>;

/// One checksum of all bytes: the XXH3-64 of every MiB, and of those again until one is left.
std::string whole_checksum(const Bytes& bytes);
std::string whole_checksum(std::string_view text);
/// A file's name as JSON can hold it: what isn't UTF-8 is replaced.
std::string recorded_name(const std::string& name);
/// The text of checksums.json. `files`: what else was written into the folder, by name.
std::string checksums_text(const Checksums& checksums, const std::vector<std::string>& files);
/// Those names again; nothing where the file is missing, damaged or older than the list.
std::optional<std::vector<std::string>> read_written_files(const std::filesystem::path& file);
/// @errors kBadInput: not such a file, or another algorithm or chunk size
Result<Checksums> read_checksums(const std::filesystem::path& file);

}  // namespace lacuna::io
