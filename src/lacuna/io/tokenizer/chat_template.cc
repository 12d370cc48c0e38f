#include "lacuna/io/tokenizer/chat_template.h"

#include <algorithm>
#include <set>

#include "lacuna/io/file.h"
#include "lacuna/io/tokenizer/characters.h"
#include "lacuna/io/tokenizer/tokenizer_config.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io {
namespace {

namespace fs = std::filesystem;

constexpr const char* kLlama3Bos = "<|begin_of_text|>";

/// All <|...|> of the text.
std::set<std::string, std::less<>> markers_of(std::string_view text) {
  std::set<std::string, std::less<>> markers;
  for (size_t at = 0; (at = text.find("<|", at)) != std::string_view::npos; at += 2) {
    const size_t end = text.find("|>", at);
    if (end != std::string_view::npos) markers.emplace(text.substr(at, end + 2 - at));
  }
  return markers;
}

/// Reads the string literal whose opening quote is at `at`, unescaped; leaves `at` on the closing
/// quote.
std::string read_literal(std::string_view jinja, size_t& at) {
  const char quote = jinja[at];
  std::string literal;
  for (++at; at < jinja.size() && jinja[at] != quote; ++at) {
    if (jinja[at] == '\\' && at + 1 < jinja.size()) {
      const char escaped = jinja[++at];
      literal += escaped == 'n' ? '\n' : escaped == 't' ? '\t' : escaped;
    } else {
      literal += jinja[at];
    }
  }
  return literal;
}

/// Every constant text of a template, in order: string literals inside of {{ }} and {% %}, and what
/// stands outside.
std::vector<std::string> constants_of(std::string_view jinja) {
  std::vector<std::string> constants;
  for (size_t at = 0; at < jinja.size();) {
    size_t open = at;
    while ((open = jinja.find('{', open)) != std::string_view::npos && open + 1 < jinja.size() &&
           std::string_view("{%#").find(jinja[open + 1]) == std::string_view::npos)
      ++open;
    open = std::min(open, jinja.size());
    if (open > at) constants.emplace_back(jinja.substr(at, open - at));
    if (open + 1 >= jinja.size()) break;
    const std::string close = {jinja[open + 1] == '{' ? '}' : jinja[open + 1], '}'};
    for (at = open + 2; at < jinja.size() && !jinja.substr(at).starts_with(close); ++at)
      if (close != "#}" && (jinja[at] == '\'' || jinja[at] == '"'))
        constants.push_back(read_literal(jinja, at));
    at += 2;
  }
  return constants;
}

/// The literal that follows `name =`, or nothing.
std::optional<std::string> assigned_literal(std::string_view jinja, std::string_view name) {
  for (size_t at = 0; (at = jinja.find(name, at)) != std::string_view::npos; at += name.size()) {
    std::string_view rest = jinja.substr(at + name.size());
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    if (!rest.starts_with('=') || rest.starts_with("==")) continue;
    rest.remove_prefix(1);
    rest.remove_prefix(std::min(rest.find_first_not_of(' '), rest.size()));
    size_t quote = 0;
    if (rest.starts_with('\'') || rest.starts_with('"')) return read_literal(rest, quote);
  }
  return std::nullopt;
}

/// ChatML templates write their default either as a whole turn in one literal or into a variable.
std::string chatml_default_system(std::string_view jinja) {
  constexpr std::string_view kOpen = "<|im_start|>system\n", kClose = "<|im_end|>";
  for (const std::string& text : constants_of(jinja)) {
    const size_t open = text.find(kOpen);
    if (open == std::string::npos) continue;
    const size_t begin = open + kOpen.size(), close = text.find(kClose, begin);
    if (close != std::string::npos) return text.substr(begin, close - begin);
  }
  return assigned_literal(jinja, "system_message").value_or("");
}

std::string trim(std::string_view text) {
  text.remove_prefix(tokenizer::leading_space_bytes(text));
  text.remove_suffix(tokenizer::trailing_space_bytes(text));
  return std::string(text);
}

}  // namespace

Result<ChatTemplate> ChatTemplate::open(const fs::path& folder) {
  LACUNA_TRY(const auto config, tokenizer::TokenizerConfig::read(folder));
  const std::string bos = config.bos.value_or(""), eos = config.eos.value_or("");
  const fs::path jinja_path = folder / "chat_template.jinja";
  std::error_code ignored;
  if (fs::exists(jinja_path, ignored)) {
    LACUNA_TRY(const std::string jinja, read_text(jinja_path));
    return parse(jinja, bos, eos, jinja_path.string());
  }
  if (config.chat_template)
    return parse(*config.chat_template, bos, eos, (folder / "tokenizer_config.json").string());
  return bad_input(
      "{}: no chat template found (need chat_template.jinja, or chat_template in "
      "tokenizer_config.json).",
      folder.string());
}

