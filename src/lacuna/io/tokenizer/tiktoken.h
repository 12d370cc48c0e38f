// Llama-3's tokenizer.model: tiktoken's text form, one "base64-of-the-bytes rank" a line.
#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "lacuna/io/tokenizer/tokenizer_config.h"

namespace lacuna::io::tokenizer {

/// The form holds neither pattern nor special tokens; they are Llama-3's (names as in Llama 3.1:
/// <|begin_of_text|> at 128000, 256 in all), so only a file of 128,000 ranks is read.
/// @errors kBadInput: a line of another form (named), another number of ranks
Result<std::shared_ptr<const Tokenizer>> parse_tiktoken(std::string_view text,
                                                        const TokenizerConfig& config,
                                                        const std::string& file);

}  // namespace lacuna::io::tokenizer
