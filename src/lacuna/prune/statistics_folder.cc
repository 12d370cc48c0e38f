#include "lacuna/prune/statistics_folder.h"

#include <cstring>
#include <utility>
#include <vector>

#include "lacuna/io/checkpoint.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

constexpr const char* kAbout = "statistics.json";
constexpr const char* kNotes = "lacuna";
constexpr int kVersion = 1;
constexpr int64_t kWidest = int64_t{1} << 20;

/// The upper triangle of a symmetric matrix, row by row.
at::Tensor packed(const at::Tensor& gram) {
  const at::Tensor matrix = gram.cpu().contiguous();
  const int64_t n = matrix.size(0);
  at::Tensor triangle = at::empty({n * (n + 1) / 2}, at::kFloat);
  const float* from = matrix.const_data_ptr<float>();
  float* to = triangle.mutable_data_ptr<float>();
  for (int64_t row = 0; row < n; to += n - row, ++row)
    std::memcpy(to, from + row * n + row, static_cast<size_t>(n - row) * sizeof(float));
  return triangle;
}

at::Tensor unpacked(const at::Tensor& triangle, int64_t n) {
  at::Tensor matrix = at::empty({n, n}, at::kFloat);
  const float* from = triangle.const_data_ptr<float>();
  for (int64_t row = 0; row < n; from += n - row, ++row) {
    const at::Tensor part = triangle.narrow(0, from - triangle.const_data_ptr<float>(), n - row);
    matrix.select(0, row).narrow(0, row, n - row).copy_(part);
    matrix.select(1, row).narrow(0, row, n - row).copy_(part);
  }
  return matrix;
}

/// One tensor of a block's file, float32 of `elements`, with its checksums compared.
Result<at::Tensor> checked(const io::SafetensorsFile& file, const json& checksums,
                           const std::string& name, int64_t elements) {
  LACUNA_TRY(const Tensor tensor, file.tensor(name));
  if (tensor.dtype != DType::kF32 || tensor.elements() != elements)
    return bad_input(
        "{}: tensor \"{}\" has another size than its input (got {} elements, need "
        "{}).",
        file.path(), name, tensor.elements(), elements);
  if (!checksums.contains(name) || checksums[name] != io::chunk_checksums(tensor.bytes))
    return bad_input(
        "{}: tensor \"{}\" is damaged (its checksum differs). Collect the statistics "
        "again.",
        file.path(), name);
  at::Tensor values = at::empty({elements}, at::kFloat);
  std::memcpy(values.mutable_data_ptr<float>(), tensor.bytes.data(), tensor.bytes.size());
  return values;
}

}  // namespace

fs::path StatisticsFolder::file_of(int64_t layer) const {
  return folder_ / fmt::format("block-{:03}.safetensors", layer);
}

Result<StatisticsFolder> StatisticsFolder::create(const fs::path& folder, json about) {
  StatisticsFolder made;
  made.folder_ = folder;
  made.about_ = std::move(about);
  made.about_["version"] = kVersion;
  std::error_code failure;
  if (fs::exists(folder / kAbout, failure))
    return bad_input("{}: holds finished statistics. Use them by --statistics, or remove them.",
                     folder.string());
  fs::create_directories(folder, failure);
  if (failure)
    return check_failed("{}: can't be written ({}).", folder.string(), failure.message());
  return made;
}

Result<StatisticsFolder> StatisticsFolder::open(const fs::path& folder) {
  StatisticsFolder found;
  found.folder_ = folder;
  std::error_code failure;
  if (!fs::exists(folder / kAbout, failure))
    return bad_input("{}: holds no finished statistics (no {}). Make them by --save-statistics.",
                     folder.string(), kAbout);
  LACUNA_TRY(const std::string text, io::read_text(folder / kAbout));
  LACUNA_TRY(found.about_, io::parse_json_object(text, (folder / kAbout).string()));
  if (const json version = found.about_.value("version", json()); version != kVersion)
    return bad_input("{}: statistics of another version (got {}; need {}).", folder.string(),
                     version.dump(), kVersion);
  return found;
}

Status StatisticsFolder::write(int64_t layer, const InputsByTarget& inputs) {
  std::vector<io::NamedTensor> tensors;
  json notes = {{"inputs", json::object()}, {"checksums", json::object()}};
  std::map<const InputStatistics*, std::string> named;
  for (const auto& [linear, statistics] : inputs) {
    const auto [place, first] = named.emplace(statistics.get(), linear);
    notes["inputs"][linear] = {{"of", place->second},
                               {"width", statistics->square_sums.numel()},
                               {"sequences", statistics->sequences},
                               {"tokens", statistics->tokens}};
    if (!first) continue;
    const auto add = [&](const char* what, const at::Tensor& values) {
      const at::Tensor here = values.cpu().contiguous();
      const float* from = here.const_data_ptr<float>();
      const Tensor tensor{
          DType::kF32, {here.numel()}, Bytes::take(std::vector<float>(from, from + here.numel()))};
      const std::string name = fmt::format("{}.{}", linear, what);
      notes["checksums"][name] = io::chunk_checksums(tensor.bytes);
      tensors.push_back({name, tensor});
    };
    add("gram", packed(statistics->gram));
    add("square_sums", statistics->square_sums);
    add("sums", statistics->sums);
  }
  return io::write_safetensors(file_of(layer), tensors, {{kNotes, notes.dump()}});
}

Status StatisticsFolder::finish() {
  return io::write_text(folder_ / kAbout, about_.dump(2) + "\n");
}

Result<InputsByTarget> StatisticsFolder::read(int64_t layer) const {
  LACUNA_TRY(const auto file, io::SafetensorsFile::open(file_of(layer)));
  const auto found = file.metadata().find(kNotes);
  if (found == file.metadata().end())
    return bad_input("{}: not a file of statistics (no notes).", file.path());
  LACUNA_TRY(const json notes, io::parse_json_object(found->second, file.path() + ": the notes"));
  InputsByTarget inputs;
  try {
    for (const auto& [linear, about] : notes.at("inputs").items()) {
      const std::string of = about.at("of");
      if (const auto shared = inputs.find(of); shared != inputs.end()) {
        inputs[linear] = shared->second;
        continue;
      }
      const int64_t n = about.at("width");
      if (n < 1 || n > kWidest)
        return bad_input("{}: input of \"{}\": width out of range (got {}).", file.path(), of, n);
      const json& checksums = notes.at("checksums");
      auto statistics = std::make_shared<InputStatistics>();
      statistics->sequences = about.at("sequences");
      statistics->tokens = about.at("tokens");
      LACUNA_TRY(const at::Tensor gram, checked(file, checksums, of + ".gram", n * (n + 1) / 2));
      statistics->gram = unpacked(gram, n);
      LACUNA_TRY(statistics->square_sums, checked(file, checksums, of + ".square_sums", n));
      LACUNA_TRY(statistics->sums, checked(file, checksums, of + ".sums", n));
      inputs[linear] = inputs[of] = std::move(statistics);
    }
  } catch (const json::exception& error) {
    return bad_input("{}: the notes are not those of statistics ({}).", file.path(), error.what());
  }
  return inputs;
}

}  // namespace lacuna::prune
