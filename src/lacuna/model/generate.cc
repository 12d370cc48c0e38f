#include "lacuna/model/generate.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <chrono>
#include <deque>
#include <numeric>

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

namespace {

/// Tokens of prompts that are read at once, beyond the first prompt's.
constexpr size_t kReadTogether = 4096;

/// Prompts to read at once, the longest of each first: alike in length, so that little is padding.
std::vector<std::vector<size_t>> read_together(const std::vector<std::vector<int32_t>>& prompts) {
  std::vector<size_t> order(prompts.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return prompts[a].size() > prompts[b].size(); });
  std::vector<std::vector<size_t>> groups;
  size_t longest = 0;
  for (const size_t i : order) {
    const bool joins = !groups.empty() && prompts[i].size() >= longest - longest / 4 &&
                       (groups.back().size() + 1) * longest <= kReadTogether;
    if (!joins) {
      groups.emplace_back();
      longest = prompts[i].size();
    }
    groups.back().push_back(i);
  }
  return groups;
}

/// Sequences side by side: prompts through torch, then a step for a token of each.
class BatchPredictor {
 public:
  BatchPredictor(const Decoder& decoder, const GenerateOptions& options, int64_t sequences)
      : decoder_(decoder),
        options_(options),
        cache_(decoder.spec(), sequences, decoder.compute()) {}

  /// The first token of each, or nothing if one of its logits is not a finite number.
  std::vector<std::optional<int32_t>> first(const std::vector<std::vector<int32_t>>& prompts) {
    int64_t longest = 0;
    for (const auto& prompt : prompts)
      longest = std::max(longest, static_cast<int64_t>(prompt.size()));
    // All that will be needed at most: a cache that grows has its step recorded anew.
    const int64_t most = decoder_.spec().max_positions;
    cache_.reserve(std::min(longest + std::min(options_.max_new_tokens, most), most));
    std::vector<std::optional<int32_t>> tokens(prompts.size());
    lengths_.resize(prompts.size());
    for (const auto& together : read_together(prompts)) read(prompts, together, tokens);
    cache_.advance(longest);
    step_.emplace(decoder_, cache_);
    return tokens;
  }

  /// The token after the last of each. One that has ended is fed it again and stays where it is, or
  /// at the last position there is.
  std::vector<std::optional<int32_t>> next(const std::vector<std::vector<int32_t>>& all,
                                           const std::vector<bool>& ended) {
    std::vector<int32_t> ids;
    for (const auto& of : all) ids.push_back(of.back());
    const auto last = static_cast<int32_t>(decoder_.spec().max_positions - 1);
    for (size_t i = 0; i < all.size(); ++i)
      if (ended[i]) lengths_[i] = std::min(lengths_[i], last);
    const std::vector<int32_t> before = lengths_;
    const std::vector<int32_t> best = step_->run_each(ids, lengths_);
    const bool greedy = options_.temperature == 0 && options_.repetition_penalty == 1.0;
    const at::Tensor logits =
        greedy ? at::Tensor() : step_->logits().cpu().view({-1, decoder_.spec().vocab});
    std::vector<std::optional<int32_t>> tokens(all.size());
    for (size_t i = 0; i < all.size(); ++i) {
      if (ended[i]) lengths_[i] = before[i];
      if (ended[i] || best[i] < 0) continue;
      tokens[i] = greedy ? best[i]
                         : sample(logits[static_cast<int64_t>(i)], all[i], options_, all[i].size());
    }
    return tokens;
  }

  /// Whether a sequence has a position left for its last token.
  bool has_room(size_t sequence) const {
    return lengths_[sequence] < decoder_.spec().max_positions;
  }

