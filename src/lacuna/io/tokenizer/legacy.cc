#include "lacuna/io/tokenizer/legacy.h"

#include "lacuna/io/lines.h"
#include "lacuna/io/tokenizer/bpe.h"
#include "lacuna/io/tokenizer/json_fields.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

constexpr const char* kEndOfText = "<|endoftext|>";

Result<std::vector<MergeRule>> read_merges(std::string_view text, const std::string& file) {
  std::vector<MergeRule> merges;
  LACUNA_CHECK(for_each_line(text, [&](size_t number, std::string_view line) -> Status {
    if (line.starts_with("#version")) return {};
    auto rule = parse_merge(line, static_cast<uint32_t>(merges.size()));
    if (!rule)
      return bad_input("{}: line {} must be two tokens (got \"{}\").", file, number,
                       to_valid_utf8(line.substr(0, 80)));
    merges.push_back(*std::move(rule));
    return {};
  }));
  return merges;
}

}  // namespace

Result<std::shared_ptr<const Tokenizer>> parse_legacy(std::string_view vocab_json,
                                                      std::string_view merges_text,
                                                      const TokenizerConfig& config,
                                                      const std::string& vocab_file,
                                                      const std::string& merges_file) {
  const bool qwen2 = config.tokenizer_class.starts_with("Qwen2Tokenizer");
  LACUNA_TRY(const Json root, parse_json_object(vocab_json, vocab_file));
  LACUNA_TRY(Vocabulary vocabulary, read_vocabulary(root, vocab_file));
  LACUNA_TRY(const std::vector<MergeRule> merges, read_merges(merges_text, merges_file));
  PipelineParts parts;
  LACUNA_TRY(parts.model, Bpe::create(std::move(vocabulary), merges, {}, merges_file));
  const Vocabulary& known = parts.model->vocabulary();

  std::vector<AddedToken> added = config.added_tokens(known);
  if (added.empty())
    if (const auto id = known.id(kEndOfText)) added.push_back({kEndOfText, *id, true});

  if (qwen2) parts.normalizer.emplace_back(UnicodeForm::kNfc);
  LACUNA_TRY(parts.added,
             AddedTokens::create(std::move(added), known, parts.normalizer, vocab_file));
  LACUNA_TRY(Pattern pattern, Pattern::regex(qwen2 ? kQwen2Pattern : kGpt2Pattern, vocab_file));
  if (config.add_prefix_space.value_or(false)) parts.pre_tokenizer.emplace_back(PrefixSpace{});
  parts.pre_tokenizer.emplace_back(Split{std::move(pattern)});
  parts.pre_tokenizer.emplace_back(ByteLevelMap{});
  parts.decoder.emplace_back(ByteLevelDecoder{});
  parts.eos = parts.added.id(kEndOfText);
  if (!qwen2) parts.bos = parts.eos;
  LACUNA_CHECK(apply_config(config, vocab_file, parts));
  return std::make_shared<const Pipeline>(std::move(parts));
}

}  // namespace lacuna::io::tokenizer
