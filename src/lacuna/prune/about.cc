#include "lacuna/prune/about.h"

#include "lacuna/core/version.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/file.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

json about_compute(const model::Compute& compute) {
  return {compute.device.str(), c10::toString(compute.dtype)};
}

json about_calibration(const Calibration& calibration) {
  return {{"source", calibration.source},
          {"samples", calibration.samples()},
          {"length", calibration.length()},
          {"hash", calibration.hash()}};
}

json about_allocation(const AllocationOptions& options) {
  json about = {{"by", allocation_name(options.by)}};
  if (options.budget) about["budget"] = options.budget->text();
  if (options.by == Allocation::kOwl)
    about.update({{"multiple", options.owl_multiple}, {"lambda", options.owl_lambda}});
  if (options.by == Allocation::kError) about["width"] = options.error_width;
  return about;
}

json about_reconstruction(const ReconstructOptions& options) {
  return {{"block", options.block},
          {"model", options.model},
          {"epochs", options.epochs},
          {"batch", options.batch},
          {"learning_rate", options.rate}};
}

json about_method(const PruneOptions& options, const Method& method,
                  const Calibration& calibration) {
  json about = {{"method", method.name()}, {"seed", options.seed}, {"tool_version", kVersion}};
  if (options.request.keep_mask) {
    about["mask"] = "kept";
  } else {
    about["pattern"] = options.request.pattern.text();
    about["sparsity"] = options.request.sparsity;
  }
  if (options.request.rest.kind != format::PatternKind::kDense)
    about["dense_columns_beside"] = options.request.rest.text();
  if (options.request.pattern.kind != format::PatternKind::kKeepOf && !options.request.keep_mask)
    about["group"] = group_name(options.request.group.value_or(method.default_group()));
  if (!options.request.quantization.none()) {
    about["quantization"] = options.request.quantization.text();
    about["coding"] = coding_name(options.request.coding);
  }
  if (method.needs_gram()) about["damping"] = options.request.damping;
  if (!options.reconstruct.none()) about["reconstruct"] = about_reconstruction(options.reconstruct);
  if (!options.allocation.none()) about["allocation"] = about_allocation(options.allocation);
  if (calibration.samples() > 0) about["calibration"] = about_calibration(calibration);
  if (!options.refine_target.empty()) about["refine_target"] = options.refine_target;
  return about;
}

}  // namespace

json to_json(const LayerReport& layer) {
  return {{"name", layer.name},
          {"sparsity", layer.sparsity},
          {"error", layer.error},
          {"damping", layer.damping},
          {"iterations", layer.iterations},
          {"fell_back", layer.fell_back},
          {"dead_inputs", layer.dead_inputs},
          {"seconds", layer.seconds}};
}

LayerReport layer_from(const json& layer) {
  return {layer.at("name"),
          layer.at("sparsity"),
          layer.at("error"),
          layer.at("damping"),
          layer.at("iterations"),
          layer.at("fell_back"),
          layer.value("dead_inputs", int64_t{0}),
          layer.value("seconds", 0.0)};
}

std::vector<std::string> sampled_hashes(const Bytes& bytes) {
  constexpr size_t kSample = size_t{64} << 10;
  std::vector<size_t> starts = {0};
  if (bytes.size() > kSample) starts = {0, (bytes.size() - kSample) / 2, bytes.size() - kSample};
  std::vector<std::string> hashes;
  for (const size_t start : starts) {
    hashes.push_back(
        io::whole_checksum(bytes.slice(start, std::min(kSample, bytes.size() - start))));
  }
  return hashes;
}

Result<json> about_model(const io::Checkpoint& checkpoint) {
  json about = json::object();
  for (const auto& entry : fs::directory_iterator(checkpoint.folder())) {
    if (entry.path().extension() != ".safetensors") continue;
    LACUNA_TRY(const auto file, io::SafetensorsFile::open(entry.path()));
    json tensors = json::object();
    for (const auto& described : file.entries()) {
      LACUNA_TRY(const Tensor tensor, file.tensor(described.name));
      tensors[described.name] = {safetensors_name(tensor.dtype), tensor.shape,
                                 sampled_hashes(tensor.bytes)};
      if (file.mapped()) io::release_pages(tensor.bytes);
    }
    about[entry.path().filename().string()] = {fs::file_size(entry.path()),
                                               io::whole_checksum(tensors.dump())};
  }
  return about;
}

Result<json> about_statistics(const Run& run) {
  json about;
  LACUNA_TRY(about["model"], about_model(run.checkpoint));
  about["config"] = run.checkpoint.config();
  about["calibration"] = about_calibration(run.calibration);
  about["compute"] = about_compute(run.options.compute);
  return about;
}

Result<json> about_run(const Run& run) {
  json about = about_method(run.options, *run.method, run.calibration);
  about["compute"] = about_compute(run.options.compute);
  about["targets"] = run.targets;
  about["config"] = run.checkpoint.config();
  LACUNA_TRY(about["model"], about_model(run.checkpoint));
  for (const auto& [file, parts] : about["model"].items())
    about["times"][file] =
        fs::last_write_time(run.checkpoint.folder() / file).time_since_epoch().count();
  if (run.statistics) about["statistics"] = run.statistics->about();
  if (!run.allotted.empty()) about["allotted"] = run.allotted;
  return about;
}

json about_written(const Run& run) {
  json about = about_method(run.options, *run.method, run.calibration);
  if (run.statistics) {
    about["statistics"] = "dense";
    about["calibration"] = run.statistics->about().value("calibration", json());
  }
  return about;
}

}  // namespace lacuna::prune
