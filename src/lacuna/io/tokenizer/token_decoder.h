// From token spellings back to text.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

namespace lacuna::io::tokenizer {

/// GPT-2's printable characters become bytes again; ill-formed UTF-8 becomes U+FFFD.
struct ByteLevelDecoder {};
struct ReplaceDecoder {
  std::string pattern, content;
};
/// Runs of <0xHH> become their bytes where those are valid UTF-8, else one U+FFFD a token.
struct ByteFallbackDecoder {};
/// All texts so far become one.
struct FuseDecoder {};
/// Takes up to `count` of a character off the start of each text.
struct StripDecoder {
  std::string character;
  size_t count = 0;
};

using TokenDecoder =
    std::variant<ByteLevelDecoder, ReplaceDecoder, ByteFallbackDecoder, FuseDecoder, StripDecoder>;

/// Text of the tokens. Without steps they are joined by spaces, as Hugging Face does.
/// @param open  more tokens may follow: leaves out what they could still change (bytes of an
/// incomplete character, a run
///              of byte tokens)
std::string decode_tokens(const std::vector<TokenDecoder>& steps, std::vector<std::string> tokens,
                          bool open);

}  // namespace lacuna::io::tokenizer
