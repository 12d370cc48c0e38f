// Token spellings and their ids.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::io::tokenizer {

/// Ids above this are refused: tables are indexed by id, so that a corrupt one would ask for much
/// memory. (The largest vocabularies have some 260,000 tokens.)
inline constexpr int64_t kMaxTokenId = (int64_t{1} << 21) - 1;

class Vocabulary {
 public:
  /// @errors kBadInput: an id out of [0, kMaxTokenId] or used twice; a token that stands twice or
  /// isn't UTF-8
  static Result<Vocabulary> create(std::vector<std::pair<std::string, int64_t>> entries,
                                   const std::string& file);
  Vocabulary() = default;
  Vocabulary(Vocabulary&&) = default;
  Vocabulary& operator=(Vocabulary&&) = default;
  Vocabulary(const Vocabulary&) = delete;  // ids_ refers into tokens_
  Vocabulary& operator=(const Vocabulary&) = delete;

  std::optional<int32_t> id(std::string_view token) const;
  /// Nothing for an id that is out of range or was left out.
  std::optional<std::string_view> token(int32_t id) const;
  /// The highest id + 1.
  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

 private:
  std::vector<std::optional<std::string>> tokens_;
  std::unordered_map<std::string_view, int32_t> ids_;
};

}  // namespace lacuna::io::tokenizer
