// Small random weights and folders for the tests of io.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lacuna/core/half.h"
#include "lacuna/core/random.h"
#include "lacuna/format/compact.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/file.h"
#include "lacuna/io/safetensors.h"
#include "support/data.h"

namespace lacuna::io {

/// The message of a result that must have failed with `code`.
template <class T>
std::string message_of(const Result<T>& result, Code code = Code::kBadInput) {
  EXPECT_FALSE(result.ok());
  if (result.ok()) return "";
  EXPECT_EQ(result.error().code, code) << result.error().message;
  return result.error().message;
}

/// A random matrix whose zeros follow the pattern (dense: none); no element is zero by chance.
inline Tensor random_matrix(int64_t rows, int64_t columns, DType dtype,
                            const format::Pattern& pattern, uint64_t seed = 1) {
  const auto kept = [&](int64_t row, int64_t column) {
    using format::PatternKind;
    switch (pattern.kind) {
      case PatternKind::kUnstructured:
        return random_uniform(seed, 1, static_cast<uint64_t>(row * columns + column)) < 0.5;
      case PatternKind::kKeepOf:
        return (column + row) % pattern.of < pattern.keep;
      case PatternKind::kBlock:
        return random_uniform(seed, 2,
                              static_cast<uint64_t>(row / pattern.block_rows * columns +
                                                    column / pattern.block_columns)) < 0.5;
      case PatternKind::kDense:
        break;
    }
    return true;
  };
  const size_t width = size_bytes(dtype);
  std::vector<std::byte> bytes(static_cast<size_t>(rows * columns) * width);
  for (int64_t i = 0; i < rows * columns; ++i) {
    if (!kept(i / columns, i % columns)) continue;
    const auto value = static_cast<float>(0.1 + random_uniform(seed, 3, static_cast<uint64_t>(i)));
    const uint16_t half = dtype == DType::kBF16 ? float_to_bf16(value) : float_to_f16(value);
    std::memcpy(bytes.data() + static_cast<size_t>(i) * width,
                width == 4 ? static_cast<const void*>(&value) : &half, width);
  }
  return {dtype, {rows, columns}, Bytes::take(std::move(bytes))};
}

inline format::CompactMatrix random_compact(int64_t rows, int64_t columns, DType dtype,
                                            const format::Pattern& pattern, uint64_t seed = 1) {
  return format::compress(random_matrix(rows, columns, dtype, pattern, seed), pattern).value();
}

inline bool equal(const Tensor& a, const Tensor& b) {
  return a.dtype == b.dtype && a.shape == b.shape && a.bytes.size() == b.bytes.size() &&
         (a.bytes.empty() || std::memcmp(a.bytes.data(), b.bytes.data(), a.bytes.size()) == 0);
}

inline bool equal(const Bytes& a, const Bytes& b) {
  return equal(Tensor{DType::kU8, {}, a}, Tensor{DType::kU8, {}, b});
}

inline bool equal(const format::CompactMatrix& a, const format::CompactMatrix& b) {
  return a.pattern == b.pattern && a.rows == b.rows && a.columns == b.columns &&
         a.values_dtype == b.values_dtype && a.quantization == b.quantization &&
         equal(a.scales, b.scales) && equal(a.zero_points, b.zero_points) &&
         equal(a.bitmap, b.bitmap) && equal(a.values, b.values) && equal(a.offsets, b.offsets) &&
         equal(a.block_columns, b.block_columns) && equal(a.block_offsets, b.block_offsets);
}

/// Weights of all patterns and value types, sizes on both sides of the byte, group and tile edges.
inline std::vector<std::pair<std::string, Weight>> sample_weights() {
  using format::Pattern;
  const std::string block = "model.layers.0.";
  return {
      {"model.embed_tokens.weight", random_matrix(19, 12, DType::kBF16, {})},
      {block + "self_attn.q_proj.weight",
       random_compact(130, 37, DType::kBF16, Pattern::unstructured())},
      {block + "self_attn.k_proj.weight",
       random_compact(64, 64, DType::kF16, Pattern::keep_of(2, 4))},
      {block + "self_attn.v_proj.weight",
       random_compact(9, 11, DType::kF32, Pattern::keep_of(1, 4))},
      {block + "self_attn.o_proj.weight",
       random_compact(3, 24, DType::kBF16, Pattern::keep_of(4, 8))},
      {block + "mlp.up_proj.weight", random_compact(33, 70, DType::kBF16, Pattern::block(16, 32))},
      {block + "input_layernorm.weight", Tensor{DType::kF32, {2}, Bytes::take<float>({1, 2})}},
      {"model.norm.weight", Tensor{DType::kBF16, {0}, {}}},
  };
}

inline nlohmann::json sample_config() {
  return {{"architectures", {"LlamaForCausalLM"}}, {"model_type", "llama"}, {"hidden_size", 12}};
}

/// Writes weights into a new folder below a scratch folder.
inline std::filesystem::path write_model(const std::vector<std::pair<std::string, Weight>>& weights,
                                         Store store,
                                         const nlohmann::json& config = sample_config(),
                                         uint64_t shard_bytes = uint64_t{1} << 30) {
  const auto out = lacuna::testing::scratch_folder("model") / "out";
  auto writer = CheckpointWriter::create(out, {.store = store, .shard_bytes = shard_bytes});
  EXPECT_TRUE(writer.ok()) << writer.error().message;
  for (const auto& [name, weight] : weights) {
    const Status added =
        std::visit([&, &n = name](const auto& held) { return writer->add(n, held); }, weight);
    EXPECT_TRUE(added.ok()) << added.error().message;
  }
  const Status finished = writer->finish(config);
  EXPECT_TRUE(finished.ok()) << finished.error().message;
  return out;
}

/// Writes all that a checkpoint holds into another store, as convert does.
inline std::filesystem::path rewrite_model(const std::filesystem::path& from, Store store) {
  const auto checkpoint = Checkpoint::open(from);
  EXPECT_TRUE(checkpoint.ok()) << checkpoint.error().message;
  std::vector<std::pair<std::string, Weight>> weights;
  for (const auto& [name, info] : checkpoint->weights()) {
    Weight weight = checkpoint->weight(name).value();
    if (const Tensor* dense = std::get_if<Tensor>(&weight);
        dense && info.pattern.kind != format::PatternKind::kDense)
      weight = format::compress(*dense, info.pattern).value();
    weights.emplace_back(name, std::move(weight));
  }
  return write_model(weights, store, checkpoint->config());
}

inline std::string file_text(const std::filesystem::path& file) {
  const auto text = read_text(file);
  EXPECT_TRUE(text.ok()) << text.error().message;
  return text.ok() ? *text : "";
}

inline void put_text(const std::filesystem::path& file, const std::string& text) {
  std::ofstream(file, std::ios::binary) << text;
}

/// What opening a folder says that must fail.
inline std::string open_fault(const std::filesystem::path& folder) {
  return message_of(Checkpoint::open(folder));
}

/// Writes safetensors with some tensors of another file changed; a nullptr removes one.
inline void edit_tensors(const std::filesystem::path& file,
                         const std::map<std::string, const Tensor*>& changes) {
  std::vector<NamedTensor> tensors;
  {
    const auto opened = SafetensorsFile::open(file).value();
    for (const auto& entry : opened.entries()) {
      const auto change = changes.find(entry.name);
      if (change == changes.end())
        tensors.push_back({entry.name, opened.tensor(entry.name).value()});
      else if (change->second != nullptr)
        tensors.push_back({entry.name, *change->second});
    }
  }
  ASSERT_TRUE(write_safetensors(file, tensors).ok());
}

inline void edit_config(const std::filesystem::path& folder,
                        const std::function<void(nlohmann::json&)>& change) {
  nlohmann::json config = nlohmann::json::parse(file_text(folder / "config.json"));
  change(config);
  put_text(folder / "config.json", config.dump());
}

/// Where a tensor's bytes begin in a safetensors file.
inline uint64_t data_position(const std::filesystem::path& file, const std::string& tensor) {
  const auto opened = SafetensorsFile::open(file);
  EXPECT_TRUE(opened.ok()) << opened.error().message;
  const std::string text = file_text(file);
  for (const auto& entry : opened->entries())
    if (entry.name == tensor) return 8 + read_unaligned<uint64_t>(text.data()) + entry.begin;
  ADD_FAILURE() << "no tensor " << tensor;
  return 0;
}

inline void flip_bit(const std::filesystem::path& file, uint64_t position, int bit) {
  std::string text = file_text(file);
  text.at(position) = static_cast<char>(text.at(position) ^ (1 << bit));
  put_text(file, text);
}

}  // namespace lacuna::io
