// QuantConfig and QuantizationManager: codes for weights by name, as SparsityConfig has them for
// masks.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "lacuna/core/status.h"
#include "lacuna/format/quantization.h"
#include "lacuna/model/decoder.h"
#include "lacuna/prune/method.h"

namespace lacuna {

/// What weights and activations become, and by what. Every option is either honoured or refused by
/// name.
struct QuantConfig {
  /// "int8", "int4", "fp8", with a group or "row" and "z" behind it ("int4g32z").
  std::string weight_dtype = "int4";
  /// What x is while a loaded model runs; the file doesn't depend on it. 16 bits: "bfloat16",
  /// "float16", "w8a16", "w4a16"; rounded to 8 bits where a kernel takes them so: "int8", "w8a8",
  /// "w4a8". The w of a pair names the scheme; weight_dtype says what weights are.
  std::string activation_dtype = "w8a16";
  /// "none": the nearest code. "awq": ranges searched by the inputs' energy (no channel scales).
  /// "gptq": rounding errors spread over what is left (docs/methods/quantized.md).
  std::string calibration = "gptq";
  int64_t calibration_samples = 128, calibration_length = 2048;
  bool keep_head = false;        ///< embedding and output matrix stay; else they become int8
  std::string backend = "auto";  ///< "auto", "cpu", "cuda"
  uint64_t seed = 0;
};

/// The parts of a config that were read. @errors kUsage, naming the option
struct QuantChoice {
  format::Quantization weights;
  bool int8_activations = false;
  bool calibrated = false;
  prune::Coding coding = prune::Coding::kGptq;
};
Result<QuantChoice> read(const QuantConfig& config);

/// Makes codes of a model, dense or sparse, whose masks stay as they are. To choose mask and codes
/// together: SparsityConfig::fuse_with_quant. Not thread-safe.
class QuantizationManager {
 public:
  explicit QuantizationManager(QuantConfig config = {}) : config_(std::move(config)) {}
  /// Writes the quantised model into `out` (empty: MODEL-WEIGHT_DTYPE beside it) and returns the
  /// folder. @param dataset  a file, a name under LACUNA_DATASETS, or empty: the model's own
  /// samples; not looked at without calibration @errors those of the steps; kUsage: as read()
  Result<std::string> calibrate(const std::string& model, const std::string& dataset,
                                const std::string& out = "") const;
  /// Loads a model for running with the activations of the config.
  Result<std::shared_ptr<const model::Decoder>> load(const std::string& model) const;

 private:
  QuantConfig config_;
};

}  // namespace lacuna
