// How well a model predicts a text, and how far its predictions moved from the dense model's.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/tokenizer/tokenizer.h"
#include "lacuna/model/decoder.h"

namespace lacuna::eval {

/// raw-file: the file tokenised once without BOS. hf-rows: rows joined by blank lines and tokenised
/// with the special tokens that the tokenizer adds, as the pruning papers do. Both: non-overlapping
/// windows, tail dropped, positions 1..L-1 scored, mean over windows of the window's mean.
enum class Protocol : uint8_t { kRawFile, kHfRows };
std::string_view protocol_name(Protocol protocol);
Result<Protocol> parse_protocol(std::string_view name);

struct PerplexityOptions {
  Protocol protocol = Protocol::kRawFile;
  int64_t length = 2048;
  int64_t windows = 0;  ///< this many, evenly spread; 0 = all
  int64_t batch = 1;    ///< windows that run at once
};

/// KL(reference || model) per scored token and its relatives (the table llama.cpp prints).
struct KlStatistics {
  double kl_mean = 0, kl_stderr = 0, kl_median = 0, kl_max = 0, kl_p99 = 0, kl_p90 = 0, kl_p10 = 0;
  double same_top = 0;                       ///< share of tokens whose most likely successor agrees
  double delta_p_mean = 0, delta_p_rms = 0;  ///< change of the true token's probability
  double perplexity_reference = 0;
  double ppl_delta = 0;  ///< perplexity - perplexity_reference
};

struct PerplexityReport {
  double perplexity = 0;
  std::optional<double> std_error;  ///< of the perplexity, from the spread over two or more windows
  double mean_nll = 0;              ///< nats
  std::string text;                 ///< the file, where a job looked for one
  int64_t tokens = 0;               ///< of the whole text
  int64_t windows = 0, length = 0;
  std::string protocol;
  double seconds = 0;
  std::optional<KlStatistics> kl;
};

/// The token ids of a text under a protocol. @errors kBadInput: unreadable file
Result<std::vector<int32_t>> evaluation_ids(const std::string& file, Protocol protocol,
                                            const io::Tokenizer& tokenizer);

/// Whether perplexity() would take them.
/// @errors kUsage: a window of one token; kBadInput: a window longer than the model's positions;
/// fewer tokens than one window; an id outside the vocabulary
Status check_evaluation(const io::DecoderSpec& spec, const std::vector<int32_t>& ids,
                        const PerplexityOptions& options);

/// @param reference  when given, runs beside the model and fills `kl`
/// @param progress   called with (windows done, windows in all, perplexity so far)
/// @errors of check_evaluation(); kBadInput: vocabularies that differ; kInterrupted: `interrupted`
/// was set between windows
Result<PerplexityReport> perplexity(
    const model::Decoder& decoder, const std::vector<int32_t>& ids,
    const PerplexityOptions& options, const model::Decoder* reference = nullptr,
    const std::function<void(int64_t, int64_t, double)>& progress = {},
    const std::atomic<bool>* interrupted = nullptr);

}  // namespace lacuna::eval
