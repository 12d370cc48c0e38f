// Pruning a whole model, block by block, in bounded memory, so that a kill costs two blocks at
// most.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/model/torch.h"
#include "lacuna/prune/allocation.h"
#include "lacuna/prune/calibration.h"
#include "lacuna/prune/method.h"
#include "lacuna/prune/reconstruct.h"

namespace lacuna::prune {

struct PruneOptions {
  std::string method = "sparsegpt";  ///< these four: MethodChoice
  std::string score, solve;
  std::vector<std::string> refine;
  std::vector<std::string> refine_target;  ///< as `target`: which weights are refined; empty = all
  Request request;
  AllocationOptions allocation;  ///< of the layers' sparsities
  ReconstructOptions reconstruct;
  std::vector<std::string>
      target;  ///< unanchored regular expressions over weight names; empty = all block Linears
  std::vector<std::string> exclude;
  io::Store store = io::Store::kCompact;
  format::Pattern blocks;  ///< of Store::kBsr, as io::CheckpointWriter::Options has them
  /// With codes (Request::quantization) embedding and output matrix become int8 with one scale a
  /// row, unless this is set.
  bool keep_head = false;
  model::Compute compute;  ///< of the calibration's forward passes
  uint64_t seed = 0;
  /// Where statistics of the dense model lie already: no calibration then, and no propagation of
  /// the pruned blocks' errors.
  std::filesystem::path statistics;
  /// Where they are to be written first, by one pass over the dense model; then as `statistics`.
  std::filesystem::path save_statistics;
  bool resume = false;
  /// That the plan must keep to, in bytes; 0: whatever it comes to. Activations between the blocks
  /// lie in a file beside OUT where that takes.
  uint64_t memory = 0;
  /// Of the plan: what isn't named there. Half of it bounds the batches that run at once.
  uint64_t working_bytes = uint64_t{1} << 30;
};

/// The stages that the options name. @errors as compose(); kUsage: codes in a store that has none
Result<Method> method_of(const PruneOptions& options);

/// Names of the weights that the options target. @errors kUsage: a regular expression that is none,
/// nothing left; kBadInput: a weight that no sparse store holds
Result<std::vector<std::string>> target_names(const io::Checkpoint& checkpoint,
                                              const io::DecoderSpec& spec,
                                              const PruneOptions& options);

/// Calibration that is still to be made: its sizes are known, so that the plan can be stated and
/// OUT checked before anything is read or computed for it.
struct CalibrationSource {
  int64_t samples = 0, length = 0;     ///< no samples: no calibration
  std::optional<model::Compute> self;  ///< sampled from the whole model, which is loaded so
  std::function<Result<Calibration>()> make;
};

struct LayerReport {
  std::string name;
  double sparsity = 0;
  double error = 0;  ///< relative_error(); negative when the method has no inputs
  double damping = 0;
  int64_t iterations = 0;   ///< of a solver that iterates
  bool fell_back = false;   ///< a warning says to what, and why
  int64_t dead_inputs = 0;  ///< zero in all of the calibration
  double seconds = 0;
};

struct PruneReport {
  std::filesystem::path out;
  std::string quantization = "none";  ///< of the pruned weights, as format::Quantization spells it
  double seconds = 0, sparsity = 0;   ///< sparsity over the pruned weights, as reached
  uint64_t bytes_dense = 0, bytes_out = 0;
  uint64_t planned_peak_bytes = 0;  ///< stated before the start
  std::string allocation;           ///< "curves": who gave up how much; empty: all the same
  std::string budget;               ///< as asked, or empty
  double budget_reached = 0;        ///< in the budget's unit; of a time: as predicted; 0: unknown
  /// What the seconds went to, in the order in which it was begun (phase_clock.h): calibration,
  /// gradients (of scores that want them), load (weights and embeddings), forward (calibration
  /// through the blocks), statistics, factor, solve, error (of the report), journal, reconstruct,
  /// write.
  std::vector<std::pair<std::string, double>> phases;
  std::vector<LayerReport> layers;  ///< as the solvers left them, before any reconstruction
  /// Mean KL(dense || pruned) of every epoch of ReconstructOptions::model, in nats.
  std::vector<double> reconstruction;
  std::vector<std::string> warnings;
};

struct PruneProgress {
  std::function<void(const std::string& line)> log;  ///< plan, warnings
  std::function<void(int64_t done, int64_t total, const std::string& what)> step;
  const std::atomic<bool>* interrupted = nullptr;
};

/// Peak memory of a run, of whichever phase takes more:
/// - sampling: planned_sampling_bytes() + working bytes;
/// - pruning: two blocks + six float32 copies of the largest weight + working bytes; with
///   calibration embeddings, activations between the blocks, a float32 square of each input and
///   two more of the widest, and what the method's stages say; of a sparse model also its parts and
///   a dense scratch a thread; the gradients that a score wants, and what makes them (gradients.h);
///   for a reconstruction activations of the dense model too;
/// - reconstruction of the model: planned_training_bytes().
/// @param states_in_file  activations between the blocks are not in memory
uint64_t planned_peak_bytes(const io::DecoderSpec& spec, const io::Checkpoint& checkpoint,
                            const CalibrationSource& source, const PruneOptions& options,
                            bool states_in_file = false);

/// Loop (SparseGPT's and Wanda's): statistics of the unpruned block's inputs, prune all its
/// Linears, recompute the block's outputs through the pruned weights, next block. Every finished
/// block is durable in `OUT.journal/` before the next one is finished; with `resume` finished
/// blocks are taken from there and activations are recomputed through them, so a killed run ends in
/// the same bytes. With statistics of the dense model from a folder nothing runs through the
/// blocks. Values are written in the dtype of the input; biases, norms, embeddings and lm_head as
/// they were. With PruneOptions::reconstruct the kept weights are trained further, block by block
/// before a block is durable, or all together at the end; a run that is stopped in the latter goes
/// on from the pruned blocks. The plan comes first, then OUT and its journal are checked, then
/// calibration is made. A run that fails before its first block is finished leaves nothing behind.
/// @errors kBadInput (NaN in a weight, journal of another run, another run that writes OUT, ...),
/// kUsage, kInterrupted, kCheckFailed
Result<PruneReport> prune_model(const io::Checkpoint& checkpoint, const CalibrationSource& source,
                                const std::filesystem::path& out, const PruneOptions& options,
                                const PruneProgress& progress = {});
/// The same with a calibration that is there.
Result<PruneReport> prune_model(const io::Checkpoint& checkpoint, const Calibration& calibration,
                                const std::filesystem::path& out, const PruneOptions& options,
                                const PruneProgress& progress = {});

/// One of several models made of one.
struct Variant {
  std::filesystem::path out;
  PruneOptions options;  ///< `statistics`: the same folder for all; damping, device and type too
  /// Under `resume`, a finished model in `out` that isn't this one is replaced.
  bool overwrite = false;
};

/// Prunes a model in many ways from statistics on disk, block by block: what methods derive from a
/// block's statistics (factors, eigenvectors) serves all variants. Each ends in the same bytes as
/// prune_model() alone would give it, keeps a journal of its own, and goes on with it under
/// `resume`, which also leaves models alone that are finished already (told by what they say of
/// themselves and samples of the weights that nobody prunes); all finished blocks of all variants
/// lie on disk, dense, before the first model is written.
/// @return reports in the order of `variants`; their seconds leave out what is shared, and all
/// seconds are 0 of a model that was finished before
/// @errors as prune_model()
Result<std::vector<PruneReport>> prune_variants(const io::Checkpoint& checkpoint,
                                                const std::vector<Variant>& variants,
                                                const PruneProgress& progress = {});

}  // namespace lacuna::prune
