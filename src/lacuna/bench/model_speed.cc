#include "lacuna/bench/model_speed.h"

#include <algorithm>

#include "lacuna/core/random.h"
#include "lacuna/model/decode_step.h"
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

/// Models with the prompt that all of them read, and what they have taken.
class Race {
 public:
  /// @errors as time_models
  static Result<Race> prepare(const std::vector<const model::Decoder*>& decoders,
                              const ModelSpeedOptions& options,
                              const std::atomic<bool>* interrupted);
  /// One prompt and one answer of a model. @param counts  false: to warm up
  Result<ModelTurn> turn(size_t model, bool counts);
  std::vector<ModelSpeed> speeds() const;
  size_t models() const { return decoders_.size(); }

 private:
  std::vector<const model::Decoder*> decoders_;
  ModelSpeedOptions options_;
  const std::atomic<bool>* interrupted_ = nullptr;
  /// Greedily, end-of-text ignored.
  Result<model::Generation> generate(const model::Decoder& decoder,
                                     const std::function<bool(int32_t)>& on_token) const;

  std::vector<std::vector<int32_t>> prompts_;
  std::vector<Timings> timings_;  // by model
};

Result<Race> Race::prepare(const std::vector<const model::Decoder*>& decoders,
                           const ModelSpeedOptions& options, const std::atomic<bool>* interrupted) {
  int64_t vocab = decoders.front()->spec().vocab;
  for (const model::Decoder* decoder : decoders) {
    const io::DecoderSpec& spec = decoder->spec();
    vocab = std::min(vocab, spec.vocab);
    if (options.profile && !decoder->compute().device.is_cpu())
      return not_possible(
          "bench model: --profile reads the clock of the CPU, which a GPU runs behind (got "
          "--device "
          "cuda). Use --device cpu, or a profiler of the GPU's vendor.");
    const auto why_not = model::DecodeStep::refusal(*decoder);
    if (options.batch > 1 && why_not)
      return not_possible("bench model: --batch {}: the model is not run step by step here ({}).",
                          options.batch, *why_not);
    if (options.prompt + options.tokens > spec.max_positions)
      return usage_error(
          "bench model: --prompt and --tokens together are longer than the model's positions (got "
          "{} + {}; need at most {}). Shorten one.",
          options.prompt, options.tokens, spec.max_positions);
  }
  Race race;
  race.decoders_ = decoders;
  race.options_ = options;
  race.interrupted_ = interrupted;
  race.timings_.resize(decoders.size());
  for (int64_t p = 0; p < options.batch; ++p) {
    auto& prompt = race.prompts_.emplace_back();
    for (int64_t i = 0; i < options.prompt; ++i)
      prompt.push_back(static_cast<int32_t>(
          random_bits(options.seed, static_cast<uint64_t>(p), static_cast<uint64_t>(i)) %
          static_cast<uint64_t>(vocab)));
  }
  return race;
}

Result<model::Generation> Race::generate(const model::Decoder& decoder,
                                         const std::function<bool(int32_t)>& on_token) const {
  const model::GenerateOptions options{.max_new_tokens = options_.tokens + 1, .ignore_eos = true};
  if (prompts_.size() == 1)
    return model::generate_ids(decoder, prompts_.front(), options, {}, on_token, interrupted_);
  LACUNA_TRY(auto all, model::generate_batch_ids(
                           decoder, prompts_, options, {},
                           [&](size_t, int32_t id) { return on_token(id); }, interrupted_));
  return std::move(all.front());  // they share their times
}

Result<ModelTurn> Race::turn(size_t model, bool counts) {
  const Profile profile(options_.profile);
  double linear_prefill_ms = -1;  // until the first token
  LACUNA_TRY(const auto generation, generate(*decoders_[model], [&](int32_t) {
               if (linear_prefill_ms < 0) linear_prefill_ms = profile.ms();
               return false;
             }));
  if (generation.finish_reason == "interrupted") return Error{Code::kInterrupted, "interrupted"};
  if (counts) {
    Timings& timings = timings_[model];
    const auto later = static_cast<double>(options_.tokens);
    timings.prefill_ms.push_back(generation.ttft_ms);
    timings.decode_ms.push_back(generation.tpot_ms);
    timings.prefill_linear.push_back(linear_prefill_ms / generation.ttft_ms);
    timings.decode_linear.push_back((profile.ms() - linear_prefill_ms) /
                                    (generation.tpot_ms * later));
  }
  return ModelTurn{generation.ttft_ms, generation.tpot_ms};
}

std::vector<ModelSpeed> Race::speeds() const {
  std::vector<ModelSpeed> speeds;
  for (size_t i = 0; i < decoders_.size(); ++i) {
    ModelSpeed speed{.prefill_ms = summarize(timings_[i].prefill_ms),
                     .decode_ms = summarize(timings_[i].decode_ms),
                     .weight_bytes = decoders_[i]->weight_bytes(),
                     .prefill_samples_ms = timings_[i].prefill_ms,
                     .decode_samples_ms = timings_[i].decode_ms};
    if (!timings_[i].decode_ms.empty()) {
      speed.prefill_tokens_per_second =
          1000 * static_cast<double>(options_.batch * options_.prompt) / speed.prefill_ms.median;
      speed.decode_tokens_per_second =
          1000 * static_cast<double>(options_.batch) / speed.decode_ms.median;
    }
    if (options_.profile) {
      speed.prefill_linear_share = summarize(timings_[i].prefill_linear).median;
      speed.decode_linear_share = summarize(timings_[i].decode_linear).median;
    }
    speeds.push_back(std::move(speed));
  }
  return speeds;
}

}  // namespace

Result<std::vector<ModelSpeed>> time_models(const std::vector<const model::Decoder*>& decoders,
                                            const ModelSpeedOptions& options,
                                            const std::function<void(int64_t, int64_t)>& step,
                                            const std::atomic<bool>* interrupted) {
  LACUNA_TRY(Race race, Race::prepare(decoders, options, interrupted));
  for (int64_t repetition = -1; repetition < options.repetitions; ++repetition) {
    for (size_t i = 0; i < race.models(); ++i) {
      // Every other repetition in reverse, so that neither always follows the other.
      const size_t turn = repetition % 2 == 0 ? i : race.models() - 1 - i;
      LACUNA_CHECK(race.turn(turn, repetition >= 0));
    }
    if (step) step(repetition + 2, options.repetitions + 1);
  }
  return race.speeds();
}

Result<std::vector<ModelSpeed>> time_models_by_turns(
    const std::vector<const model::Decoder*>& decoders, const ModelSpeedOptions& options,
    const ModelTurns& turns, const std::atomic<bool>* interrupted) {
  LACUNA_TRY(Race race, Race::prepare(decoders, options, interrupted));
  for (size_t i = 0; i < race.models(); ++i) LACUNA_CHECK(race.turn(i, /*counts=*/false));
  while (const auto model = turns.next()) {
    if (*model >= race.models())
      return usage_error("bench model: no such model (got {}; need 0 to {}).", *model,
                         race.models() - 1);
    LACUNA_TRY(const ModelTurn turn, race.turn(*model, /*counts=*/true));
    turns.done(*model, turn);
  }
  return race.speeds();
}

}  // namespace lacuna::bench
