// One step of 1..16 tokens, or of one token for each of several sequences, without a framework:
// kernels on a planned arena.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "lacuna/kernels/decode/decode.h"
#include "lacuna/model/decoder.h"

namespace lacuna::model {

/// Runs a model a few tokens at a time, each step after those in the cache. The same function as
/// Decoder::forward, from the same description and the same weights, as a fixed sequence of kernels
/// over buffers that were laid out once. A step allocates nothing but room in the cache, which
/// doubles. On a CPU its threads spin between the kernels; on a GPU the sequence for one token (of
/// each sequence of the cache) is recorded once and replayed (a CUDA graph).
///
/// One thread at a time may use it; the decoder and the cache must outlive it, and no weight may be
/// replaced meanwhile.
class DecodeStep {
 public:
  static constexpr int64_t kMaxTokens = format::kMaxTokens;
  static constexpr int64_t kMaxSequences = 64;

  /// Why this decoder can't be run so ("heads of 512"), or nothing.
  static std::optional<std::string> refusal(const Decoder& decoder);

  /// @param cache  of 1..kMaxSequences sequences
  /// @param operations  null = the fastest of the decoder's device
  DecodeStep(const Decoder& decoder, KvCache& cache,
             const kernels::decode::Operations* operations = nullptr);
  ~DecodeStep();
  DecodeStep(const DecodeStep&) = delete;
  DecodeStep& operator=(const DecodeStep&) = delete;

  /// Feeds 1..kMaxTokens ids and advances the cache.
  /// @return the lowest index of the largest logit after the last of them, -1 if one of the logits
  /// is not a finite number
  int32_t run(const std::vector<int32_t>& ids);
  /// With a cache of several sequences: feeds one id to each. The cache says how many tokens the
  /// longest has (it advances here where that one grows), `lengths` how many each has, which this
  /// counts up.
  /// @return for each sequence what run() returns
  std::vector<int32_t> run_each(const std::vector<int32_t>& ids, std::vector<int32_t>& lengths);
  /// Logits after the last token, float32 [vocab] on the decoder's device, or [sequences, vocab];
  /// good until the next step.
  const at::Tensor& logits() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lacuna::model
