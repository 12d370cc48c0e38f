#include "lacuna/io/tokenizer/vocabulary.h"

#include <algorithm>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {

Result<Vocabulary> Vocabulary::create(std::vector<std::pair<std::string, int64_t>> entries,
                                      const std::string& file) {
  int64_t highest = -1;
  for (const auto& [token, id] : entries) {
    if (!is_valid_utf8(token))
      return bad_input("{}: the token of id {} must be UTF-8 (got \"{}\").", file, id,
                       to_valid_utf8(token));
    if (id < 0 || id > kMaxTokenId)
      return bad_input("{}: the id of token \"{}\" is out of range (got {}; need 0..{}).", file,
                       token, id, kMaxTokenId);
    highest = std::max(highest, id);
  }
  Vocabulary vocabulary;
  vocabulary.tokens_.resize(static_cast<size_t>(highest + 1));
  vocabulary.ids_.reserve(entries.size());
  for (auto& [token, id] : entries) {
    auto& slot = vocabulary.tokens_[static_cast<size_t>(id)];
    if (slot)
      return bad_input("{}: id {} must belong to one token (got \"{}\" and \"{}\").", file, id,
                       *slot, token);
    slot = std::move(token);
    if (!vocabulary.ids_.emplace(*slot, static_cast<int32_t>(id)).second)
      return bad_input("{}: token \"{}\" must stand once (got it twice).", file, *slot);
  }
  return vocabulary;
}

std::optional<int32_t> Vocabulary::id(std::string_view token) const {
  const auto found = ids_.find(token);
  if (found == ids_.end()) return std::nullopt;
  return found->second;
}

std::optional<std::string_view> Vocabulary::token(int32_t id) const {
  if (id < 0 || id >= size() || !tokens_[static_cast<size_t>(id)]) return std::nullopt;
  return *tokens_[static_cast<size_t>(id)];
}

}  // namespace lacuna::io::tokenizer
