// Tokenizer files and texts from anywhere: readers must refuse or work, and what works must hold
// its promises.
//
// The first byte says what the rest is: 'j' tokenizer.json, 'v' vocab.json, merges and
// tokenizer_config.json, 't' tiktoken ranks, 'c' a chat template. Parts end at byte 0; the last one
// is the text to encode. 's' is SentencePiece: two bytes say how long the model is, the text
// follows.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>

#include "lacuna/io/tokenizer/chat_template.h"
#include "lacuna/io/tokenizer/huggingface.h"
#include "lacuna/io/tokenizer/legacy.h"
#include "lacuna/io/tokenizer/sentencepiece.h"
#include "lacuna/io/tokenizer/tiktoken.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace {

using lacuna::Result;
using lacuna::io::Tokenizer;
using lacuna::io::tokenizer::TokenizerConfig;

void require(bool holds) {
  if (!holds) std::abort();
}

void exercise(const std::shared_ptr<const Tokenizer>& tokenizer, std::string_view text) {
  const auto ids = tokenizer->encode(text, true);
  for (const bool skip : {false, true}) {
    const std::string whole = tokenizer->decode(ids, skip);
    require(lacuna::io::tokenizer::is_valid_utf8(whole));
    lacuna::io::StreamDecoder stream(tokenizer, skip);
    std::string streamed;
    for (const int32_t id : ids) streamed += stream.push(id);
    streamed += stream.finish();
    require(streamed == whole);
  }
  for (const int32_t id : ids) require(id >= 0 && id < tokenizer->vocab_size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string_view rest(reinterpret_cast<const char*>(data), size);
  const auto take = [&] {
    const size_t end = rest.find('\0');
    const std::string_view part = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    return part;
  };
  if (rest.empty()) return 0;
  const char kind = rest[0];
  rest.remove_prefix(1);
  if (kind == 'j') {
    const auto tokenizer = lacuna::io::tokenizer::parse_huggingface(take(), {}, "fuzz");
    if (tokenizer.ok()) exercise(*tokenizer, rest);
  } else if (kind == 'v') {
    const std::string_view vocab = take(), merges = take();
    const auto config = TokenizerConfig::parse(take(), "config");
    if (!config.ok()) return 0;
    const auto tokenizer =
        lacuna::io::tokenizer::parse_legacy(vocab, merges, *config, "vocab", "merges");
    if (tokenizer.ok()) exercise(*tokenizer, rest);
  } else if (kind == 't') {
    require(
        !lacuna::io::tokenizer::parse_tiktoken(rest, {}, "fuzz").ok());  // too small for Llama-3
  } else if (kind == 's' && rest.size() >= 2) {
    const size_t size = static_cast<unsigned char>(rest[0]) | static_cast<unsigned char>(rest[1])
                                                                  << 8;
    rest.remove_prefix(2);
    const std::string_view model = rest.substr(0, size);
    rest.remove_prefix(model.size());
    const auto tokenizer = lacuna::io::tokenizer::parse_sentencepiece(model, {}, "fuzz");
    if (tokenizer.ok()) exercise(*tokenizer, rest);
  } else if (kind == 'c') {
    const auto chat = lacuna::io::ChatTemplate::parse(take(), "<s>", "</s>", "fuzz");
    if (chat.ok()) (void)chat->render({{"system", std::string(rest)}, {"user", std::string(rest)}});
  }
  return 0;
}
