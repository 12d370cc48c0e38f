// Training the kept weights of a pruned model towards what the dense model puts out.
#pragma once

#include <ATen/ATen.h>

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/model/decoder.h"
#include "lacuna/prune/calibration.h"
#include "lacuna/prune/masked_adam.h"

namespace lacuna::prune {

/// What the kept weights of the block Linears are trained for, by Adam on the calibration's tokens.
/// Masks, biases, norms, embedding and output matrix stay as they are.
struct ReconstructOptions {
  bool block = false;  ///< the outputs of each block, before the next one is pruned
  bool model = false;  ///< the predictions of the whole model, when all blocks are pruned
  int64_t epochs = 8;  ///< passes over the calibration, of each of the two
  int64_t batch = 2;   ///< samples a step
  double rate = 4e-4;  ///< the highest learning rate
  bool none() const { return !block && !model; }
};
/// "block", "model". @errors kUsage: another word
Status add_reconstruction(std::string_view name, ReconstructOptions& options);

/// A block whose pruned Linears are under training.
class BlockTraining {
 public:
  /// @param block  shared: it has these weights from now on, and wants gradients until release()
  /// @param names, weights  the pruned Linears by relative name; the others stay as they are
  BlockTraining(model::Block block, std::vector<std::string> names,
                const std::vector<at::Tensor>& weights, const model::Compute& compute);
  const model::Block& block() const { return block_; }
  const std::vector<std::string>& names() const { return names_; }
  MaskedAdam& weights() { return weights_; }
  const MaskedAdam& weights() const { return weights_; }
  /// Gradients of <output, given> by the inputs (first) and by the weights.
  std::vector<at::Tensor> backward(const at::Tensor& inputs, const model::Rotary& rotary,
                                   const at::Tensor& given) const;
  /// The block's weights want no gradients any more.
  void release();

 private:
  model::Block block_;
  std::vector<std::string> names_;
  MaskedAdam weights_;
};

/// What both trainings share.
struct Training {
  const ReconstructOptions& options;
  const model::Compute& compute;
  const model::Rotary& rotary;
  uint64_t seed = 0;
  /// Follows every step, with its samples; an error ends the training.
  std::function<Status(int64_t epoch, int64_t samples)> stepped;
};

/// Makes a block's outputs like the dense block's: mean over tokens of |y - t|^2 / |t|^2, y the
/// block's output for what the pruned blocks before it give, t the dense block's for what the dense
/// ones give.
/// @param inputs, targets  [samples, length, hidden]
/// @return the objective of each epoch, a mean over its steps
/// @determinism as prune_model()
Result<std::vector<double>> train_block(BlockTraining& block, const at::Tensor& inputs,
                                        const at::Tensor& targets, const Training& training);

/// Makes the model's predictions like the dense model's: mean over tokens of KL(dense || pruned).
/// Gradients go through one block at a time, whose forward pass is repeated for them, so that no
/// more than a block's intermediate results and the blocks' inputs are held.
/// @param dense  [samples, length, hidden]: outputs of the dense model's last block
/// @return the objective of each epoch, a mean over its steps, in nats
/// @determinism as prune_model()
Result<std::vector<double>> train_model(std::vector<BlockTraining>& blocks, const model::Ends& ends,
                                        const Calibration& calibration, const at::Tensor& dense,
                                        const Training& training);

/// One step of train_model() without the change of weights: KL(dense || pruned) over samples, as a
/// float64 scalar on the device; `visit` gets each block's gradients, from the last block to the
/// first, and may change its weights.
/// @param samples  row numbers of the calibration
at::Tensor model_gradients(
    const std::vector<BlockTraining>& blocks, const model::Ends& ends,
    const Calibration& calibration, const at::Tensor& dense, const std::vector<int64_t>& samples,
    const model::Compute& compute, const model::Rotary& rotary,
    const std::function<void(size_t block, const std::vector<at::Tensor>& gradients)>& visit);

/// Peak memory of train_model() with all that it is handed.
uint64_t planned_training_bytes(const io::DecoderSpec& spec, int64_t samples, int64_t length,
                                const ReconstructOptions& options, const model::Compute& compute);

}  // namespace lacuna::prune
