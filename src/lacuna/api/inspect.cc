#include "lacuna/api/inspect.h"

#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/api/layers.h"
#include "lacuna/model/decoder.h"

namespace lacuna::api {

Result<InspectReport> inspect(const std::filesystem::path& model) {
  LACUNA_TRY(const io::Checkpoint checkpoint, io::Checkpoint::open(model));
  LACUNA_TRY(const io::DecoderSpec spec, model::spec_of(checkpoint));
  InspectReport report;
  report.model = model.string();
  report.architecture = spec.architecture;
  report.bytes = checkpoint.total_bytes();
  report.tensors = static_cast<int64_t>(checkpoint.weights().size());
  const std::set<std::string> prunable = block_weights(spec);
  std::set<std::string> dtypes;
  SparsityCount total;
  for (const auto& [name, info] : checkpoint.weights()) {
    const int64_t elements = element_count(info.shape).value_or(0);
    report.parameters += elements;
    report.bytes_dense += static_cast<uint64_t>(elements) * size_bytes(info.dtype);
    dtypes.insert(std::string(long_name(info.dtype)));
    if (info.shape.size() != 2) continue;
    LACUNA_TRY(const io::Weight weight, checkpoint.weight(name));
    const SparsityCount count = count_zeros(weight);
    if (prunable.contains(name)) total.add(count);
    report.layers.push_back({name, info.shape, std::string(long_name(info.dtype)),
                             info.quantization.text(), std::string(io::store_name(info.store)),
                             pattern_of(info, weight).text(), count.sparsity(), info.bytes});
  }
  report.sparsity = total.sparsity();
  report.dtypes.assign(dtypes.begin(), dtypes.end());
  return report;
}

nlohmann::json to_json(const InspectReport& report) {
  nlohmann::json layers = nlohmann::json::array();
  for (const InspectedLayer& layer : report.layers)
    layers.push_back({{"name", layer.name},
                      {"shape", layer.shape},
                      {"dtype", layer.dtype},
                      {"quantization", layer.quantization},
                      {"format", layer.format},
                      {"pattern", layer.pattern},
                      {"sparsity", layer.sparsity},
                      {"bytes", layer.bytes}});
  return {{"verb", "inspect"},
          {"model", report.model},
          {"architecture", report.architecture},
          {"parameters", report.parameters},
          {"tensors", report.tensors},
          {"dtypes", report.dtypes},
          {"bytes", report.bytes},
          {"bytes_dense", report.bytes_dense},
          {"sparsity", report.sparsity},
          {"layers", std::move(layers)}};
}

}  // namespace lacuna::api
