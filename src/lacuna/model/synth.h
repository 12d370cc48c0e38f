// Models of a known shape with random weights, for sizing and timing.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"
#include "lacuna/format/quantization.h"
#include "lacuna/io/checkpoint.h"

namespace lacuna::model {

struct SynthOptions {
  std::string like;         ///< "llama-3.2-1b", ... (synth_names())
  format::Pattern pattern;  ///< dense, or random masks of this pattern
  double sparsity = 0.5;    ///< for unstructured and block patterns
  /// Of the Linears of the blocks; with one, embedding and output matrix become int8, as `convert
  /// --quantize` has it.
  format::Quantization quantization;
  io::Store store = io::Store::kCompact;
  DType dtype = DType::kBF16;
  uint64_t seed = 0;

  /// The same with the pattern, sparsity and codes of a text: PATTERN[@SPARSITY][/CODE], as in
  /// "dense", "unstructured@0.7", "2:4/int8". @errors kUsage: no such pattern, code or sparsity; a
  /// sparsity of its own for dense and KEEP:OF
  Result<SynthOptions> as_variant(std::string_view text) const;
  /// The text that as_variant() reads.
  std::string variant() const;
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
/// The same weights without a file: a checkpoint over ordinary memory. `store` has no say.
/// @errors as synth_config
Result<io::Checkpoint> synth_in_memory(const SynthOptions& options);

}  // namespace lacuna::model
