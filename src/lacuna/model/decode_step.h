// One step of 1..16 tokens without a framework: kernels on a planned arena.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "lacuna/kernels/decode/decode.h"
#include "lacuna/model/decoder.h"

namespace lacuna::model {

/// What a step leaves of the last token.
struct StepResult {
  const float* logits = nullptr;  ///< [vocab], good until the next step
  int32_t best = 0;  ///< lowest index of the largest logit, -1 if one is not a finite number
};

/// Runs a model on the CPU a few tokens at a time, each step after those in the cache. The same
/// function as Decoder::forward, from the same description and the same weights, as a fixed
/// sequence of kernels over buffers that were laid out once, on threads that spin between them. A
/// step allocates nothing but room in the cache, which doubles.
///
/// One thread at a time may use it; the decoder and the cache must outlive it.
class DecodeStep {
 public:
  static constexpr int64_t kMaxTokens = format::kMaxTokens;

  /// Why this decoder can't be run so ("a GPU", "heads of 512"), or nothing.
  static std::optional<std::string> refusal(const Decoder& decoder);

  /// @param cache  of one sequence (batch 1)
  /// @param operations  null = the fastest of this CPU
  DecodeStep(const Decoder& decoder, KvCache& cache,
             const kernels::decode::Operations* operations = nullptr);
  ~DecodeStep();
  DecodeStep(const DecodeStep&) = delete;
  DecodeStep& operator=(const DecodeStep&) = delete;

  /// Feeds 1..kMaxTokens ids and advances the cache.
  StepResult run(const std::vector<int32_t>& ids);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lacuna::model
