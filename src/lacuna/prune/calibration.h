// Token ids for calibration: from a text, from the model itself, or given.
#pragma once

#include <atomic>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/tokenizer/tokenizer.h"
#include "lacuna/model/decoder.h"

namespace lacuna::prune {

/// Token ids [samples][length], all of one length.
struct Calibration {
  std::string source;  ///< what config.json records: file name, "self" or "ids:FILE"
  std::vector<std::vector<int32_t>> ids;
  int64_t samples() const { return static_cast<int64_t>(ids.size()); }
  int64_t length() const { return ids.empty() ? 0 : static_cast<int64_t>(ids[0].size()); }
  std::string hash() const;  ///< of the ids; empty without any
  /// Some samples' ids: int64 [samples, length].
  at::Tensor ids_of(const std::vector<int64_t>& samples, at::Device device) const;
  /// Of the samples first .. first + n - 1.
  at::Tensor ids_of(int64_t first, int64_t n, at::Device device) const;
};

/// Nobody calibrates with more; below them no product of sizes overflows.
inline constexpr int64_t kMostSamples = 1 << 20, kLongestSample = 1 << 20;
/// @errors kUsage: sizes that calibration_from_text() and calibration_from_model() refuse
Status check_sizes(int64_t samples, int64_t length);

/// One random window from each of `samples` randomly drawn documents longer than `length` tokens
/// (Wanda's and SparseGPT's protocol); when too few are that long, documents are joined and windows
/// are drawn from the whole.
/// @errors kBadInput: no text; fewer than `length` tokens in all
Result<Calibration> calibration_from_text(const std::filesystem::path& file,
                                          const io::Tokenizer& tokenizer, int64_t samples,
                                          int64_t length, uint64_t seed);
/// Samples from the model: temperature 1, from BOS or a random token, KV cache, batched.
/// @errors kUsage: more tokens than positions; kInterrupted
Result<Calibration> calibration_from_model(
    const model::Decoder& decoder, int64_t samples, int64_t length, uint64_t seed,
    const std::function<void(int64_t, int64_t)>& progress = {},
    const std::atomic<bool>* interrupted = nullptr);
/// Peak memory of calibration_from_model() with the decoder that it needs: the whole model, and a
/// KV cache and the logits of every chunk that runs at once.
uint64_t planned_sampling_bytes(const io::DecoderSpec& spec, const io::Checkpoint& checkpoint,
                                int64_t samples, int64_t length, const model::Compute& compute);
/// safetensors with an int32 tensor `ids` [samples, length], or a JSON list of lists.
/// @errors kBadInput: other dtype or shape, ragged lists, ids outside the vocabulary (row and
/// column named)
Result<Calibration> calibration_from_ids(const std::filesystem::path& file, int64_t vocab);
/// Writes `ids` as calibration_from_ids() reads them (safetensors).
Status save_calibration_ids(const Calibration& calibration, const std::filesystem::path& file);

}  // namespace lacuna::prune
