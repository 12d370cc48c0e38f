#include "lacuna/io/json.h"

#include <algorithm>
#include <nlohmann/json.hpp>

namespace lacuna::io {
namespace {

/// How deep arrays and objects nest. Brackets in strings don't count; on a text that isn't JSON the
/// answer holds up to its first mistake, which is as far as the parser gets.
int depth_of(std::string_view text) {
  int depth = 0, deepest = 0;
  bool in_string = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (in_string) {
      if (c == '\\') ++i;
      in_string = c != '"';
    } else if (c == '"') {
      in_string = true;
    } else if (c == '[' || c == '{') {
      deepest = std::max(deepest, ++depth);
    } else if (c == ']' || c == '}') {
      --depth;
    }
  }
  return deepest;
}

/// @param what  the text must be, for messages
Result<nlohmann::json> parse(std::string_view text, const std::string& where, const char* what) {
  if (const int depth = depth_of(text); depth > kDeepestJson)
    return bad_input("{}: nests JSON values too deep (got {}; need {} at most). Get it again.",
                     where, depth, kDeepestJson);
  try {
    return nlohmann::json::parse(text);
  } catch (const nlohmann::json::parse_error& error) {
    return bad_input("{}: not {} (a mistake at byte {}). Get it again.", where, what, error.byte);
  } catch (const nlohmann::json::exception&) {  // a number that no double holds
    return bad_input("{}: not {} (a number is too large). Get it again.", where, what);
  }
}

}  // namespace

Result<nlohmann::json> parse_json(std::string_view text, const std::string& where) {
  return parse(text, where, "JSON");
}

Result<nlohmann::json> parse_json_object(std::string_view text, const std::string& where) {
  LACUNA_TRY(nlohmann::json value, parse(text, where, "a JSON object"));
  if (!value.is_object())
    return bad_input("{}: not a JSON object (got {}). Get it again.", where, value.type_name());
  return value;
}

}  // namespace lacuna::io
