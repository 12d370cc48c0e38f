#include "lacuna/io/tokenizer/tokenizer_config.h"

#include <algorithm>

#include "lacuna/io/file.h"
#include "lacuna/io/lines.h"
#include "lacuna/io/tokenizer/json_fields.h"

namespace lacuna::io::tokenizer {
namespace {

/// A token is written as a string, as {"content": ...}, or as null.
std::optional<std::string> spelling(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_object() && value.contains("content") && value["content"].is_string())
    return value["content"].get<std::string>();
  return std::nullopt;
}

/// A chat template is a string, or one of a list of {"name": ..., "template": ...}.
std::optional<std::string> default_template(const Json& value) {
  if (value.is_string()) return value.get<std::string>();
  if (!value.is_array()) return std::nullopt;
  for (const Json& entry : value)
    if (entry.is_object() && entry.value("name", Json()) == "default" &&
        entry.contains("template") && entry["template"].is_string())
      return entry["template"].get<std::string>();
  return std::nullopt;
}

}  // namespace

Result<TokenizerConfig> TokenizerConfig::read(const std::filesystem::path& folder) {
  const std::filesystem::path path = folder / "tokenizer_config.json";
  std::error_code ignored;
  if (!std::filesystem::exists(path, ignored)) return TokenizerConfig();
  LACUNA_TRY(const std::string text, read_text(path));
  return parse(text, path.string());
}

Result<TokenizerConfig> TokenizerConfig::parse(std::string_view json, const std::string& file) {
  TokenizerConfig config;
  if (json.empty()) return config;
  LACUNA_TRY(const Json root, parse_json_object(json, file));
  LACUNA_TRY(config.tokenizer_class, field_or<std::string>(root, "tokenizer_class", "", file));
  for (const char* key :
       {"bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token"}) {
    if (!root.contains(key) || root[key].is_null()) continue;
    const auto token = spelling(root[key]);
    if (!token)
      return bad_input("{}: \"{}\" must be a string, an object with \"content\", or null (got {}).",
                       file, key, root[key].type_name());
    config.specials.push_back(*token);
    if (std::string_view(key) == "bos_token") config.bos = token;
    if (std::string_view(key) == "eos_token") config.eos = token;
  }
  if (root.contains("additional_special_tokens") && root["additional_special_tokens"].is_array())
    for (const Json& value : root["additional_special_tokens"])
      if (const auto token = spelling(value)) config.specials.push_back(*token);
  for (const auto& [key, flag] :
       {std::pair{"add_bos_token", &config.add_bos}, std::pair{"add_eos_token", &config.add_eos},
        std::pair{"add_prefix_space", &config.add_prefix_space}}) {
    if (!root.contains(key) || root[key].is_null()) continue;
    LACUNA_TRY(*flag, field_or<bool>(root, key, false, file));
  }
  if (root.contains("added_tokens_decoder")) {
    if (!root["added_tokens_decoder"].is_object())
      return bad_input("{}: \"added_tokens_decoder\" must be an object (got {}).", file,
                       root["added_tokens_decoder"].type_name());
    for (const auto& [key, value] : root["added_tokens_decoder"].items()) {
      const auto id = from_decimal(key);
      if (!id)
        return bad_input("{}: keys of \"added_tokens_decoder\" must be ids (got \"{}\").", file,
                         key);
      LACUNA_TRY(AddedToken token, added_token(value, file));
      token.id = *id;
      config.added.push_back(std::move(token));
    }
  }
  config.chat_template = default_template(root.value("chat_template", Json()));
  return config;
}

std::vector<AddedToken> TokenizerConfig::added_tokens(const Vocabulary& vocabulary) const {
  std::vector<AddedToken> tokens = added, named;
  for (const std::string& content : specials)
    if (const auto id = vocabulary.id(content)) named.push_back({content, *id, true});
  merge_added(tokens, named);
  return tokens;
}

void merge_added(std::vector<AddedToken>& tokens, const std::vector<AddedToken>& extra) {
  for (const AddedToken& token : extra)
    if (std::none_of(tokens.begin(), tokens.end(),
                     [&](const AddedToken& t) { return t.content == token.content; }))
      tokens.push_back(token);
}

Status apply_config(const TokenizerConfig& config, const std::string& file, PipelineParts& parts) {
  const auto resolve = [&](const std::optional<std::string>& token, const char* what,
                           std::optional<int32_t>& id) -> Status {
    if (!token) return {};
    id = parts.added.id(*token);
    if (!id) id = parts.model->vocabulary().id(*token);
    if (!id) return bad_input("{}: {} must be a token (got \"{}\").", file, what, *token);
    return {};
  };
  LACUNA_CHECK(resolve(config.bos, "bos_token", parts.bos));
  LACUNA_CHECK(resolve(config.eos, "eos_token", parts.eos));
  const auto set = [&](std::optional<bool> add, std::optional<int32_t> id, const char* what,
                       std::vector<int32_t>& around) -> Status {
    if (!add) return {};
    if (*add && !id) return bad_input("{}: {} needs that token (got none).", file, what);
    around.clear();
    if (*add) around.push_back(*id);
    return {};
  };
  LACUNA_CHECK(set(config.add_bos, parts.bos, "add_bos_token", parts.prefix));
  return set(config.add_eos, parts.eos, "add_eos_token", parts.suffix);
}

}  // namespace lacuna::io::tokenizer
