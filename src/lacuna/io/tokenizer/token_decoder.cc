#include "lacuna/io/tokenizer/token_decoder.h"

#include <charconv>
#include <optional>

#include "lacuna/io/tokenizer/byte_level.h"
#include "lacuna/io/tokenizer/pattern.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

std::string join(const std::vector<std::string>& tokens, std::string_view between) {
  std::string out;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (i > 0) out += between;
    out += tokens[i];
  }
  return out;
}

void apply(const ByteLevelDecoder&, std::vector<std::string>& tokens, bool open) {
  std::string bytes;
  for (const std::string& token : tokens) bytes += from_byte_level(token).value_or(token);
  if (open) bytes.resize(bytes.size() - truncated_tail_bytes(bytes));
  tokens = {to_valid_utf8(bytes)};
}

void apply(const ReplaceDecoder& step, std::vector<std::string>& tokens, bool) {
  const Pattern pattern = Pattern::literal(step.pattern);
  for (std::string& token : tokens) token = pattern.replace_all(token, step.content);
}

std::optional<char> byte_of(std::string_view token) {
  if (token.size() != 6 || !token.starts_with("<0x") || token[5] != '>') return std::nullopt;
  unsigned byte = 0;
  const auto [end, error] = std::from_chars(token.data() + 3, token.data() + 5, byte, 16);
  if (error != std::errc() || end != token.data() + 5) return std::nullopt;
  return static_cast<char>(byte);
}

void apply(const ByteFallbackDecoder&, std::vector<std::string>& tokens, bool open) {
  std::vector<std::string> out;
  std::string run;
  const auto flush = [&] {
    if (run.empty()) return;
    if (is_valid_utf8(run)) {
      out.push_back(run);
    } else {
      out.insert(out.end(), run.size(), std::string(kReplacement));
    }
    run.clear();
  };
  for (std::string& token : tokens) {
    if (const auto byte = byte_of(token)) {
      run += *byte;
    } else {
      flush();
      out.push_back(std::move(token));
    }
  }
  if (!open) flush();
  tokens = std::move(out);
}

void apply(const FuseDecoder&, std::vector<std::string>& tokens, bool) {
  tokens = {join(tokens, "")};
}

void apply(const StripDecoder& step, std::vector<std::string>& tokens, bool) {
  for (std::string& token : tokens) {
    size_t at = 0;
    for (size_t i = 0;
         i < step.count && std::string_view(token).substr(at).starts_with(step.character); ++i)
      at += step.character.size();
    token.erase(0, at);
  }
}

}  // namespace

std::string decode_tokens(const std::vector<TokenDecoder>& steps, std::vector<std::string> tokens,
                          bool open) {
  for (const TokenDecoder& step : steps)
    std::visit([&](const auto& s) { apply(s, tokens, open); }, step);
  return join(tokens, steps.empty() ? " " : "");
}

}  // namespace lacuna::io::tokenizer
