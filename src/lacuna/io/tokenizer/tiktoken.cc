#include "lacuna/io/tokenizer/tiktoken.h"

#include "lacuna/io/lines.h"
#include "lacuna/io/tokenizer/bpe.h"
#include "lacuna/io/tokenizer/byte_level.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

constexpr int64_t kLlama3Ranks = 128000;
constexpr int64_t kLlama3Specials = 256;

std::optional<std::string> from_base64(std::string_view text) {
  if (text.empty() || text.size() % 4 != 0) return std::nullopt;
  constexpr std::string_view kDigits =
      "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  const size_t padding = text.ends_with("==") ? 2 : text.ends_with('=') ? 1 : 0;
  std::string bytes;
  uint32_t bits = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const size_t digit = i < text.size() - padding ? kDigits.find(text[i]) : 0;
    if (digit == std::string_view::npos) return std::nullopt;
    bits = bits << 6 | static_cast<uint32_t>(digit);
    if (i % 4 == 3)
      for (int shift = 16; shift >= 0; shift -= 8) bytes += static_cast<char>(bits >> shift & 0xFF);
  }
  bytes.resize(bytes.size() - padding);
  return bytes;
}

Result<std::vector<std::pair<std::string, int64_t>>> read_ranks(std::string_view text,
                                                                const std::string& file) {
  std::vector<std::pair<std::string, int64_t>> ranks;
  LACUNA_CHECK(for_each_line(text, [&](size_t number, std::string_view line) -> Status {
    const size_t space = line.find(' ');
    const auto bytes = from_base64(line.substr(0, space));
    const auto rank =
        space == std::string_view::npos ? std::nullopt : from_decimal(line.substr(space + 1));
    if (!bytes || !rank)
      return bad_input("{}: line {} must be base64, a space and a rank (got \"{}\").", file, number,
                       to_valid_utf8(line.substr(0, 80)));
    ranks.emplace_back(std::string(), *rank);
    append_byte_level(*bytes, ranks.back().first);
    return {};
  }));
  return ranks;
}

/// tiktoken merges any two neighbours that are a token together, by that token's rank.
std::vector<MergeRule> all_merges(const Vocabulary& vocabulary) {
  std::vector<MergeRule> merges;
  for (int32_t id = 0; id < vocabulary.size(); ++id) {
    const std::string_view whole = vocabulary.token(id).value_or("");
    if (whole.empty()) continue;
    for (size_t at = utf8_length(whole[0]); at < whole.size(); at += utf8_length(whole[at])) {
      const std::string_view left = whole.substr(0, at), right = whole.substr(at);
      if (vocabulary.id(left) && vocabulary.id(right))
        merges.push_back({std::string(left), std::string(right), static_cast<uint32_t>(id)});
    }
  }
  return merges;
}

std::vector<AddedToken> llama3_specials() {
  std::vector<AddedToken> specials;
  int reserved = 0;
  for (int64_t i = 0; i < kLlama3Specials; ++i) {
    const auto name = [&]() -> std::string {
      switch (i) {
        case 0:
          return "<|begin_of_text|>";
        case 1:
          return "<|end_of_text|>";
        case 4:
          return "<|finetune_right_pad_id|>";
        case 6:
          return "<|start_header_id|>";
        case 7:
          return "<|end_header_id|>";
        case 8:
          return "<|eom_id|>";
        case 9:
          return "<|eot_id|>";
        case 10:
          return "<|python_tag|>";
        default:
          return fmt::format("<|reserved_special_token_{}|>", reserved++);
      }
    }();
    specials.push_back({name, kLlama3Ranks + i, true});
  }
  return specials;
}

}  // namespace

Result<std::shared_ptr<const Tokenizer>> parse_tiktoken(std::string_view text,
                                                        const TokenizerConfig& config,
                                                        const std::string& file) {
  LACUNA_TRY(auto ranks, read_ranks(text, file));
  if (static_cast<int64_t>(ranks.size()) != kLlama3Ranks)
    return bad_input(
        "{}: a tiktoken file must be Llama-3's (got {} ranks; need {}). Give the model's "
        "tokenizer.json.",
        file, ranks.size(), kLlama3Ranks);
  LACUNA_TRY(Vocabulary vocabulary, Vocabulary::create(std::move(ranks), file));
  const std::vector<MergeRule> merges = all_merges(vocabulary);
  PipelineParts parts;
  LACUNA_TRY(parts.model,
             Bpe::create(std::move(vocabulary), merges, {.ignore_merges = true}, file));
  std::vector<AddedToken> added = config.added_tokens(parts.model->vocabulary());
  if (added.empty()) added = llama3_specials();
  LACUNA_TRY(parts.added,
             AddedTokens::create(std::move(added), parts.model->vocabulary(), {}, file));
  LACUNA_TRY(Pattern pattern, Pattern::regex(kLlama3Pattern, file));
  parts.pre_tokenizer.emplace_back(Split{std::move(pattern)});
  parts.pre_tokenizer.emplace_back(ByteLevelMap{});
  parts.decoder.emplace_back(ByteLevelDecoder{});
  parts.bos = parts.added.id("<|begin_of_text|>");
  parts.eos = parts.added.id("<|end_of_text|>");
  if (parts.bos) parts.prefix = {*parts.bos};
  LACUNA_CHECK(apply_config(config, file, parts));
  return std::make_shared<const Pipeline>(std::move(parts));
}

}  // namespace lacuna::io::tokenizer
