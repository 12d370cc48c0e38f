// GGUF files made in memory, sound ones and broken ones.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "io/sample_model.h"
#include "lacuna/io/gguf/gguf.h"

namespace lacuna::io {

template <class T>
std::string raw(T value) {
  return std::string(reinterpret_cast<const char*>(&value), sizeof(value));
}

/// Text as GGUF writes it: its length before it.
inline std::string gguf_text(std::string_view text) {
  return raw(static_cast<uint64_t>(text.size())) + std::string(text);
}

template <class T>
std::string raw_list(const std::vector<T>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(T));
}

/// Collects keys and tensors and puts a file together. Keys keep their order; setting one again
/// replaces it.
class GgufBuilder {
 public:
  uint32_t version = 3;
  uint64_t alignment = 32;

  // Numbers of the value types.
  static constexpr uint32_t kUint32 = 4, kInt32 = 5, kFloat32 = 6, kBool = 7, kString = 8,
                            kArray = 9;

  void put(const std::string& key, uint32_t type, std::string value) {
    erase(key);
    keys_.push_back({key, raw(type) + std::move(value)});
  }
  void put(const std::string& key, uint32_t value) { put(key, kUint32, raw(value)); }
  void put(const std::string& key, float value) { put(key, kFloat32, raw(value)); }
  void put(const std::string& key, bool value) {
    put(key, kBool, raw(static_cast<uint8_t>(value)));
  }
  void put(const std::string& key, const char* value) { put(key, kString, gguf_text(value)); }
  void put(const std::string& key, const std::vector<std::string>& values) {
    std::string all;
    for (const std::string& value : values) all += gguf_text(value);
    put_list(key, kString, values.size(), all);
  }
  void put(const std::string& key, const std::vector<int32_t>& values) {
    put_list(key, kInt32, values.size(), raw_list(values));
  }
  void put(const std::string& key, const std::vector<float>& values) {
    put_list(key, kFloat32, values.size(), raw_list(values));
  }
  void put_list(const std::string& key, uint32_t type, uint64_t count, const std::string& values) {
    put(key, kArray, raw(type) + raw(count) + values);
  }
  void erase(const std::string& key) {
    std::erase_if(keys_, [&](const auto& entry) { return entry.first == key; });
  }

  /// Has a key there once more.
  void repeat(const std::string& key) {
    const auto found = std::find_if(keys_.begin(), keys_.end(),
                                    [&](const auto& entry) { return entry.first == key; });
    keys_.push_back(std::pair(*found));
  }

  /// @param shape  row-major, as in GgufTensor
  void add(const std::string& name, const Shape& shape, uint32_t type, std::string bytes) {
    const std::string tail((alignment - (data_.size() + bytes.size()) % alignment) % alignment,
                           '\0');
    const uint64_t begin = data_.size();
    data_ += bytes + tail;
    describe(name, shape, type, begin);
  }
  void add(const std::string& name, const Shape& shape, const std::vector<float>& values) {
    add(name, shape, 0, raw_list(values));
  }
  /// Only the entry in the list of tensors.
  void describe(const std::string& name, const Shape& shape, uint32_t type, uint64_t begin) {
    std::string entry = gguf_text(name) + raw(static_cast<uint32_t>(shape.size()));
    for (size_t i = shape.size(); i-- > 0;) entry += raw(static_cast<uint64_t>(shape[i]));
    tensors_.push_back({name, entry + raw(type) + raw(begin)});
  }
  void erase_tensor(const std::string& name) {
    std::erase_if(tensors_, [&](const auto& entry) { return entry.first == name; });
  }

  std::string bytes() const {
    std::string file = "GGUF" + raw(version) + raw(static_cast<uint64_t>(tensors_.size())) +
                       raw(static_cast<uint64_t>(keys_.size()));
    for (const auto& [key, value] : keys_) file += gguf_text(key) + value;
    for (const auto& [name, entry] : tensors_) file += entry;
    if (!tensors_.empty()) file.append((alignment - file.size() % alignment) % alignment, '\0');
    return file + data_;
  }

 private:
  std::vector<std::pair<std::string, std::string>> keys_, tensors_;
  std::string data_;
};

inline Result<GgufFile> parse_gguf(const std::string& bytes) {
  return GgufFile::parse(Bytes::take(std::vector<char>(bytes.begin(), bytes.end())), "F.gguf");
}
inline Result<GgufFile> parse_gguf(const GgufBuilder& builder) {
  return parse_gguf(builder.bytes());
}

