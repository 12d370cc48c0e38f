// tokenizer_config.json: what a model's own settings add to its tokenizer files.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/tokenizer/pipeline.h"

namespace lacuna::io::tokenizer {

struct TokenizerConfig {
  std::string tokenizer_class;  ///< "Qwen2Tokenizer"
  std::optional<std::string> bos, eos;
  std::optional<bool> add_bos, add_eos, add_prefix_space;
  std::vector<AddedToken> added;             ///< added_tokens_decoder
  std::vector<std::string> specials;         ///< what bos_token ... additional_special_tokens name
  std::optional<std::string> chat_template;  ///< of several the one named "default"

  /// Reads tokenizer_config.json of a model's folder; all defaults where there is none.
  /// @errors as parse()
  static Result<TokenizerConfig> read(const std::filesystem::path& folder);
  /// @param json  the file's text; empty: all defaults
  /// @errors kBadInput: not JSON, or a known key of the wrong kind
  static Result<TokenizerConfig> parse(std::string_view json, const std::string& file);

  /// The added tokens, and those tokens of the vocabulary that are named as special.
  std::vector<AddedToken> added_tokens(const Vocabulary& vocabulary) const;
};

/// Appends the tokens of `extra` that are not there yet (by spelling).
void merge_added(std::vector<AddedToken>& tokens, const std::vector<AddedToken>& extra);

/// What holds for every kind of tokenizer file: the configured bos and eos, and whether text gets
/// them. An explicit add_bos_token or add_eos_token wins over the file's own post-processor.
/// @errors kBadInput: a bos or eos that is not a token
Status apply_config(const TokenizerConfig& config, const std::string& file, PipelineParts& parts);

}  // namespace lacuna::io::tokenizer
