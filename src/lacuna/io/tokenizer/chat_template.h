// Chat prompts: a model's own template, recognised by its fingerprint.
#pragma once

#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::io {

struct ChatMessage {
  std::string role;  ///< "system", "user", "assistant"
  std::string content;
};

/// A chat template of a known kind: ChatML (Qwen2, SmolLM2), Llama-3, Llama-2. The Jinja text is
/// not run: the kind follows from the markers in it, and the default system message, the trimming
/// and the BOS are read from it.
class ChatTemplate {
 public:
  /// Reads chat_template.jinja or the key chat_template of tokenizer_config.json.
  /// @errors kBadInput: none there; a template of unknown kind (named by its first characters)
  static Result<ChatTemplate> open(const std::filesystem::path& folder);
  /// The same from the template's text.
  static Result<ChatTemplate> parse(std::string_view jinja, std::string_view bos,
                                    std::string_view eos, const std::string& file);
  /// The prompt text up to where the assistant answers; the template's default system message is
  /// put first where the template does so. Encode it with add_special = false.
  /// Templates that ask for today's date get the fixed date they hold for machines without a clock.
  std::string render(const std::vector<ChatMessage>& messages) const;
  /// "ChatML", "Llama-3", "Llama-2"
  std::string_view kind() const;

 private:
  enum class Kind { kChatMl, kLlama3, kLlama2 };
  std::string content_of(const ChatMessage& message) const;
  std::string render_chatml(const std::vector<ChatMessage>& messages) const;
  std::string render_llama3(const std::vector<ChatMessage>& messages) const;
  std::string render_llama2(const std::vector<ChatMessage>& messages) const;

  Kind kind_ = Kind::kChatMl;
  std::string default_system_, bos_, eos_;
  std::string system_preamble_;  ///< what Llama 3.1 puts before every system message
  bool trims_ = false;           ///< white space around a message's content goes
};

}  // namespace lacuna::io
