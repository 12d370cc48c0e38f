#include "lacuna/io/tokenizer/added_tokens.h"

#include <utf8proc.h>

#include <algorithm>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

bool is_space(uint32_t c) {  // the property White_Space
  return (c >= 0x09 && c <= 0x0D) || c == 0x20 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
         c == 0x3000;
}

bool is_word(uint32_t c) {  // letters, marks, decimal digits, connectors, joiners
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC:
      return true;
    default:
      return c == 0x200C || c == 0x200D;
  }
}

uint32_t first_code_point(std::string_view text) { return utf8_step(text, 0).code_point; }

size_t last_character_at(std::string_view text) {
  size_t at = text.size() - 1;
  while (at > 0 && (text[at] & 0xC0) == 0x80) --at;
  return at;
}

bool ends_with_word(std::string_view text) {
  return !text.empty() && is_word(utf8_step(text, last_character_at(text)).code_point);
}

bool starts_with_word(std::string_view text) {
  return !text.empty() && is_word(first_code_point(text));
}

size_t leading_space_bytes(std::string_view text) {
  size_t at = 0;
  while (at < text.size() && is_space(first_code_point(text.substr(at))))
    at += utf8_length(text[at]);
  return at;
}

size_t trailing_space_bytes(std::string_view text) {
  const size_t size = text.size();
  while (!text.empty()) {
    const size_t at = last_character_at(text);
    if (!is_space(utf8_step(text, at).code_point)) break;
    text = text.substr(0, at);
  }
  return size - text.size();
}

}  // namespace

void AddedTokens::Trie::insert(std::string_view spelling, int32_t token) {
  if (spelling.empty()) return;
  starts[static_cast<unsigned char>(spelling[0])] = true;
  uint32_t node = 0;
  for (const char c : spelling) {
    const auto byte = static_cast<unsigned char>(c);
    auto& next = nodes[node].next;
    const auto found =
        std::find_if(next.begin(), next.end(), [&](const auto& n) { return n.first == byte; });
    if (found != next.end()) {
      node = found->second;
    } else {
      const auto added = static_cast<uint32_t>(nodes.size());
      next.emplace_back(byte, added);
      nodes.emplace_back();
      node = added;
    }
  }
  if (nodes[node].token < 0) nodes[node].token = token;
}

std::pair<int32_t, size_t> AddedTokens::Trie::longest(std::string_view text) const {
  std::pair<int32_t, size_t> best{-1, 0};
  uint32_t node = 0;
  for (size_t at = 0; at < text.size(); ++at) {
    const auto& next = nodes[node].next;
    const auto byte = static_cast<unsigned char>(text[at]);
    const auto found =
        std::find_if(next.begin(), next.end(), [&](const auto& n) { return n.first == byte; });
    if (found == next.end()) break;
    node = found->second;
    if (nodes[node].token >= 0) best = {nodes[node].token, at + 1};
  }
  return best;
}

Result<AddedTokens> AddedTokens::create(std::vector<AddedToken> tokens,
                                        const Vocabulary& vocabulary,
                                        const std::vector<Normalizer>& normalizer,
                                        const std::string& file) {
  AddedTokens added;
  for (AddedToken& token : tokens) {
    if (token.content.empty()) continue;
    if (token.id < 0 || token.id > kMaxTokenId)
      return bad_input("{}: the id of added token \"{}\" is out of range (got {}; need 0..{}).",
                       file, token.content, token.id, kMaxTokenId);
    const auto id = static_cast<int32_t>(token.id);
    const auto in_model = vocabulary.id(token.content);
    const auto at_id = vocabulary.token(id);
    if ((in_model && *in_model != id) || (at_id && *at_id != token.content))
      return bad_input(
          "{}: added token \"{}\" must agree with the vocabulary (got id {}; the vocabulary has "
          "{}).",
          file, token.content, id,
          in_model ? fmt::format("it at {}", *in_model) : fmt::format("\"{}\" there", *at_id));
    const auto [slot, fresh] = added.ids_.emplace(token.content, id);
    if (!fresh && slot->second == id) continue;  // said twice
    if (!fresh || added.tokens_.contains(id))
      return bad_input("{}: added token \"{}\" must have an id of its own (got {}).", file,
                       token.content, id);
    if (token.normalized) {
      added.normalized_.insert(normalize(normalizer, token.content), id);
    } else {
      added.raw_.insert(token.content, id);
    }
    added.end_id_ = std::max<int64_t>(added.end_id_, id + 1);
    added.tokens_.emplace(id, std::move(token));
  }
  return added;
}

std::vector<Segment> AddedTokens::split(std::string_view text, bool normalized) const {
  const Trie& trie = normalized ? normalized_ : raw_;
  std::vector<Segment> segments;
  size_t done = 0;  // everything before is in a segment
  for (size_t at = 0; at < text.size();) {
    if (!trie.starts[static_cast<unsigned char>(text[at])]) {
      ++at;
      continue;
    }
    const auto [id, size] = trie.longest(text.substr(at));
    if (id < 0) {
      ++at;
      continue;
    }
    const AddedToken& token = tokens_.at(id);
    size_t begin = at, end = at + size;
    at = end;
    if (token.single_word &&
        (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end))))
      continue;
    if (token.left_strip)
      begin = std::max(begin - trailing_space_bytes(text.substr(0, begin)), done);
    if (token.right_strip) end += leading_space_bytes(text.substr(end));
    if (begin > done) segments.push_back({text.substr(done, begin - done), std::nullopt});
    segments.push_back({{}, id});
    done = end;
  }
  if (done < text.size()) segments.push_back({text.substr(done), std::nullopt});
  return segments;
}

std::optional<int32_t> AddedTokens::id(std::string_view token) const {
  const auto found = ids_.find(std::string(token));
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

const AddedToken* AddedTokens::find(int32_t id) const {
  const auto found = tokens_.find(id);
  return found == tokens_.end() ? nullptr : &found->second;
}

}  // namespace lacuna::io::tokenizer
