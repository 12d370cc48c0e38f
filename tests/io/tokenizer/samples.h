// The tokenizers that tests try things on, and texts to try.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "io/sample_model.h"
#include "lacuna/io/file.h"
#include "lacuna/io/tokenizer/huggingface.h"
#include "lacuna/io/tokenizer/normalizer.h"
#include "lacuna/io/tokenizer/sentencepiece.h"
#include "lacuna/io/tokenizer/tokenizer.h"
#include "lacuna/io/tokenizer/utf8.h"
#include "support/data.h"

namespace lacuna::io {

using TokenizerPointer = std::shared_ptr<const Tokenizer>;

/// Built with sanitizers, which say nothing of speed.
inline bool sanitized() { return std::getenv("LACUNA_SANITIZED") != nullptr; }

/// tests/golden/tokenizers/cases.json
inline const nlohmann::json& golden() {
  static const auto read = nlohmann::json::parse(
      read_text(lacuna::testing::source_folder() / "tests/golden/tokenizers/cases.json").value());
  return read;
}

inline TokenizerPointer open_sentencepiece(const std::filesystem::path& path) {
  return tokenizer::parse_sentencepiece(read_text(path).value(), {}, path.string()).value();
}

/// A file name of its own where a folder holds more than one kind of tokenizer.
inline TokenizerPointer open_tokenizer(const std::filesystem::path& path) {
  if (path.extension() == ".model" && path.parent_path().filename() != "llama3")
    return open_sentencepiece(path);
  return Tokenizer::open(std::filesystem::is_directory(path) ? path : path.parent_path()).value();
}

/// One tokenizer of each kind: where it is, and what its normaliser makes of a text that is decoded
/// again.
struct Kind {
  std::string name, path;  ///< path in the data folder; empty: the model in examples/
  std::function<std::string(std::string)> normalized;
  std::filesystem::path file() const {
    return path.empty() ? lacuna::testing::source_folder() / "examples/demo-model"
                        : lacuna::testing::data_path(path);
  }
};
inline void PrintTo(const Kind& kind, std::ostream* out) { *out << kind.name; }

inline std::vector<Kind> all_kinds() {
  const auto same = [](std::string text) { return text; };
  const auto nfc = [](std::string text) {
    return tokenizer::normalize({tokenizer::UnicodeForm::kNfc}, text);
  };
  const auto spaces = [](const std::string& text) {  // a space is written as U+2581
    return tokenizer::Pattern::literal("\xE2\x96\x81").replace_all(text, " ");
  };
  const auto single_spaces = [spaces](const std::string& text) {  // and none at the ends
    std::string single;
    for (const char c : text)
      if (c != ' ' || (!single.empty() && single.back() != ' ')) single += c;
    single = spaces(single);
    while (single.ends_with(' ')) single.pop_back();
    return single;
  };
  return {{"demo", "", same},
          {"lab", "models/lab-16m", same},
          {"gpt2", "tokenizers/gpt2", same},
          {"qwen2", "tokenizers/qwen2", nfc},
          {"llama3_tiktoken", "tokenizers/llama3/tokenizer.model", same},
          {"llama2_json", "tokenizers/llama2", spaces},
          {"llama2_sentencepiece", "tokenizers/llama2/tokenizer.model", spaces},
          {"stories_sentencepiece", "models/stories260K/tok512.model", single_spaces},
          {"dolma2", "tokenizers/dolma2", same}};
}

/// Tests of every kind: TEST_P with `tokenizer()`, which skips by name where the data is missing.
class EveryKind : public ::testing::TestWithParam<Kind> {
 protected:
  void SetUp() override {
    const auto file = GetParam().file();
    if (file.empty()) GTEST_SKIP() << "test data missing: " << GetParam().path;
    tokenizer_ = open_tokenizer(file);
  }
  const TokenizerPointer& tokenizer() const { return tokenizer_; }

 private:
  TokenizerPointer tokenizer_;
};
#define LACUNA_EVERY_KIND(suite)                                                \
  INSTANTIATE_TEST_SUITE_P(Tokenizers, suite, ::testing::ValuesIn(all_kinds()), \
                           [](const auto& test) { return test.param.name; })

inline void append_utf8(uint32_t c, std::string& text) {
  const auto put = [&](uint32_t byte) { text += static_cast<char>(byte); };
  if (c < 0x80) {
    put(c);
  } else if (c < 0x800) {
    put(0xC0 | c >> 6), put(0x80 | (c & 0x3F));
  } else if (c < 0x10000) {
    put(0xE0 | c >> 12), put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  } else {
    put(0xF0 | c >> 18), put(0x80 | (c >> 12 & 0x3F));
    put(0x80 | (c >> 6 & 0x3F)), put(0x80 | (c & 0x3F));
  }
}

/// A random text: letters, digits, white space, marks, and any code points of Unicode.
inline std::string random_text(std::mt19937_64& random, size_t max_characters) {
  const auto below = [&](uint64_t n) { return static_cast<uint32_t>(random() % n); };
  std::string text;
  for (size_t left = below(max_characters + 1); left > 0; --left) {
    uint32_t c = 0;
    switch (below(8)) {
      case 0:
        c = below(0x80);
        break;
      case 1:
        c = U" \n\t\r\u00A0\u3000\u2028\u0085"[below(8)];
        break;
      case 2:
        c = U"0123\u0663\u00BD'sST\u017F"[below(11)];
        break;
      case 3:
        c = 0x300 + below(0x70);
        break;
      case 4:
        c = below(0x800);
        break;
      case 5:
        c = below(0x110000);
        break;
      default:
        c = 'a' + below(26);
    }
    append_utf8(c >= 0xD800 && c < 0xE000 ? 0x2581 : c, text);
  }
  return text;
}

/// Streams the ids: what is certain comes out at once, in whole characters, and all of it in the
/// end.
inline void expect_streams(const TokenizerPointer& tokenizer, const std::vector<int32_t>& ids,
                           bool skip_special) {
  StreamDecoder stream(tokenizer, skip_special);
  std::string streamed;
  std::vector<int32_t> pushed;
  const auto take = [&](const std::string& part) {
    ASSERT_TRUE(tokenizer::is_valid_utf8(part)) << ::testing::PrintToString(ids);
    streamed += part;
  };
  for (const int32_t id : ids) {
    take(stream.push(id));
    pushed.push_back(id);
    ASSERT_EQ(streamed, tokenizer->decode_certain(pushed, skip_special));
  }
  take(stream.finish());
  ASSERT_EQ(streamed, tokenizer->decode(ids, skip_special)) << ::testing::PrintToString(ids);
}

}  // namespace lacuna::io
