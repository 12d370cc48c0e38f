#include "lacuna/io/tokenizer/pre_tokenizer.h"

#include <algorithm>

#include "lacuna/io/tokenizer/byte_level.h"

namespace lacuna::io::tokenizer {
namespace {

struct Part {
  Span span;
  bool match = false;
};

/// Matches and what lies between them, in order, covering the text.
std::vector<Part> parts_of(const Split& split, std::string_view text) {
  std::vector<Part> parts;
  size_t at = 0;
  for (const Span& match : split.pattern.find_all(text)) {
    if (match.begin > at) parts.push_back({{at, match.begin}, split.invert});
    parts.push_back({match, !split.invert});
    at = match.end;
  }
  if (at < text.size()) parts.push_back({{at, text.size()}, split.invert});
  return parts;
}

/// Joins parts into pieces; `base` is where the text starts.
void append_pieces(const std::vector<Part>& parts, SplitBehavior behavior, size_t base,
                   std::vector<Span>& out) {
  const size_t first = out.size();
  for (size_t i = 0; i < parts.size(); ++i) {
    const bool follows_match = i > 0 && parts[i - 1].match;
    const Span span{base + parts[i].span.begin, base + parts[i].span.end};
    bool glue = false;
    switch (behavior) {
      case SplitBehavior::kIsolated:
        break;
      case SplitBehavior::kRemoved:
        if (parts[i].match) continue;
        break;
      case SplitBehavior::kMergedWithPrevious:  // of several matches in a row only the first has a
                                                // text before it
        glue = parts[i].match && !follows_match;
        break;
      case SplitBehavior::kMergedWithNext:  // and only the last a text behind it
        glue = !parts[i].match && follows_match;
        break;
      case SplitBehavior::kContiguous:
        glue = parts[i].match == follows_match;
        break;
    }
    if (glue && out.size() > first) {
      out.back().end = span.end;
    } else {
      out.push_back(span);
    }
  }
  // An empty match cuts the text, and is no piece itself.
  out.erase(std::remove_if(out.begin() + static_cast<std::ptrdiff_t>(first), out.end(),
                           [](const Span& span) { return span.size() == 0; }),
            out.end());
}

void apply(const Split& split, Pieces& pieces) {
  std::vector<Span> spans;
  spans.reserve(pieces.spans.size());
  for (size_t i = 0; i < pieces.spans.size(); ++i)
    append_pieces(parts_of(split, pieces.piece(i)), split.behavior, pieces.spans[i].begin, spans);
  pieces.spans = std::move(spans);
}

void apply(const PrefixSpace&, Pieces& pieces) {
  Pieces out;
  for (size_t i = 0; i < pieces.spans.size(); ++i) {
    const size_t begin = out.text.size();
    if (!pieces.piece(i).starts_with(' ')) out.text += ' ';
    out.text += pieces.piece(i);
    out.spans.push_back({begin, out.text.size()});
  }
  pieces = std::move(out);
}

void apply(const ByteLevelMap&, Pieces& pieces) {
  Pieces out;
  out.text.reserve(pieces.text.size() + pieces.text.size() / 2);
  out.spans.reserve(pieces.spans.size());
  for (size_t i = 0; i < pieces.spans.size(); ++i) {
    const size_t begin = out.text.size();
    append_byte_level(pieces.piece(i), out.text);
    out.spans.push_back({begin, out.text.size()});
  }
  pieces = std::move(out);
}

}  // namespace

Pieces pre_tokenize(const std::vector<PreTokenizer>& steps, std::string text) {
  Pieces pieces;
  if (text.empty()) return pieces;
  pieces.spans.push_back({0, text.size()});
  pieces.text = std::move(text);
  for (const PreTokenizer& step : steps) std::visit([&](const auto& s) { apply(s, pieces); }, step);
  return pieces;
}

}  // namespace lacuna::io::tokenizer
