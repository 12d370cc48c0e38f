#include "lacuna/io/checksums.h"

#include <xxhash.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"

namespace lacuna::io {
namespace {
using nlohmann::json;

constexpr const char* kAlgorithm = "XXH3-64";

}  // namespace

std::vector<std::string> chunk_checksums(const Bytes& bytes) {
  std::vector<std::string> checksums;
  for (size_t begin = 0; begin < bytes.size(); begin += kChecksumChunkBytes)
    checksums.push_back(fmt::format(
        "{:016x}",
        XXH3_64bits(bytes.data() + begin, std::min(kChecksumChunkBytes, bytes.size() - begin))));
  return checksums;
}

std::string whole_checksum(const Bytes& bytes) {
  std::string all;
  for (const std::string& chunk : chunk_checksums(bytes)) all += chunk;
  if (all.size() <= 16) return all;
  return whole_checksum(all);
}

std::string whole_checksum(std::string_view text) {
  return whole_checksum(Bytes::take(std::vector<char>(text.begin(), text.end())));
}

std::string recorded_name(const std::string& name) {
  return json::parse(json(name).dump(-1, ' ', false, json::error_handler_t::replace))
      .get<std::string>();
}

std::string checksums_text(const Checksums& checksums, const std::vector<std::string>& files) {
  json names = json::array();
  for (const std::string& name : files) names.push_back(recorded_name(name));
  const json file = {{"algorithm", kAlgorithm},
                     {"chunk_bytes", kChecksumChunkBytes},
                     {"files", std::move(names)},
                     {"tensors", checksums}};
  return file.dump(1) + "\n";
}

std::optional<std::vector<std::string>> read_written_files(const std::filesystem::path& file) {
  const auto text = read_text(file);
  const auto parsed =
      text.ok() ? parse_json_object(*text, file.string()) : Result<json>(text.error());
  if (!parsed.ok() || !parsed->contains("files") || !(*parsed)["files"].is_array())
    return std::nullopt;
  std::vector<std::string> names;
  for (const json& name : (*parsed)["files"])
    if (name.is_string()) names.push_back(name.get<std::string>());
  return names;
}

Result<Checksums> read_checksums(const std::filesystem::path& file) {
  LACUNA_TRY(const std::string text, read_text(file));
  LACUNA_TRY(const json parsed, parse_json_object(text, file.string()));
  if (!parsed.contains("tensors") || !parsed["tensors"].is_object())
    return bad_input("{}: not a list of checksums (need an object with \"tensors\"). Get it again.",
                     file.string());
  if (parsed.value("algorithm", json()) != kAlgorithm ||
      parsed.value("chunk_bytes", json()) != kChecksumChunkBytes)
    return bad_input("{}: unknown checksums (need {} of every {} bytes).", file.string(),
                     kAlgorithm, kChecksumChunkBytes);
  Checksums checksums;
  for (const auto& [name, chunks] : parsed["tensors"].items()) {
    std::vector<std::string>& list = checksums[name];
    for (const json& chunk : chunks) {
      if (!chunks.is_array() || !chunk.is_string())
        return bad_input("{}: tensor \"{}\" has no list of checksums. Get it again.", file.string(),
                         name);
      list.push_back(chunk.get<std::string>());
    }
  }
  return checksums;
}

}  // namespace lacuna::io
