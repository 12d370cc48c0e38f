// Tokens that are found in the text as written, before anything else is done with it.
#pragma once

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/tokenizer/normalizer.h"
#include "lacuna/io/tokenizer/vocabulary.h"

namespace lacuna::io::tokenizer {

struct AddedToken {
  std::string content;
  int64_t id = 0;
  bool special = false;  ///< left out by decode(skip_special)
  bool normalized =
      false;  ///< sought in the normalised text (in normalised spelling) instead of the raw text
  bool left_strip = false;   ///< takes the white space before it
  bool right_strip = false;  ///< takes the white space behind it
  bool single_word = false;  ///< counts only where no word character touches it
};

/// A piece of text, or an added token found in it.
struct Segment {
  std::string_view text;
  std::optional<int32_t> id;
};

class AddedTokens {
 public:
  /// A token whose spelling is in the model's vocabulary must carry the vocabulary's id; others
  /// must have ids of their own.
  /// @errors kBadInput: an id out of range, taken by another token, or not the vocabulary's
  static Result<AddedTokens> create(std::vector<AddedToken> tokens, const Vocabulary& vocabulary,
                                    const std::vector<Normalizer>& normalizer,
                                    const std::string& file);

  /// Cuts out the tokens (leftmost, then longest). @param normalized  which of the two sets to seek
  std::vector<Segment> split(std::string_view text, bool normalized) const;
  std::optional<int32_t> id(std::string_view token) const;
  const AddedToken* find(int32_t id) const;
  int64_t end_id() const { return end_id_; }  ///< the highest id + 1

 private:
  /// Spellings by byte; finds the longest that starts at a place.
  struct Trie {
    struct Node {
      std::vector<std::pair<unsigned char, uint32_t>> next;
      int32_t token = -1;
    };
    std::vector<Node> nodes{1};
    std::array<bool, 256> starts{};
    void insert(std::string_view spelling, int32_t token);
    /// The token and its length in bytes, or -1.
    std::pair<int32_t, size_t> longest(std::string_view text) const;
  };
  std::unordered_map<int32_t, AddedToken> tokens_;
  std::unordered_map<std::string, int32_t> ids_;
  Trie raw_, normalized_;
  int64_t end_id_ = 0;
};

}  // namespace lacuna::io::tokenizer
