// Reading of JSON objects whose mistakes are named.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "lacuna/core/status.h"
#include "lacuna/io/json.h"
#include "lacuna/io/tokenizer/added_tokens.h"

namespace lacuna::io::tokenizer {

using Json = nlohmann::json;

/// A value for a message: itself, or its kind where it has parts.
std::string shown(const Json& value);

/// The field `key`, or the fallback where it is missing or null.
/// @errors kBadInput: of another type
template <class T>
Result<T> field_or(const Json& object, const char* key, T fallback, const std::string& file) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return fallback;
  bool fits = false;
  const char* need = "";
  if constexpr (std::is_same_v<T, bool>) {
    fits = found->is_boolean();
    need = "true or false";
  } else if constexpr (std::is_same_v<T, std::string>) {
    fits = found->is_string();
    need = "a string";
  } else {
    static_assert(std::is_same_v<T, int64_t>);
    fits = found->is_number_integer();
    need = "an integer";
  }
  if (!fits)
    return bad_input("{}: \"{}\" must be {} (got {}).", file, key, need, found->type_name());
  return found->template get<T>();
}

/// An added token without its id. @errors kBadInput: no object, no content, a flag of the wrong
/// kind
Result<AddedToken> added_token(const Json& object, const std::string& file);

/// {"token": id, ...} @errors kBadInput: an id that isn't an integer, and what Vocabulary::create()
/// refuses
Result<Vocabulary> read_vocabulary(const Json& object, const std::string& file);

}  // namespace lacuna::io::tokenizer
