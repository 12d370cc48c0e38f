#include "lacuna/io/tokenizer/tokenizer.h"

#include "lacuna/io/file.h"
#include "lacuna/io/tokenizer/huggingface.h"
#include "lacuna/io/tokenizer/legacy.h"
#include "lacuna/io/tokenizer/sentencepiece.h"
#include "lacuna/io/tokenizer/tiktoken.h"
#include "lacuna/io/tokenizer/tokenizer_config.h"

namespace lacuna::io {
namespace fs = std::filesystem;

Result<std::shared_ptr<const Tokenizer>> Tokenizer::open(const fs::path& folder) {
  const auto has = [&](const char* name) {
    std::error_code ignored;
    return fs::exists(folder / name, ignored);
  };
  LACUNA_TRY(const auto config, tokenizer::TokenizerConfig::read(folder));
  if (has("tokenizer.json")) {
    const fs::path path = folder / "tokenizer.json";
    LACUNA_TRY(const std::string text, read_text(path));
    return tokenizer::parse_huggingface(text, config, path.string());
  }
  for (const auto& [vocab, merges] :
       {std::pair{"vocab.json", "merges.txt"}, std::pair{"encoder.json", "vocab.bpe"}}) {
    if (!has(vocab) || !has(merges)) continue;
    LACUNA_TRY(const std::string vocab_text, read_text(folder / vocab));
    LACUNA_TRY(const std::string merges_text, read_text(folder / merges));
    return tokenizer::parse_legacy(vocab_text, merges_text, config, (folder / vocab).string(),
                                   (folder / merges).string());
  }
  if (has("tokenizer.model")) {
    const fs::path path = folder / "tokenizer.model";
    LACUNA_TRY(const std::string bytes, read_text(path));
    // The first field of SentencePiece's protobuf has the tag byte 0x0A, which is no digit of
    // base64.
    if (bytes.starts_with('\n'))
      return tokenizer::parse_sentencepiece(bytes, config, path.string());
    return tokenizer::parse_tiktoken(bytes, config, path.string());
  }
  return bad_input(
      "{}: no tokenizer found (need tokenizer.json; vocab.json and merges.txt; encoder.json and "
      "vocab.bpe; or tokenizer.model).",
      folder.string());
}

}  // namespace lacuna::io
