// Byte-pair encoding: symbols of a piece are merged, lowest rank first and then leftmost, until no
// merge applies.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/tokenizer/model.h"
#include "lacuna/io/tokenizer/vocabulary.h"

namespace lacuna::io::tokenizer {

/// Pair of token ids -> rank and id of the merged token; open addressing, built once.
class MergeTable {
 public:
  struct Merge {
    uint32_t rank = 0;
    int32_t id = -1;  ///< -1: the pair doesn't merge
  };
  explicit MergeTable(size_t merges = 0);
  /// A pair given twice keeps its later rank, as in Hugging Face's reader.
  void insert(int32_t left, int32_t right, Merge merge);
  Merge find(int32_t left, int32_t right) const;

 private:
  struct Slot {
    uint64_t pair = 0;
    Merge merge;
  };
  size_t slot_of(uint64_t pair) const;
  std::vector<Slot> slots_;
};

/// Two tokens that become one; of several possible merges the lowest rank goes first.
struct MergeRule {
  std::string left, right;
  uint32_t rank = 0;
};

/// Reads "left right"; nothing unless exactly one space parts two texts.
std::optional<MergeRule> parse_merge(std::string_view line, uint32_t rank);

struct BpeOptions {
  std::optional<int32_t>
      unknown;  ///< id for characters that are not in the vocabulary; without it they are dropped
  bool fuse_unknown = false;  ///< one unknown token for a run of them
  bool byte_fallback =
      false;  ///< such characters become the tokens <0xHH> of their bytes, if all exist
  bool ignore_merges = false;  ///< a piece that is itself a token is taken whole
};

class Bpe final : public Model {
 public:
  /// @errors kBadInput: a merge whose parts or whole are not in the vocabulary (its number and text
  /// named)
  static Result<std::shared_ptr<const Bpe>> create(Vocabulary vocabulary,
                                                   const std::vector<MergeRule>& merges,
                                                   BpeOptions options, const std::string& file);

  /// @cost O(n log n) for a piece of n characters
  void encode(const Pieces& pieces, std::vector<int32_t>& ids) const override;
  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  struct Workspace;
  void add_characters(std::string_view piece, Workspace& work) const;
  void merge(Workspace& work) const;

  Vocabulary vocabulary_;
  MergeTable merges_;
  BpeOptions options_;
  std::optional<std::array<int32_t, 256>> byte_tokens_;  // present when all 256 <0xHH> are
};

}  // namespace lacuna::io::tokenizer
