#include "lacuna/prune/calibration.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <mutex>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>

#include "lacuna/core/random.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/file.h"
#include "lacuna/io/json.h"
#include "lacuna/io/safetensors.h"
#include "lacuna/io/text_source.h"
#include "lacuna/io/tokenizer/utf8.h"
#include "lacuna/prune/chunks.h"

namespace lacuna::prune {
namespace {

std::vector<int32_t> flat(const Calibration& calibration) {
  std::vector<int32_t> all;
  for (const auto& row : calibration.ids) all.insert(all.end(), row.begin(), row.end());
  return all;
}

// Streams of random numbers: which documents, where their windows begin, what the model says.
constexpr uint64_t kDocumentStream = 1, kWindowStream = 2, kTokenStream = 3;

uint64_t draw_below(uint64_t bound, uint64_t seed, uint64_t stream, uint64_t index) {
  return random_bits(seed, stream, index) % bound;
}

/// 0 .. n-1 in random order.
std::vector<size_t> shuffled(size_t n, uint64_t seed) {
  std::vector<size_t> order(n);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = n; i > 1; --i)
    std::swap(order[i - 1], order[draw_below(i, seed, kDocumentStream, i)]);
  return order;
}

/// A window of `length` ids that starts at a random place.
std::vector<int32_t> window_of(const std::vector<int32_t>& ids, int64_t length, uint64_t seed,
                               uint64_t sample) {
  const uint64_t starts = ids.size() - static_cast<size_t>(length) + 1;
  const auto first = static_cast<int64_t>(draw_below(starts, seed, kWindowStream, sample));
  return {ids.begin() + first, ids.begin() + first + length};
}

Status check_ids(const Calibration& calibration, int64_t vocab, const std::string& file) {
  for (size_t row = 0; row < calibration.ids.size(); ++row) {
    const auto& ids = calibration.ids[row];
    const auto bad =
        std::find_if(ids.begin(), ids.end(), [&](int32_t id) { return id < 0 || id >= vocab; });
    if (bad != ids.end())
      return bad_input(
          "{}: row {}, column {}: token id outside the vocabulary (got {}; need 0 to {}). Were "
          "these made with another tokenizer?",
          file, row, bad - ids.begin(), *bad, vocab - 1);
  }
  return {};
}

Result<std::vector<std::vector<int32_t>>> ids_from_json(const std::string& text,
                                                        const std::string& file) {
  LACUNA_TRY(const auto json, io::parse_json(text, file));
  if (!json.is_array() || json.empty())
    return bad_input("{}: is not a list of lists of token ids (need [[1, 2, ...], ...]).", file);
  std::vector<std::vector<int32_t>> rows;
  for (const auto& row : json) {
    const size_t number = rows.size();
    if (!row.is_array() || row.empty() || row.size() != json[0].size())
      return bad_input("{}: row {} has {} ids (need {}, as the first row, and at least 1).", file,
                       number, row.is_array() ? row.size() : 0,
                       json[0].is_array() ? json[0].size() : 1);
    rows.emplace_back();
    for (const auto& id : row) {
      // In 64 bits, so that a number past 2^31 fails the vocabulary check instead of wrapping.
      if (!id.is_number_integer() || id.get<int64_t>() != static_cast<int32_t>(id.get<int64_t>()))
        return bad_input("{}: row {}, column {}: not a token id (got {}; need an integer).", file,
                         number, rows.back().size(), id.dump());
      rows.back().push_back(id.get<int32_t>());
    }
  }
  return rows;
}

Result<std::vector<std::vector<int32_t>>> ids_from_safetensors(const std::filesystem::path& path) {
  LACUNA_TRY(const auto file, io::SafetensorsFile::open(path));
  LACUNA_TRY(const Tensor ids, file.tensor("ids"));
  if (ids.dtype != DType::kI32 || ids.shape.size() != 2 || ids.elements() == 0)
    return bad_input("{}: tensor \"ids\" must be I32 [samples, length] (got {} {}).", path.string(),
                     safetensors_name(ids.dtype), shape_text(ids.shape));
  std::vector<std::vector<int32_t>> rows;
  for (int64_t row = 0; row < ids.shape[0]; ++row) {
    rows.emplace_back(static_cast<size_t>(ids.shape[1]));
    const size_t bytes = rows.back().size() * sizeof(int32_t);
    std::memcpy(rows.back().data(), ids.bytes.data() + static_cast<size_t>(row) * bytes, bytes);
  }
  return rows;
}

/// Samples `rows` sequences from the model, all at once: temperature 1, with a KV cache. Ends early
/// when `count` says no.
void sample_sequences(const model::Decoder& decoder, std::vector<std::vector<int32_t>*> rows,
                      uint64_t first_sample, int64_t length, uint64_t seed,
                      const std::function<bool(int64_t)>& count) {
  const auto batch = static_cast<int64_t>(rows.size());
  const uint64_t vocab = static_cast<uint64_t>(decoder.spec().vocab);
  model::KvCache cache(decoder.spec(), batch, decoder.compute());
  at::Tensor now = at::empty({batch, 1}, at::kLong), draws = at::empty({batch, 1}, at::kDouble);
  for (int64_t i = 0; i < batch; ++i) {
    const uint64_t random = draw_below(vocab, seed, kTokenStream, first_sample + i);
    now[i][0] = decoder.spec().bos_token.value_or(static_cast<int64_t>(random));
  }
  for (int64_t position = 0;; ++position) {
    for (int64_t i = 0; i < batch; ++i)
      rows[i]->push_back(static_cast<int32_t>(now[i][0].item<int64_t>()));
    if (!count(batch) || position + 1 == length) return;
    const at::Tensor logits = decoder.forward(now, &cache, /*last_only=*/true).squeeze(1);
    const at::Tensor sums = logits.to(at::kCPU, at::kDouble).softmax(-1).cumsum(-1);
    for (int64_t i = 0; i < batch; ++i)
      draws[i][0] = random_uniform(seed, kTokenStream + 1 + first_sample + i,
                                   static_cast<uint64_t>(position));
    now = at::searchsorted(sums, draws, /*out_int32=*/false, /*right=*/true)
              .clamp_max_(static_cast<int64_t>(vocab) - 1);  // the sums may end just below 1
  }
}

int64_t cache_bytes(const io::DecoderSpec& spec, int64_t length, const model::Compute& compute) {
  return 2 * spec.layers * spec.kv_heads * spec.head_dim * length *
         static_cast<int64_t>(c10::elementSize(compute.dtype));
}

/// What one chunk draws together is fixed, so the ids don't depend on the number of threads. Its
/// cache stays below half a gigabyte.
int64_t sequences_at_once(const io::DecoderSpec& spec, int64_t length,
                          const model::Compute& compute) {
  return std::clamp<int64_t>((int64_t{512} << 20) / cache_bytes(spec, length, compute), 1, 16);
}

/// A file's name as JSON can hold it.
std::string recorded_name(const std::filesystem::path& file) {
  return io::tokenizer::to_valid_utf8(file.filename().string());
}

}  // namespace

