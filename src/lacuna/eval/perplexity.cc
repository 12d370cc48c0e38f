#include "lacuna/eval/perplexity.h"

#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cmath>
#include <filesystem>

#include "lacuna/core/clock.h"
#include "lacuna/eval/kl.h"
#include "lacuna/io/file.h"
#include "lacuna/io/text_source.h"

namespace lacuna::eval {
namespace {

constexpr int64_t kLogitsElements = int64_t{1} << 24;  // of one product: 64 MiB in float32
constexpr int64_t kCachedElements = int64_t{1} << 18;  // 1 MiB: what a CPU keeps in its cache

/// The rows of the usual WikiText data set: a line with its line end, or "" for a blank one.
std::vector<std::string> rows_of(const std::string& text) {
  std::vector<std::string> rows;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = std::min(text.find('\n', begin), text.size() - 1) + 1;
    std::string row = text.substr(begin, end - begin);
    if (row.find_first_not_of(" \t\r\n") == std::string::npos) row.clear();
    rows.push_back(std::move(row));
    begin = end;
  }
  return rows;
}

std::string joined(const std::vector<std::string>& parts, std::string_view between) {
  std::string all;
  for (size_t i = 0; i < parts.size(); ++i) {
    if (i > 0) all += between;
    all += parts[i];
  }
  return all;
}

/// Indices of `wanted` of `total` windows, evenly spread; 0 = all.
std::vector<int64_t> chosen_windows(int64_t total, int64_t wanted) {
  const int64_t count = wanted == 0 ? total : std::min(wanted, total);
  std::vector<int64_t> windows;
  for (int64_t i = 0; i < count; ++i) windows.push_back(i * total / count);
  return windows;
}

struct Means {
  std::vector<double> model, reference;  // mean NLL of each window
};

/// Calls f(first, count) for slices of `rows` that hold about `elements` of `width` each.
template <class F>
void for_slices(int64_t rows, int64_t width, int64_t elements, F&& f) {
  const int64_t step = std::max<int64_t>(1, elements / width);
  for (int64_t first = 0; first < rows; first += step) f(first, std::min(step, rows - first));
}

/// Scores windows [B, L] and appends their mean NLLs.
void score(const at::Tensor& windows, const model::Decoder& decoder,
           const model::Decoder* reference, Means& means, KlCollector& kl) {
  const int64_t batch = windows.size(0), scored = windows.size(1) - 1;
  const at::Tensor hidden = decoder.hidden(windows);
  const at::Tensor reference_hidden =
      reference != nullptr ? reference->hidden(windows) : at::Tensor();
  const at::Tensor targets = windows.narrow(1, 1, scored).to(hidden.device());
  const int64_t vocab = decoder.spec().vocab;
  const int64_t softmax_elements = hidden.is_cpu() ? kCachedElements : kLogitsElements;
  const auto sum = [](const at::Tensor& nll) { return nll.to(at::kDouble).sum().item<double>(); };
  for (int64_t b = 0; b < batch; ++b) {
    double model_sum = 0, reference_sum = 0;
    for_slices(scored, vocab, kLogitsElements, [&](int64_t begin, int64_t rows) {
      const auto logits = [&](const model::Decoder& of, const at::Tensor& states) {
        return of.ends().logits(states[b].narrow(0, begin, rows).unsqueeze(0)).squeeze(0);
      };
      const at::Tensor mine = logits(decoder, hidden);
      const at::Tensor theirs =
          reference != nullptr ? logits(*reference, reference_hidden) : at::Tensor();
      for_slices(rows, vocab, softmax_elements, [&](int64_t first, int64_t count) {
        const at::Tensor next = targets[b].narrow(0, begin + first, count);
        const at::Tensor model_logits = mine.narrow(0, first, count);
        model_sum += sum(token_nll(model_logits, next));
        if (reference == nullptr) return;
        const at::Tensor reference_logits = theirs.narrow(0, first, count);
        reference_sum += sum(token_nll(reference_logits, next));
        kl.add(model_logits, reference_logits, next);
      });
    });
    means.model.push_back(model_sum / static_cast<double>(scored));
    if (reference != nullptr)
      means.reference.push_back(reference_sum / static_cast<double>(scored));
  }
}

double mean(const std::vector<double>& values) {
  double sum = 0;
  for (const double v : values) sum += v;
  return sum / static_cast<double>(values.size());
}

/// Nothing for one value, which has no spread.
std::optional<double> standard_error(const std::vector<double>& values) {
  if (values.size() < 2) return std::nullopt;
  const double center = mean(values), n = static_cast<double>(values.size());
  double squares = 0;
  for (const double v : values) squares += (v - center) * (v - center);
  return std::sqrt(squares / (n - 1) / n);
}

}  // namespace