Result<ChatTemplate> ChatTemplate::parse(std::string_view jinja, std::string_view bos,
                                         std::string_view eos, const std::string& file) {
  const auto markers = markers_of(jinja);
  const auto has = [&](std::string_view what) {
    return jinja.find(what) != std::string_view::npos;
  };
  const auto only = [&](const std::set<std::string, std::less<>>& known) {
    return std::includes(known.begin(), known.end(), markers.begin(), markers.end());
  };
  ChatTemplate chat;
  chat.eos_ = eos;
  if (has("bos_token")) chat.bos_ = bos;
  chat.trims_ = has("| trim") || has("|trim") || has(".strip()");
  // Reasoning models rewrite earlier answers: no plain ChatML.
  if (markers.contains("<|im_start|>") && markers.contains("<|im_end|>") && !has("think") &&
      only({"<|im_start|>", "<|im_end|>", "<|endoftext|>"})) {
    chat.kind_ = Kind::kChatMl;
    chat.default_system_ = chatml_default_system(jinja);
    return chat;
  }
  if (markers.contains("<|start_header_id|>") && markers.contains("<|end_header_id|>") &&
      markers.contains("<|eot_id|>") &&
      only({kLlama3Bos, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>",
            "<|python_tag|>"})) {
    chat.kind_ = Kind::kLlama3;
    if (markers.contains(kLlama3Bos)) chat.bos_ = kLlama3Bos;  // spelled out
    for (const std::string& text : constants_of(jinja))
      if (text.starts_with("Cutting Knowledge Date:"))
        chat.system_preamble_ =
            text + "Today Date: " + assigned_literal(jinja, "date_string").value_or("") + "\n\n";
    return chat;
  }
  if (has("[INST]") && has("<<SYS>>") && markers.empty()) {
    chat.kind_ = Kind::kLlama2;
    return chat;
  }
  return bad_input(
      "{}: the chat template must be of a known kind: ChatML, Llama-3, Llama-2 (got \"{}...\").",
      file, tokenizer::to_valid_utf8(jinja.substr(0, 80)));
}

std::string_view ChatTemplate::kind() const {
  switch (kind_) {
    case Kind::kChatMl:
      return "ChatML";
    case Kind::kLlama3:
      return "Llama-3";
    case Kind::kLlama2:
      return "Llama-2";
  }
  return "";
}

std::string ChatTemplate::render(const std::vector<ChatMessage>& messages) const {
  switch (kind_) {
    case Kind::kChatMl:
      return render_chatml(messages);
    case Kind::kLlama3:
      return render_llama3(messages);
    case Kind::kLlama2:
      return render_llama2(messages);
  }
  return "";
}

std::string ChatTemplate::content_of(const ChatMessage& message) const {
  return trims_ ? trim(message.content) : message.content;
}

std::string ChatTemplate::render_chatml(const std::vector<ChatMessage>& messages) const {
  std::string text = bos_;
  const auto turn = [&](std::string_view role, std::string_view content) {
    text += fmt::format("<|im_start|>{}\n{}<|im_end|>\n", role, content);
  };
  const bool own_system = !messages.empty() && messages[0].role == "system";
  if (!own_system && !default_system_.empty()) turn("system", default_system_);
  for (const ChatMessage& message : messages) turn(message.role, content_of(message));
  return text + "<|im_start|>assistant\n";
}

std::string ChatTemplate::render_llama3(const std::vector<ChatMessage>& messages) const {
  std::string text = bos_;
  const auto header = [](std::string_view role) {
    return fmt::format("<|start_header_id|>{}<|end_header_id|>\n\n", role);
  };
  size_t first = 0;
  if (!system_preamble_.empty()) {  // a system turn in any case
    text += header("system") + system_preamble_;
    if (!messages.empty() && messages[0].role == "system") text += content_of(messages[first++]);
    text += "<|eot_id|>";
  }
  for (size_t i = first; i < messages.size(); ++i)
    text += header(messages[i].role) + content_of(messages[i]) + "<|eot_id|>";
  return text + header("assistant");
}

std::string ChatTemplate::render_llama2(const std::vector<ChatMessage>& messages) const {
  std::string text, system;
  for (const ChatMessage& message : messages) {
    if (message.role == "system") {  // goes into the first user turn
      system = fmt::format("<<SYS>>\n{}\n<</SYS>>\n\n", message.content);
    } else if (message.role == "user") {
      text += fmt::format("{}[INST] {} [/INST]", bos_, trim(system + message.content));
      system.clear();
    } else {
      text += fmt::format(" {} {}", trim(message.content), eos_);
    }
  }
  return text;
}

}  // namespace lacuna::io
