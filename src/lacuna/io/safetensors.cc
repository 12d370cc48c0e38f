#include "lacuna/io/safetensors.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <tuple>

#include "lacuna/io/file.h"
#include "lacuna/io/json.h"

namespace lacuna::io {
namespace {
using nlohmann::json;

constexpr uint64_t kLargestHeader = 100'000'000;
constexpr uint64_t kAlignment = 64;
constexpr uint64_t kLargestExtent = uint64_t{1} << 56;  // times 8 bytes still counts in 64 bits
constexpr const char* kMetadata = "__metadata__";

/// One entry of the header as it is written there; what it promises is for check_entry.
Result<SafetensorsFile::Entry> read_entry(const std::string& file, const std::string& name,
                                          const json& value) {
  const auto broken = [&](std::string_view rule) {
    return bad_input("{}: tensor \"{}\" {}. The file is damaged: get it again.", file, name, rule);
  };
  if (!value.is_object() || !value.contains("dtype") || !value["dtype"].is_string() ||
      !value.contains("shape") || !value["shape"].is_array() || !value.contains("data_offsets") ||
      !value["data_offsets"].is_array() || value["data_offsets"].size() != 2)
    return broken("has no dtype, shape and two data_offsets");
  SafetensorsFile::Entry entry;
  entry.name = name;
  const auto& dtype = value["dtype"].get_ref<const std::string&>();
  const auto known = dtype_from_safetensors(dtype);
  if (!known)
    return bad_input(
        "{}: tensor \"{}\" has an unknown dtype (got {}; need one of {}). Convert it first.", file,
        name, dtype, "F64, F32, F16, BF16, F8_E4M3, F8_E5M2, I64, I32, I16, I8, U32, U8, BOOL");
  entry.dtype = *known;
  for (const json& extent : value["shape"]) {
    if (!extent.is_number_unsigned() || extent.get<uint64_t>() > kLargestExtent)
      return broken("has a shape that is not a list of sizes");
    entry.shape.push_back(extent.get<int64_t>());
  }
  for (const json& offset : value["data_offsets"])
    if (!offset.is_number_unsigned()) return broken("has data_offsets that are no positions");
  entry.begin = value["data_offsets"][0];
  entry.end = value["data_offsets"][1];
  if (entry.begin > entry.end) return broken("ends before it begins");
  return entry;
}

/// Does a tensor take as many bytes as its shape says?
Status check_entry(const std::string& file, const SafetensorsFile::Entry& entry) {
  const auto elements = element_count(entry.shape);
  if (!elements || static_cast<uint64_t>(*elements) > kLargestExtent)
    return bad_input(
        "{}: tensor \"{}\" has an impossible shape (got {}; need a product below 2^56).", file,
        entry.name, shape_text(entry.shape));
  const uint64_t need = static_cast<uint64_t>(*elements) * size_bytes(entry.dtype);
  if (entry.end - entry.begin != need)
    return bad_input(
        "{}: tensor \"{}\" takes the wrong number of bytes (got {}; need {} for {} {}).", file,
        entry.name, entry.end - entry.begin, need, safetensors_name(entry.dtype),
        shape_text(entry.shape));
  return {};
}

}  // namespace

Result<SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  LACUNA_TRY(Bytes bytes, map_file(path));
  LACUNA_TRY(SafetensorsFile file, parse(std::move(bytes), path.string()));
  file.mapped_ = true;
  return file;
}

