#include "lacuna/io/tokenizer/tokenizer.h"

#include "lacuna/io/file.h"
#include "lacuna/io/tokenizer/huggingface.h"
#include "lacuna/io/tokenizer/tokenizer_config.h"

namespace lacuna::io {
namespace fs = std::filesystem;

Result<std::shared_ptr<const Tokenizer>> Tokenizer::open(const fs::path& folder) {
  const auto has = [&](const char* name) {
    std::error_code ignored;
    return fs::exists(folder / name, ignored);
  };
  tokenizer::TokenizerConfig config;
  if (has("tokenizer_config.json")) {
    const fs::path path = folder / "tokenizer_config.json";
    LACUNA_TRY(const std::string text, read_text(path));
    LACUNA_TRY(config, tokenizer::TokenizerConfig::parse(text, path.string()));
  }
  if (has("tokenizer.json")) {
    const fs::path path = folder / "tokenizer.json";
    LACUNA_TRY(const std::string text, read_text(path));
    return tokenizer::parse_huggingface(text, config, path.string());
  }
  return bad_input(
      "{}: no tokenizer found (need tokenizer.json; vocab.json and merges.txt; encoder.json and "
      "vocab.bpe; or "
      "tokenizer.model).",
      folder.string());
}

}  // namespace lacuna::io