 private:
  /// Prompts through the model at once, the shorter ones padded behind their last token, which no
  /// earlier one sees.
  /// @param which  their numbers, the longest first
  void read(const std::vector<std::vector<int32_t>>& prompts, const std::vector<size_t>& which,
            std::vector<std::optional<int32_t>>& first_tokens) {
    const auto count = static_cast<int64_t>(which.size());
    const auto longest = static_cast<int64_t>(prompts[which.front()].size());
    const int64_t last = longest - static_cast<int64_t>(prompts[which.back()].size()) + 1;
    at::Tensor ids = at::zeros({count, longest}, at::kLong);
    at::Tensor ends = at::empty({count}, at::kLong);  // among the last tokens
    for (int64_t row = 0; row < count; ++row) {
      const auto& prompt = prompts[which[static_cast<size_t>(row)]];
      const auto length = static_cast<int64_t>(prompt.size());
      ids[row].narrow(0, 0, length).copy_(at::tensor(at::ArrayRef<int32_t>(prompt)));
      ends[row] = length - 1 - (longest - last);
    }
    KvCache own(decoder_.spec(), count, decoder_.compute());
    const at::Tensor hidden = decoder_.hidden(ids, &own, last);
    const at::Tensor rows = at::arange(count, hidden.device());
    const at::Tensor at_ends = hidden.index({rows, ends.to(hidden.device())}).unsqueeze(1);
    const at::Tensor logits = decoder_.ends().logits(at_ends).squeeze(1).cpu();
    for (int64_t row = 0; row < count; ++row) {
      const size_t i = which[static_cast<size_t>(row)];
      const auto length = static_cast<int64_t>(prompts[i].size());
      const auto place = static_cast<int64_t>(i);
      const auto keep = [&](const at::Tensor& from, const at::Tensor& to) {
        to.select(0, place).narrow(1, 0, length).copy_(from.select(0, row).narrow(1, 0, length));
      };
      for (int64_t layer = 0; layer < decoder_.spec().layers; ++layer) {
        keep(own.keys(layer), cache_.keys(layer));
        keep(own.values(layer), cache_.values(layer));
      }
      lengths_[i] = static_cast<int32_t>(length);
      if (logits[row].isfinite().all().item<bool>())
        first_tokens[i] = sample(logits[row], prompts[i], options_, prompts[i].size());
    }
  }

  const Decoder& decoder_;
  const GenerateOptions& options_;
  KvCache cache_;
  std::optional<DecodeStep> step_;
  std::vector<int32_t> lengths_;
};

Result<std::vector<Generation>> one_after_the_other(
    const Decoder& decoder, const std::vector<std::vector<int32_t>>& prompts,
    const GenerateOptions& options, const std::vector<int64_t>& eos,
    const std::function<bool(size_t, int32_t)>& on_token, const std::atomic<bool>* interrupted) {
  std::vector<Generation> generations;
  for (size_t i = 0; i < prompts.size(); ++i) {
    const auto told = [&](int32_t id) { return on_token && on_token(i, id); };
    LACUNA_TRY(auto generation, generate_ids(decoder, prompts[i], options, eos, told, interrupted));
    generations.push_back(std::move(generation));
  }
  return generations;
}

}  // namespace

