// The two-file form of byte-level BPE: vocab.json + merges.txt (GPT-2 itself: encoder.json +
// vocab.bpe).
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "lacuna/io/tokenizer/tokenizer_config.h"

namespace lacuna::io::tokenizer {

/// GPT-2's pattern and no normaliser; Qwen2's pattern and NFC where config.tokenizer_class is a
/// Qwen2Tokenizer. Special: the tokens that the config names; without a config <|endoftext|>, as in
/// both families.
/// @errors kBadInput: a vocabulary that isn't JSON of token -> id, a line of merges that isn't two
/// tokens of it
Result<std::shared_ptr<const Tokenizer>> parse_legacy(std::string_view vocab_json,
                                                      std::string_view merges_text,
                                                      const TokenizerConfig& config,
                                                      const std::string& vocab_file,
                                                      const std::string& merges_file);

}  // namespace lacuna::io::tokenizer
