// What turns pieces of text into ids: byte-pair merges, or SentencePiece.
#pragma once

#include <cstdint>
#include <vector>

#include "lacuna/io/tokenizer/pre_tokenizer.h"
#include "lacuna/io/tokenizer/vocabulary.h"

namespace lacuna::io::tokenizer {

/// Thread-safe for reading.
class Model {
 public:
  virtual ~Model() = default;
  /// Appends the ids of the pieces, one after the other.
  virtual void encode(const Pieces& pieces, std::vector<int32_t>& ids) const = 0;
  virtual const Vocabulary& vocabulary() const = 0;
};

}  // namespace lacuna::io::tokenizer
