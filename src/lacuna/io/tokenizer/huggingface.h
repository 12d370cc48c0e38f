// Hugging Face's tokenizer.json.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "lacuna/io/tokenizer/tokenizer_config.h"

namespace lacuna::io::tokenizer {

/// Reads BPE tokenizers with these components, and refuses all others by name:
/// normalizer NFC NFD NFKC NFKD Prepend Replace Sequence; pre_tokenizer Split Digits ByteLevel
/// Sequence; post_processor TemplateProcessing ByteLevel Sequence; decoder ByteLevel Replace
/// ByteFallback Fuse Strip Sequence.
/// @param json  the text of tokenizer.json
/// @errors kBadInput: not JSON, an unknown component, a corrupt vocabulary or merge (named)
Result<std::shared_ptr<const Tokenizer>> parse_huggingface(std::string_view json,
                                                           const TokenizerConfig& config,
                                                           const std::string& file);

}  // namespace lacuna::io::tokenizer
