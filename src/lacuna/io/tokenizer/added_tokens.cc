#include "lacuna/io/tokenizer/added_tokens.h"

#include <algorithm>

#include "lacuna/io/tokenizer/characters.h"

namespace lacuna::io::tokenizer {

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
    if (token.left_strip) {
      begin = std::max(begin, done);
      begin -= trailing_space_bytes(text.substr(done, begin - done));
    }
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
