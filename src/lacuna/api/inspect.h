// What a model folder holds, without running it.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"

namespace lacuna::api {

struct InspectedLayer {
  std::string name;  ///< of the weight
  Shape shape;
  std::string dtype;         ///< of the values, long name
  std::string quantization;  ///< "int4g64", ...; "none"
  std::string format;        ///< store: "dense", "compact", "sparse-bitmask", ...
  std::string pattern;       ///< declared, or detected in a dense tensor
  double sparsity = 0;       ///< share of zeros
  uint64_t bytes = 0;
};

struct InspectReport {
  std::string model, architecture;
  int64_t parameters = 0, tensors = 0;
  uint64_t bytes = 0, bytes_dense = 0;
  double sparsity = 0;                 ///< over the Linears of the decoder blocks
  std::vector<InspectedLayer> layers;  ///< every matrix of the model
  std::vector<std::string> dtypes;
};

/// Counts zeros in every matrix, so it reads the whole model once.
/// @errors those of io::Checkpoint::open and io::decoder_spec
Result<InspectReport> inspect(const std::filesystem::path& model);

nlohmann::json to_json(const InspectReport& report);

}  // namespace lacuna::api
