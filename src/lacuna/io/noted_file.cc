#include "lacuna/io/noted_file.h"

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"

namespace lacuna::io {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

// Keys of the safetensors metadata.
constexpr const char* kNotes = "lacuna";
constexpr const char* kChecksums = "checksums";
// Keys of the checksums.
constexpr const char* kOfNotes = "notes";
constexpr const char* kOfTensors = "tensors";

json about(const Tensor& tensor) {
  return {safetensors_name(tensor.dtype), tensor.shape, chunk_checksums(tensor.bytes)};
}

}  // namespace

Status write_noted(const fs::path& path, const std::vector<NamedTensor>& tensors,
                   const json& notes) {
  const std::string text = notes.dump();
  json checksums = {{kOfNotes, whole_checksum(text)}, {kOfTensors, json::object()}};
  for (const auto& [name, tensor] : tensors) checksums[kOfTensors][name] = about(tensor);
  return write_safetensors(path, tensors, {{kNotes, text}, {kChecksums, checksums.dump()}});
}

Result<NotedTensors> read_noted(const fs::path& path, const std::string& remedy) {
  const auto damaged = [&](const std::string& what) {
    return bad_input("{}: {} is damaged. {}", path.string(), what, remedy);
  };
  std::error_code failure;
  if (!fs::exists(path, failure)) return bad_input("{}: is missing. {}", path.string(), remedy);
  const auto file = SafetensorsFile::open(path);
  if (!file.ok()) return damaged("the header or the length");
  const auto& metadata = file->metadata();
  if (!metadata.contains(kNotes) || !metadata.contains(kChecksums)) return damaged("the header");
  const std::string& text = metadata.at(kNotes);
  const auto checksums = parse_json_object(metadata.at(kChecksums), path.string());
  if (!checksums.ok() || checksums->value(kOfNotes, "") != whole_checksum(text))
    return damaged("the header");
  NotedTensors content;
  LACUNA_TRY(content.notes, parse_json_object(text, path.string() + ": the notes"));
  const json of_tensors = checksums->value(kOfTensors, json::object());
  if (of_tensors.size() != file->entries().size()) return damaged("the header");
  for (const auto& entry : file->entries()) {
    LACUNA_TRY(Tensor tensor, file->tensor(entry.name));
    if (of_tensors.value(entry.name, json()) != about(tensor))
      return damaged(fmt::format("tensor \"{}\"", entry.name));
    if (file->mapped()) release_pages(tensor.bytes);
    content.tensors.push_back({entry.name, std::move(tensor)});
  }
  return content;
}

}  // namespace lacuna::io