Result<SafetensorsFile> SafetensorsFile::parse(Bytes bytes, std::string name) {
  if (bytes.size() < 8)
    return bad_input("{}: not a safetensors file (got {} bytes; need at least 8). Get it again.",
                     name, bytes.size());
  const auto header_bytes = read_unaligned<uint64_t>(bytes.data());
  if (header_bytes > kLargestHeader)
    return bad_input(
        "{}: not a safetensors file (got a header of {} bytes; need at most {}). Get it again.",
        name, header_bytes, kLargestHeader);
  if (header_bytes > bytes.size() - 8)
    return bad_input("{}: the header ends at byte {} of {} (file truncated?). Get it again.", name,
                     header_bytes + 8, bytes.size());
  const auto* text = reinterpret_cast<const char*>(bytes.data()) + 8;
  LACUNA_TRY(const json header, parse_json_object({text, header_bytes}, name + ": the header"));

  SafetensorsFile file;
  file.path_ = std::move(name);
  file.data_ = bytes.slice(8 + header_bytes, bytes.size() - 8 - header_bytes);
  for (const auto& [key, value] : header.items()) {
    if (key != kMetadata) {
      LACUNA_TRY(Entry entry, read_entry(file.path_, key, value));
      file.entries_.push_back(std::move(entry));
      continue;
    }
    for (const auto& [k, v] : value.items()) {
      if (!value.is_object() || !v.is_string())
        return bad_input("{}: {} is not an object of strings. The file is damaged: get it again.",
                         file.path_, kMetadata);
      file.metadata_[k] = v.get<std::string>();
    }
  }
  std::sort(file.entries_.begin(), file.entries_.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  LACUNA_CHECK(file.check_layout());
  for (size_t i = 0; i < file.entries_.size(); ++i) file.index_[file.entries_[i].name] = i;
  return file;
}

Status SafetensorsFile::check_layout() const {
  uint64_t position = 0;
  for (size_t i = 0; i < entries_.size(); ++i) {
    const Entry& entry = entries_[i];
    if (entry.begin < position)
      return bad_input(
          "{}: tensor \"{}\" overlaps \"{}\" (begins at byte {}; need {}). The file is damaged: "
          "get "
          "it again.",
          path_, entry.name, entries_[i - 1].name, entry.begin, position);
    if (entry.begin > position)
      return bad_input(
          "{}: nothing describes the bytes before tensor \"{}\" (begins at byte {}; need {}). The "
          "file is damaged: get it again.",
          path_, entry.name, entry.begin, position);
    if (entry.end > data_.size())
      return bad_input("{}: tensor \"{}\" ends at byte {} of {} (file truncated?). Get it again.",
                       path_, entry.name, entry.end, data_.size());
    LACUNA_CHECK(check_entry(path_, entry));
    position = entry.end;
  }
  if (position != data_.size())
    return bad_input("{}: {} bytes follow the last tensor (need none). Get it again.", path_,
                     data_.size() - position);
  return {};
}

Result<Tensor> SafetensorsFile::tensor(std::string_view name) const {
  const auto it = index_.find(name);
  if (it == index_.end()) return bad_input("{}: has no tensor \"{}\".", path_, name);
  const Entry& entry = entries_[it->second];
  return Tensor{entry.dtype, entry.shape, data_.slice(entry.begin, entry.end - entry.begin)};
}

Result<std::string> safetensors_header(const std::string& file,
                                       const std::vector<SafetensorsFile::Entry>& entries,
                                       const std::map<std::string, std::string>& metadata) {
  // ordered_json keeps the order of the tensors, which is the order of their bytes.
  nlohmann::ordered_json header = nlohmann::ordered_json::object();
  if (!metadata.empty()) header[kMetadata] = metadata;
  for (const auto& entry : entries) {
    LACUNA_CHECK(check_entry(file, entry));
    if (header.contains(entry.name))
      return bad_input("{}: tensor \"{}\" is given twice.", file, entry.name);
    header[entry.name] = {{"dtype", safetensors_name(entry.dtype)},
                          {"shape", entry.shape},
                          {"data_offsets", {entry.begin, entry.end}}};
  }
  std::string text;
  try {
    text = header.dump();
  } catch (const json::exception& error) {
    return bad_input("{}: names and metadata must be UTF-8 ({}).", file, error.what());
  }
  text.append((kAlignment - (8 + text.size()) % kAlignment) % kAlignment, ' ');
  const uint64_t bytes = text.size();
  if (bytes > kLargestHeader)
    return bad_input(
        "{}: too many tensors for one file (got a header of {} bytes; need at most {}).", file,
        bytes, kLargestHeader);
  return std::string(reinterpret_cast<const char*>(&bytes), sizeof(bytes)) + text;
}

Status write_safetensors(const std::filesystem::path& path, const std::vector<NamedTensor>& tensors,
                         const std::map<std::string, std::string>& metadata) {
  std::vector<SafetensorsFile::Entry> entries;
  uint64_t position = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t end = position + tensor.bytes.size();
    entries.push_back({name, tensor.dtype, tensor.shape, position, end});
    position = end;
  }
  LACUNA_TRY(const std::string header, safetensors_header(path.string(), entries, metadata));
  LACUNA_TRY(auto file, AtomicFile::create(path));
  LACUNA_CHECK(file.write(header.data(), header.size()));
  for (const auto& [name, tensor] : tensors)
    LACUNA_CHECK(file.write(tensor.bytes.data(), tensor.bytes.size()));
  return file.commit();
}

}  // namespace lacuna::io