Result<std::vector<Generation>> generate_batch_ids(
    const Decoder& decoder, const std::vector<std::vector<int32_t>>& prompts,
    const GenerateOptions& options, const std::vector<int64_t>& eos,
    const std::function<bool(size_t, int32_t)>& on_token, const std::atomic<bool>* interrupted) {
  using Clock = std::chrono::steady_clock;
  const auto start = Clock::now();
  const auto count = static_cast<int64_t>(prompts.size());
  if (count < 1 || count > DecodeStep::kMaxSequences)
    return usage_error("generate: {} prompts at once (need 1 to {}).", count,
                       DecodeStep::kMaxSequences);
  for (const auto& prompt : prompts) LACUNA_CHECK(check_prompt(decoder.spec(), prompt));
  if (DecodeStep::refusal(decoder))
    return one_after_the_other(decoder, prompts, options, eos, on_token, interrupted);

  const c10::InferenceMode inference;
  BatchPredictor predictor(decoder, options, count);
  std::vector<Generation> generations(prompts.size());
  std::vector<std::vector<int32_t>> all = prompts;
  std::vector<bool> ended(prompts.size(), options.max_new_tokens == 0);
  auto first_token = start;
  int64_t steps = 0;
  for (; std::find(ended.begin(), ended.end(), false) != ended.end(); ++steps) {
    const bool stopped = interrupted != nullptr && interrupted->load();
    for (size_t i = 0; stopped && i < all.size(); ++i)
      if (!ended[i]) generations[i].finish_reason = "interrupted";
    if (stopped) break;
    const auto found = steps == 0 ? predictor.first(prompts) : predictor.next(all, ended);
    if (steps == 0) first_token = Clock::now();
    for (size_t i = 0; i < all.size(); ++i) {
      if (ended[i]) continue;
      if (!found[i])
        return check_failed(
            "generate: the logits after token {} of prompt {} are not all finite numbers. Try "
            "--dtype float32.",
            all[i].size(), i);
      Generation& generation = generations[i];
      generation.token_ids.push_back(*found[i]);
      all[i].push_back(*found[i]);
      const bool enough = on_token && on_token(i, *found[i]);
      const bool at_eos =
          !options.ignore_eos && std::find(eos.begin(), eos.end(), *found[i]) != eos.end();
      if (enough || at_eos) generation.finish_reason = "stop";
      ended[i] = enough || at_eos || !predictor.has_room(i) ||
                 static_cast<int64_t>(generation.token_ids.size()) >= options.max_new_tokens;
    }
  }
  const auto last_token = Clock::now();

  const auto ms = [](auto span) { return std::chrono::duration<double, std::milli>(span).count(); };
  for (Generation& generation : generations) {
    if (generation.finish_reason.empty()) generation.finish_reason = "length";
    if (steps > 0) generation.ttft_ms = ms(first_token - start);
    if (steps > 1) {
      generation.tpot_ms = ms(last_token - first_token) / static_cast<double>(steps - 1);
      generation.tokens_per_second = 1000 / generation.tpot_ms;
    }
  }
  return generations;
}

namespace {

/// One answer as text: token by token until it is enough.
class Answer {
 public:
  Answer(const io::Tokenizer& tokenizer, const GenerateOptions& options,
         const std::function<void(std::string_view)>& on_text)
      : output_(options.stop, on_text),
        // The stream decoder wants shared ownership of what the caller holds for the whole call.
        stream_(std::shared_ptr<const io::Tokenizer>(std::shared_ptr<const void>(), &tokenizer)) {}
  /// True when a stop text has come up.
  bool add(int32_t id) { return at_stop_text_ = output_.add(stream_.push(id)); }
  std::string finish() && {
    if (!at_stop_text_) output_.add(stream_.finish());
    return std::move(output_).finish();
  }

 private:
  Output output_;
  io::StreamDecoder stream_;
  bool at_stop_text_ = false;
};

std::vector<int64_t> ends_of(const Decoder& decoder, const io::Tokenizer& tokenizer) {
  std::vector<int64_t> eos = decoder.spec().eos_tokens;
  if (eos.empty() && tokenizer.eos()) eos.push_back(*tokenizer.eos());
  return eos;
}

}  // namespace

Result<Generation> generate(const Decoder& decoder, const io::Tokenizer& tokenizer,
                            const std::vector<int32_t>& prompt_ids, const GenerateOptions& options,
                            const std::function<void(std::string_view)>& on_text,
                            const std::atomic<bool>* interrupted) {
  Answer answer(tokenizer, options, on_text);
  LACUNA_TRY(auto generation, generate_ids(
                                  decoder, prompt_ids, options, ends_of(decoder, tokenizer),
                                  [&](int32_t id) { return answer.add(id); }, interrupted));
  generation.text = std::move(answer).finish();
  return generation;
}

Result<std::vector<Generation>> generate_batch(const Decoder& decoder,
                                               const io::Tokenizer& tokenizer,
                                               const std::vector<std::vector<int32_t>>& prompts,
                                               const GenerateOptions& options,
                                               const std::atomic<bool>* interrupted) {
  const std::function<void(std::string_view)> nobody;
  std::deque<Answer> answers;
  for (size_t i = 0; i < prompts.size(); ++i) answers.emplace_back(tokenizer, options, nobody);
  LACUNA_TRY(auto generations,
             generate_batch_ids(
                 decoder, prompts, options, ends_of(decoder, tokenizer),
                 [&](size_t prompt, int32_t id) { return answers[prompt].add(id); }, interrupted));
  for (size_t i = 0; i < prompts.size(); ++i) generations[i].text = std::move(answers[i]).finish();
  return generations;
}

}  // namespace lacuna::model
