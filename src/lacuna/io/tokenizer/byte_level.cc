#include "lacuna/io/tokenizer/byte_level.h"

#include <array>

#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io::tokenizer {
namespace {

constexpr uint32_t kMappedEnd = 0x100 + 68;

struct Map {
  std::array<std::string, 256> text;      // byte -> UTF-8 of its code point
  std::array<int, kMappedEnd> byte_of{};  // code point -> byte, or -1
};

const Map& map() {
  static const Map built = [] {
    Map m;
    m.byte_of.fill(-1);
    uint32_t next = 0x100;
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const bool itself =
          (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
      const uint32_t code_point = itself ? byte : next++;
      m.byte_of[code_point] = static_cast<int>(byte);
      if (code_point < 0x80) {
        m.text[byte].push_back(static_cast<char>(code_point));
      } else {
        m.text[byte].push_back(static_cast<char>(0xC0 | code_point >> 6));
        m.text[byte].push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
      }
    }
    return m;
  }();
  return built;
}

}  // namespace

void append_byte_level(std::string_view bytes, std::string& out) {
  const Map& m = map();
  for (const char c : bytes) out += m.text[static_cast<unsigned char>(c)];
}

std::optional<std::string> from_byte_level(std::string_view mapped) {
  const Map& m = map();
  std::string bytes;
  for (size_t at = 0; at < mapped.size();) {
    const Utf8Step step = utf8_step(mapped, at);
    if (step.kind != Utf8Step::Kind::kValid || step.code_point >= kMappedEnd) return std::nullopt;
    const int byte = m.byte_of[step.code_point];
    if (byte < 0) return std::nullopt;
    bytes += static_cast<char>(byte);
    at += step.size;
  }
  return bytes;
}

}  // namespace lacuna::io::tokenizer
