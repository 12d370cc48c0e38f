#include "lacuna/model/generate.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>

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
  KvCache cache(spec, 1, decoder.compute());
  Generation generation;
  generation.finish_reason = "length";
  std::vector<int32_t> all = prompt_ids, fresh = prompt_ids;
  auto first_token = start;
  while (static_cast<int64_t>(generation.token_ids.size()) < options.max_new_tokens &&
         cache.length() + static_cast<int64_t>(fresh.size()) <= spec.max_positions) {
    if (interrupted != nullptr && interrupted->load()) {
      generation.finish_reason = "interrupted";
      break;
    }
    const at::Tensor ids = at::tensor(at::ArrayRef<int32_t>(fresh), at::kLong).unsqueeze(0);
    const at::Tensor logits = decoder.forward(ids, &cache, /*last_only=*/true);
    if (!logits.isfinite().all().item<bool>())
      return check_failed(
          "generate: the logits after token {} are not all finite numbers. Try --dtype float32.",
          all.size());
    const int32_t next = sample(logits.view({-1}).cpu(), all, options, all.size());
    if (generation.token_ids.empty()) first_token = Clock::now();
    generation.token_ids.push_back(next);
    all.push_back(next);
    fresh.assign(1, next);
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
