// The one tokenizer class: every file format is read into these parts.
#pragma once

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/io/tokenizer/added_tokens.h"
#include "lacuna/io/tokenizer/model.h"
#include "lacuna/io/tokenizer/normalizer.h"
#include "lacuna/io/tokenizer/pre_tokenizer.h"
#include "lacuna/io/tokenizer/token_decoder.h"
#include "lacuna/io/tokenizer/tokenizer.h"

namespace lacuna::io::tokenizer {

/// text -> added tokens cut out of the raw text -> normaliser -> added tokens cut out of the
/// normalised text
///      -> pieces -> model -> ids between prefix and suffix
struct PipelineParts {
  std::shared_ptr<const Model> model;
  AddedTokens added;
  std::vector<Normalizer> normalizer;
  std::vector<PreTokenizer> pre_tokenizer;
  std::vector<int32_t> prefix, suffix;  ///< what add_special puts around the text
  std::vector<TokenDecoder> decoder;
  std::optional<int32_t> bos, eos;
};

class Pipeline final : public Tokenizer {
 public:
  explicit Pipeline(PipelineParts parts) : parts_(std::move(parts)) {}
  std::vector<int32_t> encode(std::string_view text, bool add_special) const override;
  std::string decode(const std::vector<int32_t>& ids, bool skip_special) const override;
  std::string decode_certain(const std::vector<int32_t>& ids, bool skip_special) const override;
  int64_t vocab_size() const override;
  std::optional<int32_t> token_id(std::string_view token) const override;
  std::optional<int32_t> bos() const override { return parts_.bos; }
  std::optional<int32_t> eos() const override { return parts_.eos; }

 private:
  std::vector<std::string> spellings(const std::vector<int32_t>& ids, bool skip_special) const;
  PipelineParts parts_;
};

}  // namespace lacuna::io::tokenizer