/// A byte-level vocabulary: the 256 bytes, then two words with their merges, then special tokens.
inline void put_byte_level_tokenizer(GgufBuilder& file, const char* pre) {
  std::vector<std::string> tokens;
  std::vector<int32_t> types;
  for (int byte = 0, other = 256; byte < 256; ++byte) {
    const bool itself = (byte >= 33 && byte <= 126) || (byte >= 161 && byte <= 172) || byte >= 174;
    const int code = itself ? byte : other++;
    tokens.push_back(code < 0x80 ? std::string(1, static_cast<char>(code))
                                 : std::string{static_cast<char>(0xC0 | code >> 6),
                                               static_cast<char>(0x80 | (code & 63))});
    types.push_back(1);
  }
  for (const auto& [token, type] :
       {std::pair{"he", 1}, std::pair{"\xC4\xA0he", 1}, std::pair{"<|start|>", 3},
        std::pair{"<|end|>", 3}, std::pair{"<tool>", 4}, std::pair{"[PAD261]", 5}}) {
    tokens.emplace_back(token);
    types.push_back(type);
  }
  file.put("tokenizer.ggml.model", "gpt2");
  file.put("tokenizer.ggml.pre", pre);
  file.put("tokenizer.ggml.tokens", tokens);
  file.put("tokenizer.ggml.token_type", types);
  file.put("tokenizer.ggml.merges", std::vector<std::string>{"h e", "\xC4\xA0 he"});
  file.put("tokenizer.ggml.bos_token_id", uint32_t{258});
  file.put("tokenizer.ggml.eos_token_id", uint32_t{259});
}

/// Sizes of the models below.
struct SmallModel {
  int64_t layers = 2, hidden = 8, inner = 12, heads = 4, kv_heads = 2, head_dim = 2, vocab = 264;
};

/// Values that are all different, so that a row in the wrong place shows.
inline std::vector<float> counted(const Shape& shape, float start) {
  std::vector<float> values(static_cast<size_t>(element_count(shape).value()));
  for (size_t i = 0; i < values.size(); ++i)
    values[i] = start + 0.37f * static_cast<float>(i) * (i % 2 ? -1.0f : 1.0f);
  return values;
}

/// A whole small model of the llama or qwen2 kind, float32, without output matrix.
inline GgufBuilder small_model(const std::string& architecture, const SmallModel& s = {}) {
  GgufBuilder file;
  file.put("general.architecture", architecture.c_str());
  const auto put = [&](const char* key, int64_t value) {
    file.put(architecture + "." + key, static_cast<uint32_t>(value));
  };
  put("block_count", s.layers);
  put("context_length", 64);
  put("embedding_length", s.hidden);
  put("feed_forward_length", s.inner);
  put("attention.head_count", s.heads);
  put("attention.head_count_kv", s.kv_heads);
  file.put(architecture + ".attention.layer_norm_rms_epsilon", 1e-5f);
  file.put(architecture + ".rope.freq_base", 10000.0f);
  put_byte_level_tokenizer(file, "qwen2");
  const int64_t q = s.heads * s.head_dim, kv = s.kv_heads * s.head_dim;
  float start = 1;
  const auto add = [&](const std::string& name, const Shape& shape) {
    file.add(name, shape, counted(shape, start++));
  };
  add("token_embd.weight", {s.vocab, s.hidden});
  add("output_norm.weight", {s.hidden});
  for (int64_t layer = 0; layer < s.layers; ++layer) {
    const std::string block = fmt::format("blk.{}.", layer);
    add(block + "attn_norm.weight", {s.hidden});
    add(block + "attn_q.weight", {q, s.hidden});
    add(block + "attn_k.weight", {kv, s.hidden});
    add(block + "attn_v.weight", {kv, s.hidden});
    add(block + "attn_output.weight", {s.hidden, q});
    add(block + "ffn_norm.weight", {s.hidden});
    add(block + "ffn_gate.weight", {s.inner, s.hidden});
    add(block + "ffn_up.weight", {s.inner, s.hidden});
    add(block + "ffn_down.weight", {s.hidden, s.inner});
    if (architecture != "qwen2") continue;
    add(block + "attn_q.bias", {q});
    add(block + "attn_k.bias", {kv});
    add(block + "attn_v.bias", {kv});
  }
  return file;
}

}  // namespace lacuna::io
