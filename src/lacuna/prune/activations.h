// The calibration's samples on their way through the blocks of a model.
#pragma once

#include "lacuna/model/decoder.h"
#include "lacuna/prune/pipeline.h"

namespace lacuna::prune {

/// How many samples run through a block together, and how many such batches at once.
struct Batches {
  int64_t batch = 1, at_once = 1;
  uint64_t bytes = 0;  ///< that a block holds of all of them
  Batches(int64_t samples, int64_t length, const io::DecoderSpec& spec,
          const PruneOptions& options);
};

/// Hidden states of all calibration samples at one place between the blocks. Samples run through a
/// block in batches of fixed size, each on one thread, several at a time: the bits depend neither
/// on the threads nor on how many run at once.
class Activations {
 public:
  /// Before the first block. @param folder  where a file holds them; empty: they are held in
  /// memory. @errors as model::Ends::load() and io::scratch_memory()
  static Result<Activations> embed(const io::Checkpoint& checkpoint, const io::DecoderSpec& spec,
                                   const Calibration& calibration, const PruneOptions& options,
                                   const std::filesystem::path& folder);
  /// The same states, held in memory, to go another way from here.
  Activations copy() const;

  /// Gives the observer of the batch that runs at `place` (0 .. at_once() - 1).
  using ObserverAt = std::function<model::LinearObserver(int64_t place)>;
  /// Follows every few batches, with their samples; an error stops the pass.
  using After = std::function<Status(int64_t samples)>;
  /// Runs all samples through a block, whose outputs take their place if `replace` is set.
  Status run(const model::Block& block, bool replace, const ObserverAt& observe,
             const After& after);
  Status forward(const model::Block& block, const After& after) {
    return run(
        block, /*replace=*/true, [](int64_t) { return model::LinearObserver(); }, after);
  }

  /// [samples, length, hidden]
  const at::Tensor& hidden() const { return hidden_; }
  const model::Rotary& rotary() const { return rotary_; }
  int64_t at_once() const { return at_once_; }
  const Executor& executor() const { return executor_; }

 private:
  Activations(const Batches& batches, at::Device device)
      : batch_(batches.batch), at_once_(batches.at_once), device_(device) {}
  int64_t batch_, at_once_;
  at::Device device_;  ///< that blocks run on
  bool in_file_ = false;
  Executor executor_;
  model::Rotary rotary_;
  at::Tensor hidden_;
};

}  // namespace lacuna::prune