std::string_view protocol_name(Protocol protocol) {
  return protocol == Protocol::kRawFile ? "raw-file" : "hf-rows";
}

Result<Protocol> parse_protocol(std::string_view name) {
  for (const Protocol protocol : {Protocol::kRawFile, Protocol::kHfRows})
    if (protocol_name(protocol) == name) return protocol;
  return usage_error("--protocol: unknown protocol (got {}; need raw-file or hf-rows).", name);
}

Result<std::vector<int32_t>> evaluation_ids(const std::string& file, Protocol protocol,
                                            const io::Tokenizer& tokenizer) {
  const bool documents = std::filesystem::path(file).extension() == ".jsonl";
  std::vector<std::string> rows;
  std::string text;
  if (documents) {
    LACUNA_TRY(rows, io::read_documents(file));
  } else {
    LACUNA_TRY(text, io::read_text(file));
  }
  if (protocol == Protocol::kRawFile)
    return tokenizer.encode(documents ? joined(rows, "\n") : text, /*add_special=*/false);
  if (!documents) rows = rows_of(text);
  return tokenizer.encode(joined(rows, "\n\n"), /*add_special=*/true);
}

Status check_evaluation(const io::DecoderSpec& spec, const std::vector<int32_t>& ids,
                        const PerplexityOptions& options) {
  if (options.length < 2)
    return usage_error("eval: a window must hold at least 2 tokens (got {}). Raise --length.",
                       options.length);
  if (options.length > spec.max_positions)
    return bad_input(
        "eval: the window is longer than the model's positions (got {}; need at most "
        "{}). Lower --length.",
        options.length, spec.max_positions);
  if (static_cast<int64_t>(ids.size()) < options.length)
    return bad_input(
        "eval: the text is shorter than one window (got {} tokens; need {}). Give a "
        "longer text or lower --length.",
        ids.size(), options.length);
  for (size_t i = 0; i < ids.size(); ++i)
    if (ids[i] < 0 || ids[i] >= spec.vocab)
      return bad_input(
          "eval: token {} of the text is outside the vocabulary (got {}; need "
          "0..{}). Does the tokenizer belong to this model?",
          i, ids[i], spec.vocab - 1);
  return {};
}

Result<PerplexityReport> perplexity(const model::Decoder& decoder, const std::vector<int32_t>& ids,
                                    const PerplexityOptions& options,
                                    const model::Decoder* reference,
                                    const std::function<void(int64_t, int64_t, double)>& progress,
                                    const std::atomic<bool>* interrupted) {
  const auto start = Clock::now();
  LACUNA_CHECK(check_evaluation(decoder.spec(), ids, options));
  if (reference != nullptr) {
    LACUNA_CHECK(check_evaluation(reference->spec(), ids, options));
    if (reference->spec().vocab != decoder.spec().vocab)
      return bad_input(
          "eval: the two models must share a vocabulary (got {} and {} tokens). "
          "Compare with the model this one was made from.",
          decoder.spec().vocab, reference->spec().vocab);
  }
  const c10::InferenceMode inference;
  const std::vector<int64_t> windows =
      chosen_windows(static_cast<int64_t>(ids.size()) / options.length, options.windows);
  const auto total = static_cast<int64_t>(windows.size());
  Means means;
  KlCollector kl;
  for (int64_t done = 0; done < total;) {
    if (interrupted != nullptr && interrupted->load())
      return Error{Code::kInterrupted, "interrupted"};
    const int64_t count = std::min(std::max<int64_t>(1, options.batch), total - done);
    const at::Tensor batch = at::empty({count, options.length}, at::kLong);
    for (int64_t b = 0; b < count; ++b)
      std::copy_n(ids.begin() + windows[static_cast<size_t>(done + b)] * options.length,
                  options.length, batch[b].data_ptr<int64_t>());
    score(batch, decoder, reference, means, kl);
    done += count;
    if (progress) progress(done, total, std::exp(mean(means.model)));
  }

  PerplexityReport report;
  report.mean_nll = mean(means.model);
  report.perplexity = std::exp(report.mean_nll);
  if (const auto error = standard_error(means.model)) report.std_error = report.perplexity * *error;
  report.tokens = static_cast<int64_t>(ids.size());
  report.windows = total;
  report.length = options.length;
  report.protocol = protocol_name(options.protocol);
  if (reference != nullptr) {
    report.kl = kl.statistics();
    report.kl->perplexity_reference = std::exp(mean(means.reference));
    report.kl->ppl_delta = report.perplexity - report.kl->perplexity_reference;
  }
  report.seconds = seconds_since(start);
  return report;
}

}  // namespace lacuna::eval
