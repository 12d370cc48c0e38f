// Safetensors files that only this tool reads again: notes beside the tensors, and checksums of
// both.
#pragma once

#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::io {

struct NotedTensors {
  std::vector<NamedTensor> tensors;  ///< views of the mapped file
  nlohmann::json notes;
};

/// Writes the file atomically. @errors as write_safetensors()
Status write_noted(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                   const nlohmann::json& notes);
/// All of it, names, types, shapes, bytes and notes as they were written.
/// @param remedy  what to do about a damaged file; ends the message
/// @errors kBadInput: missing, cut off, or not byte for byte what write_noted() wrote; says where
Result<NotedTensors> read_noted(const std::filesystem::path& path, const std::string& remedy);

}  // namespace lacuna::io