Status check_sizes(int64_t samples, int64_t length) {
  if (samples < 1 || length < 2 || samples > kMostSamples || length > kLongestSample)
    return usage_error("--samples, --length: out of range (got {} x {}; need 1 x 2 to {} x {}).",
                       samples, length, kMostSamples, kLongestSample);
  return {};
}

Result<Calibration> calibration_from_text(const std::filesystem::path& file,
                                          const io::Tokenizer& tokenizer, int64_t samples,
                                          int64_t length, uint64_t seed) {
  LACUNA_CHECK(check_sizes(samples, length));
  LACUNA_TRY(const auto documents, io::read_documents(file));
  Calibration calibration{recorded_name(file), {}};
  std::vector<std::optional<std::vector<int32_t>>> encoded(documents.size());
  for (const size_t document : shuffled(documents.size(), seed)) {
    if (calibration.samples() == samples) return calibration;
    // Every token stands for a byte at least, so most short documents need no tokenizing.
    if (static_cast<int64_t>(documents[document].size()) < length) continue;
    auto& ids = encoded[document];
    ids = tokenizer.encode(documents[document], /*add_special=*/true);
    if (static_cast<int64_t>(ids->size()) > length)
      calibration.ids.push_back(
          window_of(*ids, length, seed, static_cast<uint64_t>(calibration.samples())));
  }
  if (calibration.samples() == samples) return calibration;

  std::vector<int32_t> whole;
  for (size_t i = 0; i < documents.size(); ++i) {
    const auto ids =
        encoded[i] ? std::move(*encoded[i]) : tokenizer.encode(documents[i], /*add_special=*/true);
    whole.insert(whole.end(), ids.begin(), ids.end());
  }
  if (static_cast<int64_t>(whole.size()) < length)
    return bad_input(
        "{}: calibration text is shorter than one window (got {} tokens; need {}). Give more text "
        "or a smaller --length.",
        file.string(), whole.size(), length);
  calibration.ids.clear();
  for (int64_t i = 0; i < samples; ++i)
    calibration.ids.push_back(window_of(whole, length, seed, static_cast<uint64_t>(i)));
  return calibration;
}

