#define PCRE2_CODE_UNIT_WIDTH 8
#include "lacuna/io/tokenizer/pattern.h"

#include <pcre2.h>

#include <algorithm>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

/// Oniguruma's \s is the property White_Space; PCRE2's also takes U+180E. The other escapes listed
/// below mean different sets in the two dialects and no published tokenizer uses them.
Result<std::string> translate(std::string_view text, const std::string& file) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\\' || i + 1 == text.size()) {
      out += text[i];
      continue;
    }
    const char escape = text[++i];
    if (escape == 's') {
      out += "\\p{White_Space}";
    } else if (escape == 'S') {
      out += "\\P{White_Space}";
    } else if (std::string_view("wWbBhHRXKGQEcCgk").find(escape) != std::string_view::npos) {
      return bad_input(
          "{}: pattern \"{}\" must use escapes of one meaning in all dialects (got \\{}). Write "
          "the set out.",
          file, text, escape);
    } else {
      out += {'\\', escape};
    }
  }
  return out;
}

/// Room for one search through a text of `size` bytes.
struct Search {
  Search(const pcre2_code* code, size_t size)
      : data(pcre2_match_data_create_from_pattern(code, nullptr)),
        context(pcre2_match_context_create(nullptr)) {
    // PCRE2's own limit of 10 million steps would end a search through as many spaces, where
    // \s*[\r\n]+ steps back over each.
    constexpr size_t kSteps = 10'000'000, kStepsPerByte = 32;
    const size_t limit = std::min<size_t>(kSteps + kStepsPerByte * size, UINT32_MAX);
    if (context != nullptr) pcre2_set_match_limit(context, static_cast<uint32_t>(limit));
  }
  Search(const Search&) = delete;
  Search& operator=(const Search&) = delete;
  ~Search() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
  }
  pcre2_match_data* data;
  pcre2_match_context* context;
};

}  // namespace

Result<Pattern> Pattern::regex(std::string_view text, const std::string& file) {
  LACUNA_TRY(const std::string translated, translate(text, file));
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code =
      pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                    PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (code == nullptr) {
    PCRE2_UCHAR reason[256] = {};
    pcre2_get_error_message(error, reason, sizeof reason);
    return bad_input("{}: pattern \"{}\" must be a regular expression (got \"{}\" at its byte {}).",
                     file, text, reinterpret_cast<const char*>(reason), offset);
  }
  // Where the JIT is not available, matching falls back to the interpreter by itself.
  pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  Pattern pattern;
  pattern.code_ = std::shared_ptr<const void>(code, [](const void* held) {
    pcre2_code_free(static_cast<pcre2_code*>(const_cast<void*>(held)));
  });
  return pattern;
}

Pattern Pattern::literal(std::string text) {
  Pattern pattern;
  pattern.literal_ = std::move(text);
  return pattern;
}

std::vector<Span> Pattern::find_all(std::string_view text) const {
  std::vector<Span> found;
  if (code_ == nullptr) {
    if (literal_.empty()) return found;
    for (size_t at = 0; (at = text.find(literal_, at)) != std::string_view::npos;
         at += literal_.size())
      found.push_back({at, at + literal_.size()});
    return found;
  }
  const auto* code = static_cast<const pcre2_code*>(code_.get());
  const Search search(code, text.size());
  if (search.data == nullptr) return found;
  const auto* subject = reinterpret_cast<PCRE2_SPTR>(text.data());
  for (size_t at = 0; at <= text.size();) {
    const auto match = [&](uint32_t options) {
      return pcre2_match(code, subject, text.size(), at, PCRE2_NO_UTF_CHECK | options, search.data,
                         search.context);
    };
    int count = match(0);
    if (count == PCRE2_ERROR_JIT_STACKLIMIT)  // the interpreter's stack grows on the heap
      count = match(PCRE2_NO_JIT);
    if (count < 0) break;
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(search.data);
    const Span span{range[0], range[1]};
    if (span.begin == span.end && !found.empty() && found.back().end == span.end) {
      if (at == text.size()) break;
      at += utf8_length(text[at]);  // an empty match right behind a match doesn't count
      continue;
    }
    found.push_back(span);
    at = span.end;
  }
  return found;
}

std::string Pattern::replace_all(std::string_view text, std::string_view with) const {
  std::string out;
  size_t at = 0;
  for (const Span& span : find_all(text)) {
    out += text.substr(at, span.begin - at);
    out += with;
    at = span.end;
  }
  out += text.substr(at);
  return out;
}

}  // namespace lacuna::io::tokenizer
