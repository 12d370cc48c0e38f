// Models of a known shape with random weights, for sizing and timing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"
#include "lacuna/io/checkpoint.h"

namespace lacuna::model {

struct SynthOptions {
  std::string like;         ///< "llama-3.2-1b", ... (synth_names())
  format::Pattern pattern;  ///< dense, or random masks of this pattern
  double sparsity = 0.5;    ///< for unstructured and block patterns
  io::Store store = io::Store::kCompact;
  DType dtype = DType::kBF16;
  uint64_t seed = 0;
};

struct SynthReport {
  int64_t parameters = 0;
  uint64_t bytes = 0;
};

std::vector<std::string> synth_names();
/// The config.json of a known shape. @errors kUsage: unknown name (lists the known ones)
Result<std::string> synth_config(const std::string& like);
/// Writes the folder tensor by tensor. Weights are normal with deviation 0.02, norms 1; the same
/// seed gives the same bytes. @errors as synth_config, and those of io::CheckpointWriter
Result<SynthReport> synth(const SynthOptions& options, const std::filesystem::path& out);

}  // namespace lacuna::model
