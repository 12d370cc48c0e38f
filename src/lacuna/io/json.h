// JSON from outside, parsed so that nothing in it can hurt later.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>

#include "lacuna/core/status.h"

namespace lacuna::io {

/// No file that we read nests its values deeper.
inline constexpr int kDeepestJson = 64;

/// Parses a whole text. nlohmann's values copy, compare and print themselves by recursion, so a
/// megabyte of "[" would end the process long after parsing; it is refused here.
/// @param where  for messages: the file, or file and line
/// @errors kBadInput: not JSON (position named), or nested more than kDeepestJson deep
Result<nlohmann::json> parse_json(std::string_view text, const std::string& where);
/// The same for a text that must hold an object. @errors also kBadInput: another value
Result<nlohmann::json> parse_json_object(std::string_view text, const std::string& where);

}  // namespace lacuna::io
