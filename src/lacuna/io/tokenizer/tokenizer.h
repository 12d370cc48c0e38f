// Text to token ids and back, exactly as the model's own tokenizer files say.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::io {

/// A tokenizer read from a folder. Thread-safe for reading.
class Tokenizer {
 public:
  virtual ~Tokenizer() = default;

  /// Reads tokenizer.json; else vocab.json + merges.txt (or encoder.json + vocab.bpe); else
  /// tokenizer.model (SentencePiece, or tiktoken's text form). tokenizer_config.json beside it is
  /// honoured.
  /// @errors kBadInput: no tokenizer files; an unknown component (named); corrupt vocabulary (line
  /// or entry named)
  static Result<std::shared_ptr<const Tokenizer>> open(const std::filesystem::path& folder);

  /// Token ids of `text`. Special tokens written in the text are recognised; invalid UTF-8 becomes
  /// U+FFFD.
  /// @param add_special  also adds what the post-processor adds (BOS for Llama; nothing for GPT-2)
  virtual std::vector<int32_t> encode(std::string_view text, bool add_special) const = 0;
  /// Text of the ids; @param skip_special  leaves special tokens out
  virtual std::string decode(const std::vector<int32_t>& ids, bool skip_special) const = 0;
  /// The beginning of decode() that no further token can change: bytes of an incomplete character
  /// are left out.
  virtual std::string decode_certain(const std::vector<int32_t>& ids, bool skip_special) const {
    return decode(ids, skip_special);
  }
  virtual int64_t vocab_size() const = 0;
  /// The id of a token spelled exactly so ("<|im_end|>"), if there is one.
  virtual std::optional<int32_t> token_id(std::string_view token) const = 0;
  virtual std::optional<int32_t> bos() const = 0;
  virtual std::optional<int32_t> eos() const = 0;
};

/// Emits text as tokens arrive, only ever whole UTF-8 characters.
class StreamDecoder {
 public:
  StreamDecoder(std::shared_ptr<const Tokenizer> tokenizer, bool skip_special = true);
  /// The text that became certain with this token (may be empty).
  std::string push(int32_t id);
  /// What is left (incomplete bytes as U+FFFD).
  std::string finish();

 private:
  std::shared_ptr<const Tokenizer> tokenizer_;
  bool skip_special_;
  std::vector<int32_t> pending_;
  size_t emitted_ = 0;
};

}  // namespace lacuna::io
