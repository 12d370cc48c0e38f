#include "lacuna/prune/statistics_folder.h"

#include <cstring>
#include <utility>
#include <vector>

#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/noted_file.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

constexpr const char* kAbout = "statistics.json";
constexpr int kVersion = 2;
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
  for (fs::directory_iterator entry(folder, failure), end; !failure && entry != end;
       entry.increment(failure))
    if (const std::string name = entry->path().filename().string();
        !name.starts_with("block-") && !name.starts_with(kAbout))
      return bad_input(
          "{}: holds {}, which is no part of statistics (need a new or empty folder). Choose "
          "another.",
          folder.string(), name);
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
    return bad_input(
        "{}: statistics of another version (got {}; need {}). Collect the statistics again.",
        folder.string(), version.dump(), kVersion);
  return found;
}

Status StatisticsFolder::write(int64_t layer, const InputsByTarget& inputs) {
  std::vector<io::NamedTensor> tensors;
  json notes = {{"block", layer}, {"inputs", json::object()}};
  std::map<const InputStatistics*, std::string> named;
  for (const auto& [linear, statistics] : inputs) {
    const auto [place, first] = named.emplace(statistics.get(), linear);
    notes["inputs"][linear] = {{"of", place->second},
                               {"width", statistics->square_sums.numel()},
                               {"sequences", statistics->sequences},
                               {"tokens", statistics->tokens}};
    if (!first) continue;
    if (!statistics->square_sums.isfinite().all().item<bool>())
      return bad_input(
          "block {}: inputs of {} are not all finite (NaN or infinity). Verify the model, or "
          "compute in --dtype float32.",
          layer, linear);
    const auto add = [&](const char* what, const at::Tensor& values) {
      const at::Tensor here = values.cpu().contiguous();
      const float* from = here.const_data_ptr<float>();
      tensors.push_back({fmt::format("{}.{}", linear, what),
                         {DType::kF32,
                          {here.numel()},
                          Bytes::take(std::vector<float>(from, from + here.numel()))}});
    };
    add("gram", packed(statistics->gram));
    add("square_sums", statistics->square_sums);
    add("sums", statistics->sums);
  }
  return io::write_noted(file_of(layer), tensors, notes);
}

Status StatisticsFolder::finish() {
  return io::write_text(folder_ / kAbout, about_.dump(2) + "\n");
}

Result<InputsByTarget> StatisticsFolder::read(int64_t layer) const {
  const fs::path path = file_of(layer);
  LACUNA_TRY(const auto file, io::read_noted(path, "Collect the statistics again."));
  std::map<std::string, Tensor> tensors;
  for (const auto& [name, tensor] : file.tensors) tensors[name] = tensor;
  /// A copy, float32 of `elements`.
  const auto values = [&](const std::string& name, int64_t elements) -> Result<at::Tensor> {
    const auto found = tensors.find(name);
    if (found == tensors.end() || found->second.dtype != DType::kF32 ||
        found->second.elements() != elements)
      return bad_input("{}: tensor \"{}\" has another size than its input (need {} elements).",
                       path.string(), name, elements);
    at::Tensor copy = at::empty({elements}, at::kFloat);
    std::memcpy(copy.mutable_data_ptr<float>(), found->second.bytes.data(), copy.nbytes());
    return copy;
  };
  InputsByTarget inputs;
  try {
    if (file.notes.at("block") != layer)
      return bad_input("{}: holds the statistics of another block. Collect the statistics again.",
                       path.string());
    for (const auto& [linear, about] : file.notes.at("inputs").items()) {
      const std::string of = about.at("of");
      if (const auto shared = inputs.find(of); shared != inputs.end()) {
        inputs[linear] = shared->second;
        continue;
      }
      const int64_t n = about.at("width");
      if (n < 1 || n > kWidest)
        return bad_input("{}: input of \"{}\": width out of range (got {}).", path.string(), of, n);
      auto statistics = std::make_shared<InputStatistics>();
      statistics->sequences = about.at("sequences");
      statistics->tokens = about.at("tokens");
      LACUNA_TRY(const at::Tensor gram, values(of + ".gram", n * (n + 1) / 2));
      statistics->gram = unpacked(gram, n);
      LACUNA_TRY(statistics->square_sums, values(of + ".square_sums", n));
      LACUNA_TRY(statistics->sums, values(of + ".sums", n));
      inputs[linear] = inputs[of] = std::move(statistics);
    }
  } catch (const json::exception& error) {
    return bad_input("{}: the notes are not those of statistics ({}).", path.string(),
                     error.what());
  }
  return inputs;
}

}  // namespace lacuna::prune
