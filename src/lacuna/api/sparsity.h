// SparsityConfig and SparsityManager: the library's front door.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/model/decoder.h"

namespace lacuna {

/// What to prune and how. Every option is either honoured or refused by name.
struct SparsityConfig {
  std::string pattern = "n:m";  ///< "unstructured", "n:m", "block"; "dynamic" is not available yet
  double sparsity_ratio = 0.5;  ///< share of zeros; for "n:m" it follows from n and m
  int n = 2;                    ///< "n:m": weights kept of every m
  int m = 4;
  std::string pruning_method =
      "magnitude";  ///< as `prune --method`: "magnitude", "wanda", "ria", "dsnot", "hessian",
                    ///< "gradient", "sparsegpt", "alps"
  std::vector<std::string>
      target_layers;  ///< unanchored regular expressions; empty = all Linears of the blocks
  std::vector<std::string> exclude_layers;
  std::string calibration_dataset;  ///< a file, a name under LACUNA_DATASETS, or empty: the model's
                                    ///< own samples
  int64_t calibration_samples = 128, calibration_length = 2048;
  bool use_gradient = false;  ///< scores by gradients: magnitude becomes |w g|, wanda Wanda++'s
                              ///< regional score, hessian w^2 E[g^2]; other methods are refused
  int block_size = 32;        ///< "block" and "bsr": block_size x block_size
  std::string format =
      "compact";                ///< "compact", "dense", "compressed-tensors", "csr", "coo", "bsr"
  bool enable_dynamic = false;  ///< not available yet
  double dynamic_threshold = 0.1;  ///< another one: not available yet
  bool fuse_with_quant = false;    ///< mask and codes are made together (`prune --quantize`); needs
                                   ///< quant_dtype and, whatever the method, calibration
  std::string quant_dtype;  ///< what the kept weights become after pruning: "int8", "int4", "fp8",
                            ///< a group and z behind it ("int4g32z"); empty: they stay as they are
  std::string backend = "auto";    ///< "auto", "cpu", "cuda"; "triton", "tensorrt" are refused
  bool use_hardware_accel = true;  ///< false: not available yet
  uint64_t seed = 0;
};

/// Prunes, loads, proves and reports. Not thread-safe.
///
///     SparsityManager manager({.pattern = "n:m", .pruning_method = "sparsegpt"});
///     auto folder = manager.prune("models/llama", "models/llama-24");
///     auto zeros = manager.verify_sparsity(*folder);
class SparsityManager {
 public:
  explicit SparsityManager(SparsityConfig config = {});
  ~SparsityManager();

  /// Prunes a model folder into `out` (empty: MODEL-PATTERN[-QUANT_DTYPE] beside it) and returns
  /// the folder written. With quant_dtype, unless it is fused, OUT-unquantized lies beside it until
  /// the codes are written; then the masks are proved unchanged and it goes.
  /// @errors kUsage (an option that is wrong or not available yet, by name), kBadInput,
  /// kNotPossible
  Result<std::string> prune(const std::string& model, const std::string& out = "");
  /// Loads a pruned (or any) model for running; the sparse weights stay compact in memory.
  Result<std::shared_ptr<const model::Decoder>> load_sparse_model(const std::string& model);
  /// Layer name -> share of zeros, counted in the stored weights. @errors also kCheckFailed: the
  /// model is damaged
  Result<std::map<std::string, double>> verify_sparsity(const std::string& model);
  /// The operation and implementation that would run the configured pattern on this machine, and
  /// why.
  Result<std::string> select_kernel() const;
  /// What has been measured so far: avg_sparsity, memory_saving after prune(); perplexity_delta
  /// after measure(); speedup likewise. What was not measured is absent.
  std::map<std::string, double> report() const;
  /// Measures the pruned model against the dense one on a text: perplexity_delta (relative) and
  /// speedup of decoding (dense time / sparse time).
  Status measure(const std::string& model, const std::string& dense, const std::string& text);

 private:
  SparsityConfig config_;
  std::map<std::string, double> report_;
};

}  // namespace lacuna
