// Turning a prompt into tokens.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/tokenizer/tokenizer.h"
#include "lacuna/model/decoder.h"

namespace lacuna::model {

/// Names as in Hugging Face's generation_config. temperature 0 = greedy.
struct GenerateOptions {
  int64_t max_new_tokens = 128;
  double temperature = 0.0;
  int64_t top_k = 0;   ///< 0 = all
  double top_p = 1.0;  ///< smallest set of tokens whose probabilities reach this
  double min_p = 0.0;  ///< drops tokens below min_p x the largest probability
  double repetition_penalty =
      1.0;  ///< divides positive, multiplies negative logits of tokens already present
  std::vector<std::string> stop;  ///< texts that end the answer (not part of it)
  bool ignore_eos = false;
  uint64_t seed = 0;
};

struct Generation {
  std::string text;
  std::vector<int32_t> token_ids;  ///< EOS included when it ended the answer
  std::string finish_reason;       ///< "stop" (EOS or stop text), "length", "interrupted"
  double ttft_ms = 0;              ///< prompt to first token
  double tpot_ms = 0;              ///< mean time of each later token; 0 when there is none
  double tokens_per_second = 0;    ///< of the later tokens
};

/// Chooses the next token from logits float32 [vocab] (CPU). Deterministic in (seed, position).
int32_t sample(const at::Tensor& logits, const std::vector<int32_t>& present,
               const GenerateOptions& options, uint64_t position);

/// The loop alone, without text: feeds the prompt and samples until `eos`, max_new_tokens, the end
/// of the positions, or `on_token` says that it is enough ("stop").
/// @param eos  ids that end the answer, looked at unless options.ignore_eos
/// @errors as generate()
Result<Generation> generate_ids(const Decoder& decoder, const std::vector<int32_t>& prompt_ids,
                                const GenerateOptions& options, const std::vector<int64_t>& eos,
                                const std::function<bool(int32_t)>& on_token = {},
                                const std::atomic<bool>* interrupted = nullptr);

/// Several prompts at once, one step for a token of each: what generate_ids() gives for each alone,
/// but for the rounding of products of more tokens, and each random choice as there. An answer that
/// has ended waits for the others. Where a model can't be run step by step (DecodeStep::refusal)
/// they are answered one after the other.
/// @param on_token  told the place of the prompt too; true: that is enough of it
/// @return by prompt; times are those of all of them: ttft_ms to the first token of each, tpot_ms
/// of one step
/// @errors as generate(); kUsage: no prompts, or more than DecodeStep::kMaxSequences
Result<std::vector<Generation>> generate_batch_ids(
    const Decoder& decoder, const std::vector<std::vector<int32_t>>& prompts,
    const GenerateOptions& options, const std::vector<int64_t>& eos,
    const std::function<bool(size_t prompt, int32_t id)>& on_token = {},
    const std::atomic<bool>* interrupted = nullptr);

/// Generates after prompt_ids. @param on_text receives pieces of whole UTF-8 characters as they
/// become certain
/// @param interrupted  looked at before every token (may be null)
/// @errors kBadInput: empty prompt, an id outside the vocabulary, prompt longer than the model's
/// positions
Result<Generation> generate(const Decoder& decoder, const io::Tokenizer& tokenizer,
                            const std::vector<int32_t>& prompt_ids, const GenerateOptions& options,
                            const std::function<void(std::string_view)>& on_text = {},
                            const std::atomic<bool>* interrupted = nullptr);

/// The same after several prompts at once. @errors as generate_batch_ids()
Result<std::vector<Generation>> generate_batch(const Decoder& decoder,
                                               const io::Tokenizer& tokenizer,
                                               const std::vector<std::vector<int32_t>>& prompts,
                                               const GenerateOptions& options,
                                               const std::atomic<bool>* interrupted = nullptr);

}  // namespace lacuna::model
