// How fast whole models read a prompt and write an answer.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/bench/samples.h"
#include "lacuna/core/status.h"
#include "lacuna/model/decoder.h"

namespace lacuna::bench {

struct ModelSpeedOptions {
  int64_t prompt = 128;     ///< tokens read at once, random ids
  int64_t tokens = 64;      ///< tokens written after the first
  int64_t batch = 1;        ///< prompts that are answered at once
  int64_t repetitions = 5;  ///< timed, after one that isn't
  bool profile = false;     ///< also count the time inside the Linears
  uint64_t seed = 0;
};

/// One model; medians over the repetitions.
struct ModelSpeed {
  Summary prefill_ms;  ///< the prompts, to the first token of each
  Summary decode_ms;   ///< one later token of each
  double prefill_tokens_per_second = 0, decode_tokens_per_second = 0;
  size_t weight_bytes = 0;
  /// Share of the time inside Linear::forward, 0..1; negative: not measured.
  double prefill_linear_share = -1, decode_linear_share = -1;
  std::vector<double> prefill_samples_ms, decode_samples_ms;  ///< by repetition
};

/// Times model::generate_ids (of several prompts generate_batch_ids), greedy, end-of-text ignored,
/// the models taking turns.
/// @errors kUsage: prompt and tokens don't fit a model's positions; kNotPossible: a batch of a
/// model that can't be run step by step; kInterrupted
Result<std::vector<ModelSpeed>> time_models(
    const std::vector<const model::Decoder*>& decoders, const ModelSpeedOptions& options,
    const std::function<void(int64_t done, int64_t total)>& step = {},
    const std::atomic<bool>* interrupted = nullptr);

/// What one model took for one prompt and one answer.
struct ModelTurn {
  double prefill_ms = 0, decode_ms = 0;
};

/// Someone else says whose turn it is, because other programs take theirs in between.
struct ModelTurns {
  /// The next model, or nothing: that was all.
  std::function<std::optional<size_t>()> next;
  std::function<void(size_t model, const ModelTurn& turn)> done;
};

/// The same in an order from outside, after one untimed turn of each model. `repetitions` has no
/// say; a model that had no turn has no samples. @errors as time_models
Result<std::vector<ModelSpeed>> time_models_by_turns(
    const std::vector<const model::Decoder*>& decoders, const ModelSpeedOptions& options,
    const ModelTurns& turns, const std::atomic<bool>* interrupted = nullptr);

}  // namespace lacuna::bench
