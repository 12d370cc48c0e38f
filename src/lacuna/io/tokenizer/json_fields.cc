#include "lacuna/io/tokenizer/json_fields.h"

namespace lacuna::io::tokenizer {

std::string shown(const Json& value) {
  if (value.is_structured()) return value.type_name();
  return value.dump(-1, ' ', false, Json::error_handler_t::replace);
}

Result<AddedToken> added_token(const Json& object, const std::string& file) {
  if (!object.is_object())
    return bad_input("{}: an added token must be an object (got {}).", file, object.type_name());
  AddedToken token;
  if (!object.contains("content"))
    return bad_input("{}: an added token must have \"content\".", file);
  LACUNA_TRY(token.content, field_or<std::string>(object, "content", "", file));
  LACUNA_TRY(token.special, field_or<bool>(object, "special", false, file));
  // Hugging Face's default: special tokens are sought in the raw text.
  LACUNA_TRY(token.normalized, field_or<bool>(object, "normalized", !token.special, file));
  LACUNA_TRY(token.left_strip, field_or<bool>(object, "lstrip", false, file));
  LACUNA_TRY(token.right_strip, field_or<bool>(object, "rstrip", false, file));
  LACUNA_TRY(token.single_word, field_or<bool>(object, "single_word", false, file));
  return token;
}

Result<Vocabulary> read_vocabulary(const Json& object, const std::string& file) {
  std::vector<std::pair<std::string, int64_t>> entries;
  entries.reserve(object.size());
  for (const auto& [token, id] : object.items()) {
    if (!id.is_number_integer())
      return bad_input("{}: the id of token \"{}\" must be an integer (got {}).", file, token,
                       shown(id));
    entries.emplace_back(token, id.get<int64_t>());
  }
  return Vocabulary::create(std::move(entries), file);
}

}  // namespace lacuna::io::tokenizer
