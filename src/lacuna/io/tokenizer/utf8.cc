#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

using Kind = Utf8Step::Kind;

/// The range of the second byte decides overlong forms, surrogates and the end of Unicode (Unicode
/// standard, table 3-7).
struct Lead {
  size_t length = 0;  // 0: can't start a character
  unsigned char low = 0x80, high = 0xBF;
};

Lead classify(unsigned char byte) {
  if (byte < 0x80) return {1};
  if (byte < 0xC2) return {0};
  if (byte < 0xE0) return {2};
  if (byte == 0xE0) return {3, 0xA0, 0xBF};
  if (byte == 0xED) return {3, 0x80, 0x9F};
  if (byte < 0xF0) return {3};
  if (byte == 0xF0) return {4, 0x90, 0xBF};
  if (byte < 0xF4) return {4};
  if (byte == 0xF4) return {4, 0x80, 0x8F};
  return {0};
}

}  // namespace

Utf8Step utf8_step(std::string_view text, size_t at) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[at + i]); };
  const Lead lead = classify(byte(0));
  if (lead.length == 0) return {0, 1, Kind::kIllFormed};
  if (lead.length == 1) return {byte(0), 1, Kind::kValid};
  uint32_t code_point = byte(0) & (0x7Fu >> lead.length);
  for (size_t i = 1; i < lead.length; ++i) {
    if (at + i == text.size()) return {0, i, Kind::kTruncated};
    const unsigned char low = i == 1 ? lead.low : 0x80, high = i == 1 ? lead.high : 0xBF;
    if (byte(i) < low || byte(i) > high) return {0, i, Kind::kIllFormed};
    code_point = code_point << 6 | (byte(i) & 0x3Fu);
  }
  return {code_point, lead.length, Kind::kValid};
}

bool is_valid_utf8(std::string_view text) {
  for (size_t at = 0; at < text.size();) {
    const Utf8Step step = utf8_step(text, at);
    if (step.kind != Kind::kValid) return false;
    at += step.size;
  }
  return true;
}

std::string to_valid_utf8(std::string_view bytes) {
  std::string out;
  out.reserve(bytes.size());
  for (size_t at = 0; at < bytes.size();) {
    const Utf8Step step = utf8_step(bytes, at);
    out += step.kind == Kind::kValid ? bytes.substr(at, step.size) : kReplacement;
    at += step.size;
  }
  return out;
}

size_t truncated_tail_bytes(std::string_view bytes) {
  for (size_t back = 1; back <= 3 && back <= bytes.size(); ++back) {
    const Utf8Step step = utf8_step(bytes, bytes.size() - back);
    if (step.kind == Kind::kTruncated && step.size == back) return back;
  }
  return 0;
}

}  // namespace lacuna::io::tokenizer
