// tokenizer.model as SentencePiece writes it (Llama-2).
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "lacuna/io/tokenizer/tokenizer_config.h"

namespace lacuna::io::tokenizer {

/// Encoding is libsentencepiece's own; decoding is that of the same model's tokenizer.json. Control
/// pieces (<s>) are recognised in the text. BOS is added unless the config says otherwise.
/// @errors kBadInput: not a SentencePiece model
Result<std::shared_ptr<const Tokenizer>> parse_sentencepiece(std::string_view bytes,
                                                             const TokenizerConfig& config,
                                                             const std::string& file);

}  // namespace lacuna::io::tokenizer
