// Reading GGUF, llama.cpp's single-file model format, and turning it into a Hugging Face folder.
#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "lacuna/core/bytes.h"
#include "lacuna/core/executor.h"
#include "lacuna/core/status.h"

namespace lacuna::io {

/// The block types that are read; others are refused by name.
enum class GgufType : uint32_t {
  kF32 = 0, kF16 = 1, kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ4_K = 12, kQ5_K = 13, kQ6_K = 14, kBF16 = 30,
};

struct GgufTensor {
  std::string name;
  Shape shape;  ///< row-major, outermost first (GGUF stores it reversed)
  GgufType type = GgufType::kF32;
  Bytes bytes;
};

struct GgufArray;
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string, GgufArray>;
struct GgufArray {
  std::vector<std::string> strings;  ///< one of these three is used
  std::vector<int64_t> integers;
  std::vector<double> numbers;
};

/// A GGUF file (versions 2 and 3, little-endian), mapped; every length and offset checked on opening.
class GgufFile {
 public:
  /// @errors kBadInput, naming file and key or tensor
  static Result<GgufFile> open(const std::filesystem::path& path);
  static Result<GgufFile> parse(Bytes bytes, std::string name);
  const std::map<std::string, GgufValue, std::less<>>& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
  std::map<std::string, GgufValue, std::less<>> metadata_;
  std::vector<GgufTensor> tensors_;
};

/// Dequantises a tensor to float32, bit-equal to PyPI's `gguf` package. out [elements]
Status dequantize(const GgufTensor& tensor, float* out, const Executor& executor);

/// Converts a GGUF model (llama and qwen2 kinds) into a Hugging Face folder: config.json, generation_config.json,
/// tokenizer.json, tokenizer_config.json (with the chat template), model.safetensors in bf16 (float32 dequantised, then
/// rounded to nearest even; rotary rows of q and k back in Hugging Face order).
/// @errors kBadInput: other architectures, missing keys; kCheckFailed: cannot write
struct GgufConversion {
  uint64_t bytes_in = 0, bytes_out = 0;
};
Result<GgufConversion> gguf_to_folder(const std::filesystem::path& gguf,
                                      const std::filesystem::path& out, const Executor& executor);

}  // namespace lacuna::io
