#include "lacuna/model/generate.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>

#include "lacuna/model/decode_step.h"

namespace lacuna::model {
namespace {

/// Text on its way out: ends at the first stop text, and holds back what may become one.
class Output {
 public:
  Output(const std::vector<std::string>& stops,
         const std::function<void(std::string_view)>& on_text)
      : stops_(stops), on_text_(on_text) {}

  /// True when a stop text has come up: the answer ends before it.
  bool add(std::string_view piece) {
    text_ += piece;
    size_t end = std::string::npos;
    for (const std::string& stop : stops_)
      if (!stop.empty()) end = std::min(end, text_.find(stop, sent_));
    if (end != std::string::npos) {
      text_.resize(end);
      send(end);
      return true;
    }
    send(text_.size() - held_back());
    return false;
  }

  std::string finish() && {
    send(text_.size());
    return std::move(text_);
  }

 private:
  /// Bytes at the end that are the beginning of a stop text.
  size_t held_back() const {
    size_t most = 0;
    const std::string_view fresh = std::string_view(text_).substr(sent_);
    for (const std::string& stop : stops_)
      for (size_t size = std::min(stop.size(), fresh.size()); size > most; --size)
        if (fresh.ends_with(std::string_view(stop).substr(0, size))) most = size;
    return most;
  }

  void send(size_t end) {
    if (on_text_ && end > sent_) on_text_(std::string_view(text_).substr(sent_, end - sent_));
    sent_ = end;
  }

  const std::vector<std::string>& stops_;
  const std::function<void(std::string_view)>& on_text_;
  std::string text_;
  size_t sent_ = 0;  // at most where the text that is held back begins: no stop text starts before
};

Status check_prompt(const io::DecoderSpec& spec, const std::vector<int32_t>& ids) {
  if (ids.empty())
    return bad_input("generate: the prompt holds no tokens (need at least 1). Give a --prompt.");
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= spec.vocab)
      return bad_input(
          "generate: prompt token {} is outside the vocabulary (got {}; need 0..{}). "
          "Does the tokenizer belong to this model?",
          i, ids[i], spec.vocab - 1);
  if (static_cast<int64_t>(ids.size()) > spec.max_positions)
    return bad_input(
        "generate: the prompt is longer than the model's positions (got {} tokens; "
        "need at most {}). Shorten it.",
        ids.size(), spec.max_positions);
  return {};
}

/// What follows the tokens so far: kernels for few new tokens, torch for a long prompt and where
/// the kernels don't reach.
class Predictor {
 public:
  explicit Predictor(const Decoder& decoder)
      : decoder_(decoder), cache_(decoder.spec(), 1, decoder.compute()) {
    if (!DecodeStep::refusal(decoder)) step_.emplace(decoder, cache_);
  }

  int64_t length() const { return cache_.length(); }

  /// The token after `all`, of which the last `fresh` are not in the cache yet; nothing if a logit
  /// is not a finite number.
  std::optional<int32_t> next(const std::vector<int32_t>& all, int64_t fresh,
                              const GenerateOptions& options) {
    const std::vector<int32_t> ids(all.end() - fresh, all.end());
    at::Tensor logits;
    if (step_ && fresh <= DecodeStep::kMaxTokens) {
      const int32_t best = step_->run(ids);
      if (best < 0) return std::nullopt;
      if (options.temperature == 0 && options.repetition_penalty == 1.0) return best;
      logits = step_->logits();
    } else {
      const at::Tensor tensor = at::tensor(at::ArrayRef<int32_t>(ids), at::kLong).unsqueeze(0);
      logits = decoder_.forward(tensor, &cache_, /*last_only=*/true).view({-1});
      if (!logits.isfinite().all().item<bool>()) return std::nullopt;
    }
    return sample(logits.cpu(), all, options, all.size());
  }

 private:
  const Decoder& decoder_;
  KvCache cache_;
  std::optional<DecodeStep> step_;
};

}  // namespace

Result<Generation> generate_ids(const Decoder& decoder, const std::vector<int32_t>& prompt_ids,
                                const GenerateOptions& options, const std::vector<int64_t>& eos,
                                const std::function<bool(int32_t)>& on_token,
                                const std::atomic<bool>* interrupted) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const io::DecoderSpec& spec = decoder.spec();
  LACUNA_CHECK(check_prompt(spec, prompt_ids));

  const c10::InferenceMode inference;
  Predictor predictor(decoder);
  Generation generation;
  generation.finish_reason = "length";
  std::vector<int32_t> all = prompt_ids;
  auto fresh = static_cast<int64_t>(all.size());  // tokens at the end that were not fed yet
  auto first_token = start;
  while (static_cast<int64_t>(generation.token_ids.size()) < options.max_new_tokens &&
         predictor.length() + fresh <= spec.max_positions) {
    if (interrupted != nullptr && interrupted->load()) {
      generation.finish_reason = "interrupted";
      break;
    }
    const std::optional<int32_t> found = predictor.next(all, fresh, options);
    if (!found)
      return check_failed(
          "generate: the logits after token {} are not all finite numbers. Try --dtype float32.",
          all.size());
    const int32_t next = *found;
    if (generation.token_ids.empty()) first_token = Clock::now();
    generation.token_ids.push_back(next);
    all.push_back(next);
    fresh = 1;
    const bool enough = on_token && on_token(next);
    const bool at_eos = !options.ignore_eos && std::find(eos.begin(), eos.end(), next) != eos.end();
    if (enough || at_eos) {
      generation.finish_reason = "stop";
      break;
    }
  }
  const auto last_token = Clock::now();

  const auto ms = [](auto span) { return std::chrono::duration<double, std::milli>(span).count(); };
  const auto tokens = static_cast<double>(generation.token_ids.size());
  if (tokens > 0) generation.ttft_ms = ms(first_token - start);
  if (tokens > 1) {
    generation.tpot_ms = ms(last_token - first_token) / (tokens - 1);
    generation.tokens_per_second = 1000 / generation.tpot_ms;
  }
  return generation;
}

Result<Generation> generate(const Decoder& decoder, const io::Tokenizer& tokenizer,
                            const std::vector<int32_t>& prompt_ids, const GenerateOptions& options,
                            const std::function<void(std::string_view)>& on_text,
                            const std::atomic<bool>* interrupted) {
  std::vector<int64_t> eos = decoder.spec().eos_tokens;
  if (eos.empty() && tokenizer.eos()) eos.push_back(*tokenizer.eos());
  Output output(options.stop, on_text);
  // The stream decoder wants shared ownership of what the caller holds for the whole call.
  io::StreamDecoder stream(
      std::shared_ptr<const io::Tokenizer>(std::shared_ptr<const void>(), &tokenizer));
  bool at_stop_text = false;
  const auto on_token = [&](int32_t id) {
    at_stop_text = output.add(stream.push(id));
    return at_stop_text;
  };
  LACUNA_TRY(auto generation,
             generate_ids(decoder, prompt_ids, options, eos, on_token, interrupted));
  if (!at_stop_text) output.add(stream.finish());
  generation.text = std::move(output).finish();
  return generation;
}

}  // namespace lacuna::model
