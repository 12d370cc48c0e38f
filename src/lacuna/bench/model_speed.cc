#include "lacuna/bench/model_speed.h"

#include <algorithm>

#include "lacuna/core/random.h"
#include "lacuna/model/generate.h"

namespace lacuna::bench {
namespace {

/// What one model has taken so far.
struct Timings {
  std::vector<double> prefill_ms, decode_ms, prefill_linear, decode_linear;
};

/// Has the Linears count into a clock of its own while it lives.
class Profile {
 public:
  explicit Profile(bool on) {
    if (on) model::set_linear_clock(&clock_);
  }
  ~Profile() { model::set_linear_clock(nullptr); }
  Profile(const Profile&) = delete;
  Profile& operator=(const Profile&) = delete;
  double ms() const { return static_cast<double>(clock_.nanoseconds) / 1e6; }

 private:
  model::LinearClock clock_;
};

Status time_once(const model::Decoder& decoder, const std::vector<int32_t>& prompt,
                 const ModelSpeedOptions& options, const std::atomic<bool>* interrupted,
                 Timings& timings) {
  const Profile profile(options.profile);
  double linear_prefill_ms = -1;  // until the first token
  LACUNA_TRY(const auto generation,
             model::generate_ids(
                 decoder, prompt, {.max_new_tokens = options.tokens + 1, .ignore_eos = true}, {},
                 [&](int32_t) {
                   if (linear_prefill_ms < 0) linear_prefill_ms = profile.ms();
                   return false;
                 },
                 interrupted));
  if (generation.finish_reason == "interrupted") return Error{Code::kInterrupted, "interrupted"};
  const auto later = static_cast<double>(options.tokens);
  timings.prefill_ms.push_back(generation.ttft_ms);
  timings.decode_ms.push_back(generation.tpot_ms);
  timings.prefill_linear.push_back(linear_prefill_ms / generation.ttft_ms);
  timings.decode_linear.push_back((profile.ms() - linear_prefill_ms) /
                                  (generation.tpot_ms * later));
  return {};
}

}  // namespace

Result<std::vector<ModelSpeed>> time_models(const std::vector<const model::Decoder*>& decoders,
                                            const ModelSpeedOptions& options,
                                            const std::function<void(int64_t, int64_t)>& step,
                                            const std::atomic<bool>* interrupted) {
  int64_t vocab = decoders.front()->spec().vocab;
  for (const model::Decoder* decoder : decoders) {
    const io::DecoderSpec& spec = decoder->spec();
    vocab = std::min(vocab, spec.vocab);
    if (options.profile && !decoder->compute().device.is_cpu())
      return not_possible(
          "bench model: --profile reads the clock of the CPU, which a GPU runs behind (got "
          "--device "
          "cuda). Use --device cpu, or a profiler of the GPU's vendor.");
    if (options.prompt + options.tokens > spec.max_positions)
      return usage_error(
          "bench model: --prompt and --tokens together are longer than the model's positions (got "
          "{} + {}; need at most {}). Shorten one.",
          options.prompt, options.tokens, spec.max_positions);
  }
  std::vector<int32_t> prompt;
  for (int64_t i = 0; i < options.prompt; ++i)
    prompt.push_back(static_cast<int32_t>(random_bits(options.seed, 0, static_cast<uint64_t>(i)) %
                                          static_cast<uint64_t>(vocab)));

  std::vector<Timings> timings(decoders.size());
  for (int64_t repetition = -1; repetition < options.repetitions; ++repetition)
    for (size_t i = 0; i < decoders.size(); ++i) {
      // Every other repetition in reverse, so that neither always follows the other.
      const size_t turn = repetition % 2 == 0 ? i : decoders.size() - 1 - i;
      Timings warm_up;
      LACUNA_CHECK(time_once(*decoders[turn], prompt, options, interrupted,
                             repetition < 0 ? warm_up : timings[turn]));
      if (step && i + 1 == decoders.size()) step(repetition + 2, options.repetitions + 1);
    }

  std::vector<ModelSpeed> speeds;
  for (size_t i = 0; i < decoders.size(); ++i) {
    ModelSpeed speed{.prefill_ms = summarize(timings[i].prefill_ms),
                     .decode_ms = summarize(timings[i].decode_ms),
                     .weight_bytes = decoders[i]->weight_bytes(),
                     .prefill_samples_ms = timings[i].prefill_ms,
                     .decode_samples_ms = timings[i].decode_ms};
    speed.prefill_tokens_per_second =
        1000 * static_cast<double>(options.prompt) / speed.prefill_ms.median;
    speed.decode_tokens_per_second = 1000 / speed.decode_ms.median;
    if (options.profile) {
      speed.prefill_linear_share = summarize(timings[i].prefill_linear).median;
      speed.decode_linear_share = summarize(timings[i].decode_linear).median;
    }
    speeds.push_back(std::move(speed));
  }
  return speeds;
}

}  // namespace lacuna::bench
