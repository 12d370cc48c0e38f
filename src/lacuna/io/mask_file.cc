#include "lacuna/io/mask_file.h"

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/json.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::io {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

constexpr const char* kNotes = "lacuna";
constexpr const char* kKind = "mask";
constexpr const char* kSuffix = ".mask";
constexpr int kVersion = 1;
constexpr int64_t kLargestExtent = (int64_t{1} << 31) - 1;

int64_t stride_of(int64_t columns) { return (columns + 7) / 8; }

/// The last byte of a row may hold no bits past its last column.
bool ends_clean(const WeightMask& mask) {
  const int64_t stride = stride_of(mask.columns);
  const auto beyond = static_cast<uint8_t>(mask.columns % 8 == 0 ? 0 : 0xff << (mask.columns % 8));
  for (int64_t row = 0; row < mask.rows; ++row)
    if (mask.bitmap.as<uint8_t>()[(row + 1) * stride - 1] & beyond) return false;
  return true;
}

Result<WeightMask> read_mask(const SafetensorsFile& file, const std::string& name,
                             const json& about, const json& checksums) {
  const auto wrong = [&](const std::string& what) {
    return bad_input("{}: mask of \"{}\": {}. Get the file again.", file.path(), name, what);
  };
  WeightMask mask;
  const auto pattern = format::Pattern::parse(about.at("pattern").get<std::string>());
  const auto values = dtype_from_safetensors(about.at("values").get<std::string>());
  if (!pattern.ok() || pattern->kind == format::PatternKind::kDense || !values)
    return wrong("unknown pattern or type");
  mask.pattern = *pattern;
  mask.values = *values;
  mask.rows = about.at("shape").at(0);
  mask.columns = about.at("shape").at(1);
  if (mask.rows < 1 || mask.columns < 1 || mask.rows > kLargestExtent ||
      mask.columns > kLargestExtent)
    return wrong("impossible shape");
  LACUNA_TRY(const Tensor tensor, file.tensor(name + kSuffix));
  if (tensor.dtype != DType::kU8 || tensor.shape != Shape{mask.rows, stride_of(mask.columns)})
    return wrong(fmt::format("has another shape than its weight (got {}, need {})",
                             shape_text(tensor.shape),
                             shape_text({mask.rows, stride_of(mask.columns)})));
  if (!checksums.contains(name) || checksums[name] != chunk_checksums(tensor.bytes))
    return wrong("is damaged (its checksum differs)");
  mask.bitmap = tensor.bytes;
  if (!ends_clean(mask)) return wrong("has bits past the last column");
  return mask;
}

}  // namespace

Status write_mask_file(const fs::path& file, const MaskFile& masks) {
  json notes = {{"kind", kKind},        {"version", kVersion},         {"weights", json::object()},
                {"dense", masks.dense}, {"checksums", json::object()}, {"about", masks.about}};
  std::vector<NamedTensor> tensors;
  for (const auto& [name, mask] : masks.weights) {
    notes["weights"][name] = {{"pattern", mask.pattern.text()},
                              {"shape", {mask.rows, mask.columns}},
                              {"values", safetensors_name(mask.values)}};
    notes["checksums"][name] = chunk_checksums(mask.bitmap);
    tensors.push_back(
        {name + kSuffix, {DType::kU8, {mask.rows, stride_of(mask.columns)}, mask.bitmap}});
  }
  return write_safetensors(file, tensors, {{kNotes, notes.dump()}});
}

Result<MaskFile> read_mask_file(const fs::path& path) {
  LACUNA_TRY(const auto file, SafetensorsFile::open(path));
  const auto refuse = [&](const std::string& what) {
    return bad_input("{}: {} (need what `lacuna diff` writes).", file.path(), what);
  };
  const auto found = file.metadata().find(kNotes);
  if (found == file.metadata().end()) return refuse("not a file of masks");
  LACUNA_TRY(const json notes, parse_json_object(found->second, file.path() + ": the notes"));
  MaskFile masks;
  try {
    if (notes.at("kind") != kKind) return refuse("not a file of masks");
    if (notes.at("version") != kVersion)
      return refuse(
          fmt::format("of another version (got {}; need {})", notes["version"].dump(), kVersion));
    masks.about = notes.at("about");
    masks.dense = notes.at("dense").get<std::map<std::string, std::string>>();
    for (const auto& [name, about] : notes.at("weights").items()) {
      LACUNA_TRY(masks.weights[name], read_mask(file, name, about, notes.at("checksums")));
    }
  } catch (const json::exception& error) {
    return refuse(fmt::format("its notes can't be read ({})", error.what()));
  }
  return masks;
}

}  // namespace lacuna::io
