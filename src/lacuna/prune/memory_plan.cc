// planned_peak_bytes() (pipeline.h): what each pass of a run (passes.h) holds.
#include <algorithm>

#include "lacuna/prune/activations.h"
#include "lacuna/prune/gradients.h"
#include "lacuna/prune/passes.h"

namespace lacuna::prune {
namespace {

uint64_t squared(int64_t n) { return static_cast<uint64_t>(n * n); }

/// Of a block's Linears: all weights, those of the largest, and the square of the widest input.
struct Sizes {
  uint64_t block = 0, largest = 0, widest = 0;

  explicit Sizes(const io::DecoderSpec& spec) {
    for (const io::LinearSpec& linear : spec.block_linears()) {
      const auto weights = static_cast<uint64_t>(linear.out * linear.in);
      block += weights;
      largest = std::max(largest, weights);
      widest = std::max(widest, squared(linear.in));
    }
  }
};

/// Parts of compact weights, whose pages nobody gives back.
uint64_t mapped_bytes(const io::Checkpoint& checkpoint) {
  uint64_t mapped = 0;
  for (const auto& [name, info] : checkpoint.weights())
    if (info.store != io::Store::kDense) mapped += info.bytes;
  return mapped;
}

/// A square of each input, and one that is factored; of a folder their upper triangles too, as they
/// lie in the file.
uint64_t statistics_bytes(const io::DecoderSpec& spec, uint64_t widest, bool on_disk) {
  const uint64_t grams = squared(spec.q.in) + squared(spec.o.in) + squared(spec.up.in) +
                         squared(spec.down.in) + 2 * widest;
  return grams * 4 + (on_disk ? grams * 2 : 0);
}

uint64_t ends_bytes(const io::DecoderSpec& spec, const io::Checkpoint& checkpoint,
                    uint64_t element) {
  uint64_t ends = 0;
  for (const std::string* name : {&spec.embedding, &spec.position_embedding, &spec.lm_head,
                                  &spec.project_in, &spec.project_out}) {
    const auto found = checkpoint.weights().find(*name + ".weight");
    if (found != checkpoint.weights().end())  // a tied head has none
      ends += static_cast<uint64_t>(element_count(found->second.shape).value_or(0)) * element;
  }
  return ends;
}

}  // namespace

uint64_t planned_peak_bytes(const io::DecoderSpec& spec, const io::Checkpoint& checkpoint,
                            const CalibrationSource& source, const PruneOptions& options,
                            bool states_in_file) {
  const auto method = method_of(options);
  const Passes passes(spec, source.samples, options, method.ok() ? method->slope() : Slope::kNone);
  const Sizes sizes(spec);
  const auto element = static_cast<uint64_t>(c10::elementSize(options.compute.dtype));
  const uint64_t mapped = mapped_bytes(checkpoint);
  const uint64_t scratches = mapped == 0 ? 0
                                         : static_cast<uint64_t>(model::torch_executor().threads) *
                                               sizes.largest * element;
  // The block that is loaded, what is finished of it, and what a solver makes of its largest weight
  // in float32: the weight, its new self, scores, and their products for the error.
  uint64_t pruning = mapped + scratches + 2 * sizes.block * std::max<uint64_t>(element, 4) +
                     6 * sizes.largest * 4 + options.working_bytes;
  if (passes.any_statistics()) {
    pruning += statistics_bytes(spec, sizes.widest, passes.on_disk);
    if (method.ok()) pruning += method->working_bytes(sizes.largest, sizes.widest);
  }
  if (passes.samples > 0) {
    const uint64_t ends = ends_bytes(spec, checkpoint, element);
    const Batches batches(passes.samples, source.length, spec, options);
    const int64_t held =
        states_in_file ? std::min(passes.samples, batches.batch * batches.at_once) : passes.samples;
    const uint64_t activations =
        static_cast<uint64_t>(held * source.length * spec.hidden) * element;
    // Half of the working bytes is theirs already.
    pruning +=
        ends + activations + batches.bytes - std::min(batches.bytes, options.working_bytes / 2);
    const GradientPlan plan(passes.slope, spec, passes.samples, source.length, options.compute,
                            options.working_bytes);
    if (passes.wants_regional_gradients())  // a block's, while inputs are held
      pruning += 4 * sizes.block + plan.bytes;
    if (passes.wants_loss_gradients())
      pruning = 4 * sizes.block * static_cast<uint64_t>(spec.layers) +
                std::max(pruning, ends + mapped + scratches + plan.bytes);
    if (!passes.reconstruct.none()) {
      const uint64_t training = planned_training_bytes(spec, passes.samples, source.length,
                                                       passes.reconstruct, options.compute);
      pruning += activations;  // of the dense model
      if (passes.reconstruct.block) pruning += training / static_cast<uint64_t>(spec.layers);
      if (passes.reconstruct.model)
        pruning = std::max(pruning, mapped + training + options.working_bytes);
    }
  }
  if (!source.self) return pruning;
  return std::max(pruning, planned_sampling_bytes(spec, checkpoint, source.samples, source.length,
                                                  *source.self) +
                               options.working_bytes);
}

}  // namespace lacuna::prune
