// Splits normalised text into the pieces that are merged separately.
#pragma once

#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "lacuna/io/tokenizer/pattern.h"

namespace lacuna::io::tokenizer {

/// Pieces of one text, none empty.
struct Pieces {
  std::string text;
  std::vector<Span> spans;
  std::string_view piece(size_t i) const {
    return std::string_view(text).substr(spans[i].begin, spans[i].size());
  }
};

/// What becomes of the matches of a pattern: a piece each, dropped, glued to a neighbour, or glued
/// to each other.
enum class SplitBehavior { kIsolated, kRemoved, kMergedWithPrevious, kMergedWithNext, kContiguous };

struct Split {
  Pattern pattern;
  SplitBehavior behavior = SplitBehavior::kIsolated;
  bool invert = false;  ///< what lies between the matches is the match
};

/// Puts a space before every piece that doesn't start with one.
struct PrefixSpace {};

/// Bytes become GPT-2's printable characters (byte_level.h).
struct ByteLevelMap {};

/// The ByteLevel component of tokenizer.json is up to three of these steps: PrefixSpace, Split by
/// GPT-2's pattern, map.
using PreTokenizer = std::variant<Split, PrefixSpace, ByteLevelMap>;

/// The published splitting patterns, for files that don't carry theirs.
inline constexpr const char* kGpt2Pattern =
    R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
inline constexpr const char* kLlama3Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";
inline constexpr const char* kQwen2Pattern =
    R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*)"
    R"(|\s*[\r\n]+|\s+(?!\S)|\s+)";

/// @limits text is valid UTF-8
Pieces pre_tokenize(const std::vector<PreTokenizer>& steps, std::string text);

}  // namespace lacuna::io::tokenizer
