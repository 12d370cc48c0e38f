#include "lacuna/io/tokenizer/normalizer.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdlib>
#include <memory>

namespace lacuna::io::tokenizer {
namespace {

std::string apply(UnicodeForm form, std::string text) {
  // ASCII is its own normal form in all four.
  if (std::all_of(text.begin(), text.end(),
                  [](char c) { return static_cast<signed char>(c) >= 0; }))
    return text;
  int options = UTF8PROC_STABLE;
  options |= form == UnicodeForm::kNfc || form == UnicodeForm::kNfkc ? UTF8PROC_COMPOSE
                                                                     : UTF8PROC_DECOMPOSE;
  if (form == UnicodeForm::kNfkc || form == UnicodeForm::kNfkd) options |= UTF8PROC_COMPAT;
  utf8proc_uint8_t* raw = nullptr;
  const utf8proc_ssize_t size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                             static_cast<utf8proc_ssize_t>(text.size()), &raw,
                                             static_cast<utf8proc_option_t>(options));
  const std::unique_ptr<utf8proc_uint8_t, decltype(&std::free)> owned(raw, &std::free);
  if (size < 0) return text;  // only for invalid UTF-8, which never gets here
  return {reinterpret_cast<const char*>(raw), static_cast<size_t>(size)};
}

std::string apply(const Prepend& step, std::string text) {
  return text.empty() ? text : step.text + text;
}

std::string apply(const Replace& step, std::string text) {
  return step.pattern.replace_all(text, step.content);
}

}  // namespace

std::string normalize(const std::vector<Normalizer>& steps, std::string_view text) {
  std::string out(text);
  for (const Normalizer& step : steps)
    out = std::visit([&](const auto& s) { return apply(s, std::move(out)); }, step);
  return out;
}

}  // namespace lacuna::io::tokenizer
