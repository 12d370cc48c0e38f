// Pruning a whole model, block by block, in bounded memory, so that a kill costs one block.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/model/torch.h"
#include "lacuna/prune/calibration.h"
#include "lacuna/prune/method.h"

namespace lacuna::prune {

struct PruneOptions {
  std::string method = "sparsegpt";
  Request request;
  std::vector<std::string>
      target;  ///< unanchored regular expressions over weight names; empty = all block Linears
  std::vector<std::string> exclude;
  io::Store store = io::Store::kCompact;
  model::Compute compute;  ///< of the calibration's forward passes
  uint64_t seed = 0;
  bool resume = false;
};

struct LayerReport {
  std::string name;
  double sparsity = 0;
  double error = 0;  ///< relative_error(); negative when the method has no inputs
  double damping = 0;
  double seconds = 0;
};

struct PruneReport {
  std::filesystem::path out;
  double seconds = 0, sparsity = 0;  ///< sparsity over the pruned weights
  uint64_t bytes_dense = 0, bytes_out = 0;
  uint64_t planned_peak_bytes = 0;  ///< stated before the start
  std::vector<LayerReport> layers;
  std::vector<std::string> warnings;
};

struct PruneProgress {
  std::function<void(const std::string& line)> log;  ///< plan, warnings
  std::function<void(int64_t done, int64_t total, const std::string& what)> step;
  const std::atomic<bool>* interrupted = nullptr;
};

/// Peak memory of a run: two blocks + embeddings + calibration activations + three squares of the
/// widest input in float32 + 1 GiB.
uint64_t planned_peak_bytes(const io::DecoderSpec& spec, const io::Checkpoint& checkpoint,
                            const Calibration& calibration, const PruneOptions& options);

/// Loop (SparseGPT's and Wanda's): statistics of the unpruned block's inputs, prune all its
/// Linears, recompute the block's outputs through the pruned weights, next block. Every finished
/// block is durable in `OUT.journal/`; with `resume` finished blocks are taken from there and
/// activations are recomputed through them, so a killed run ends in the same bytes. Values are
/// written in the dtype of the input; biases, norms, embeddings and lm_head as they were.
/// @errors kBadInput (NaN in a weight, journal of another run, ...), kUsage, kInterrupted,
/// kCheckFailed
Result<PruneReport> prune_model(const io::Checkpoint& checkpoint, const Calibration& calibration,
                                const std::filesystem::path& out, const PruneOptions& options,
                                const PruneProgress& progress = {});

}  // namespace lacuna::prune
