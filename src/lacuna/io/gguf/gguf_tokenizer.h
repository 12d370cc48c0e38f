// The tokenizer inside a GGUF file as the files that Hugging Face keeps beside a model.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/gguf/gguf.h"

namespace lacuna::io {

struct GgufTokenizer {
  std::string tokenizer_json, tokenizer_config_json;
  int64_t tokens = 0;
  std::optional<int64_t> bos, pad;
  std::vector<int64_t> eos;  ///< all that end an answer, end of text first
};

/// tokenizer.ggml.model "gpt2" gives a byte-level BPE; its splitting pattern follows from
/// tokenizer.ggml.pre. "llama" gives a BPE over characters with byte fallback, whose merges follow
/// from the scores of the pieces. What comes out has been read once by our own reader.
/// @errors kBadInput: another kind of either, lists that don't fit each other, tokens that are not
/// UTF-8 or stand twice (key named)
Result<GgufTokenizer> gguf_tokenizer(const GgufFile& file);

}  // namespace lacuna::io