Result<Calibration> calibration_from_model(const model::Decoder& decoder, int64_t samples,
                                           int64_t length, uint64_t seed,
                                           const std::function<void(int64_t, int64_t)>& progress,
                                           const std::atomic<bool>* interrupted) {
  LACUNA_CHECK(check_sizes(samples, length));
  const io::DecoderSpec& spec = decoder.spec();
  if (length > spec.max_positions)
    return usage_error(
        "--length: more tokens than the model has positions (got {}; need {} at "
        "most).",
        length, spec.max_positions);
  const int64_t batch = sequences_at_once(spec, length, decoder.compute());
  Calibration calibration{"self", std::vector<std::vector<int32_t>>(static_cast<size_t>(samples))};
  std::mutex mutex;
  int64_t drawn = 0;
  const auto count = [&](int64_t tokens) {
    const std::lock_guard lock(mutex);
    drawn += tokens;
    if (progress) progress(drawn, samples * length);
    return interrupted == nullptr || !interrupted->load();
  };
  const Executor executor = model::executor_for(decoder.compute().device);
  parallel_chunks(executor, (samples + batch - 1) / batch, [&](int64_t chunk) {
    std::vector<std::vector<int32_t>*> rows;
    for (int64_t i = chunk * batch; i < std::min(samples, (chunk + 1) * batch); ++i)
      rows.push_back(&calibration.ids[static_cast<size_t>(i)]);
    sample_sequences(decoder, rows, static_cast<uint64_t>(chunk * batch), length, seed, count);
  });
  if (interrupted != nullptr && interrupted->load())
    return Error{Code::kInterrupted, "calibration: interrupted; nothing was written."};
  return calibration;
}

uint64_t planned_sampling_bytes(const io::DecoderSpec& spec, const io::Checkpoint& checkpoint,
                                int64_t samples, int64_t length, const model::Compute& compute) {
  const auto element = static_cast<uint64_t>(c10::elementSize(compute.dtype));
  const int64_t batch = std::min(samples, sequences_at_once(spec, length, compute));
  const int64_t threads = model::executor_for(compute.device).threads;
  const auto at_once = static_cast<uint64_t>(std::min((samples + batch - 1) / batch, threads));
  // Logits, and in float64 themselves, their softmax and its sums.
  const uint64_t logits = static_cast<uint64_t>(spec.vocab) * (element + 3 * 8);
  uint64_t largest = 0, as_stored = 0;
  for (const io::LinearSpec& linear : spec.block_linears())
    largest = std::max(largest, static_cast<uint64_t>(linear.out * linear.in) * element);
  bool sparse = false;
  for (const auto& [name, info] : checkpoint.weights()) {
    sparse = sparse || info.store != io::Store::kDense;
    // A dense weight of the same type is used where the file is mapped.
    if (info.store != io::Store::kDense || model::scalar_type(info.dtype) != compute.dtype ||
        !compute.device.is_cpu())
      as_stored += info.bytes;
  }
  return static_cast<uint64_t>(spec.parameters()) * element + as_stored +
         at_once * static_cast<uint64_t>(batch) *
             (static_cast<uint64_t>(cache_bytes(spec, length, compute)) + logits) +
         (sparse ? static_cast<uint64_t>(threads) * largest : 0);
}

at::Tensor Calibration::ids_of(const std::vector<int64_t>& samples, at::Device device) const {
  std::vector<at::Tensor> rows;
  for (const int64_t sample : samples)
    rows.push_back(at::tensor(at::ArrayRef<int32_t>(ids[static_cast<size_t>(sample)]), at::kInt)
                       .to(at::kLong));
  return at::stack(rows).to(device);
}

at::Tensor Calibration::ids_of(int64_t first, int64_t n, at::Device device) const {
  std::vector<int64_t> samples(static_cast<size_t>(n));
  std::iota(samples.begin(), samples.end(), first);
  return ids_of(samples, device);
}

Result<Calibration> calibration_from_ids(const std::filesystem::path& file, int64_t vocab) {
  Calibration calibration{"ids:" + recorded_name(file), {}};
  if (file.extension() == ".json") {
    LACUNA_TRY(const std::string text, io::read_text(file));
    LACUNA_TRY(calibration.ids, ids_from_json(text, file.string()));
  } else {
    LACUNA_TRY(calibration.ids, ids_from_safetensors(file));
  }
  LACUNA_CHECK(check_ids(calibration, vocab, file.string()));
  return calibration;
}

std::string Calibration::hash() const {
  return ids.empty() ? "" : io::whole_checksum(Bytes::take(flat(*this)));
}

Status save_calibration_ids(const Calibration& calibration, const std::filesystem::path& file) {
  const Tensor ids{
      DType::kI32, {calibration.samples(), calibration.length()}, Bytes::take(flat(calibration))};
  return io::write_safetensors(file, {{"ids", ids}}, {{"source", calibration.source}});
}

}  // namespace lacuna::prune
