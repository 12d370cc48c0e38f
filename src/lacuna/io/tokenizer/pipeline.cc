#include "lacuna/io/tokenizer/pipeline.h"

#include <algorithm>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {

std::vector<int32_t> Pipeline::encode(std::string_view text, bool add_special) const {
  std::string repaired;
  if (!is_valid_utf8(text)) text = repaired = to_valid_utf8(text);
  std::vector<int32_t> ids;
  if (add_special) ids = parts_.prefix;
  for (const Segment& raw : parts_.added.split(text, false)) {
    if (raw.id) {
      ids.push_back(*raw.id);
      continue;
    }
    const std::string normalized = normalize(parts_.normalizer, raw.text);
    for (const Segment& segment : parts_.added.split(normalized, true)) {
      if (segment.id) {
        ids.push_back(*segment.id);
      } else {
        parts_.model->encode(pre_tokenize(parts_.pre_tokenizer, std::string(segment.text)), ids);
      }
    }
  }
  if (add_special) ids.insert(ids.end(), parts_.suffix.begin(), parts_.suffix.end());
  return ids;
}

std::vector<std::string> Pipeline::spellings(const std::vector<int32_t>& ids,
                                             bool skip_special) const {
  std::vector<std::string> tokens;
  tokens.reserve(ids.size());
  for (const int32_t id : ids) {
    if (const AddedToken* added = parts_.added.find(id)) {
      if (!(skip_special && added->special)) tokens.push_back(added->content);
    } else if (const auto token = parts_.model->vocabulary().token(id)) {
      tokens.emplace_back(*token);
    }
  }
  return tokens;
}

std::string Pipeline::decode(const std::vector<int32_t>& ids, bool skip_special) const {
  return decode_tokens(parts_.decoder, spellings(ids, skip_special), false);
}

std::string Pipeline::decode_certain(const std::vector<int32_t>& ids, bool skip_special) const {
  return decode_tokens(parts_.decoder, spellings(ids, skip_special), true);
}

int64_t Pipeline::vocab_size() const {
  return std::max(parts_.model->vocabulary().size(), parts_.added.end_id());
}

std::optional<int32_t> Pipeline::token_id(std::string_view token) const {
  if (const auto id = parts_.added.id(token)) return id;
  return parts_.model->vocabulary().id(token);
}

}  // namespace lacuna::io::tokenizer
