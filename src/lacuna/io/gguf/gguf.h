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

/// The block types that are read; others are refused by name. The numbers are those of the files.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ4_K = 12,
  kQ5_K = 13,
  kQ6_K = 14,
  kBF16 = 30,
};

/// How a type lies in the file: whole blocks of `elements` values in `bytes` bytes.
struct GgufBlock {
  std::string_view name;  ///< "Q4_K"
  int64_t elements = 1, bytes = 0;
};
GgufBlock gguf_block(GgufType type);

struct GgufTensor {
  std::string name;
  Shape shape;  ///< row-major, outermost first (GGUF stores it reversed); 4 extents at most
  GgufType type = GgufType::kF32;
  Bytes bytes;

  /// Rows run along the last extent and hold whole blocks.
  int64_t row_elements() const { return shape.empty() ? 1 : shape.back(); }
  int64_t elements() const { return element_count(shape).value_or(0); }
};

struct GgufArray {
  std::vector<std::string> strings;  ///< one of these three is used
  std::vector<int64_t> integers;     ///< truth values, too
  std::vector<double> numbers;
};
using GgufValue = std::variant<uint64_t, int64_t, double, bool, std::string, GgufArray>;

/// A GGUF file (versions 2 and 3, little-endian), mapped; every count, length and offset checked on
/// opening.
class GgufFile {
 public:
  using Metadata = std::map<std::string, GgufValue, std::less<>>;

  /// @errors kBadInput, naming file and key or tensor
  static Result<GgufFile> open(const std::filesystem::path& path);
  /// The same over bytes that already lie in memory; `name` stands for the file in messages.
  static Result<GgufFile> parse(Bytes bytes, std::string name);
  const Metadata& metadata() const { return metadata_; }
  const std::vector<GgufTensor>& tensors() const { return tensors_; }  ///< in file order
  const std::string& path() const { return path_; }
  uint64_t file_bytes() const { return file_bytes_; }

 private:
  std::string path_;
  uint64_t file_bytes_ = 0;
  Metadata metadata_;
  std::vector<GgufTensor> tensors_;
};

/// Dequantises a tensor to float32, bit-equal to PyPI's `gguf` package (any NaN equals any other).
/// @shape out [elements]
/// @errors kBadInput: a tensor whose bytes don't fit its shape (never one of a GgufFile)
/// @determinism the same bits for every executor
Status dequantize(const GgufTensor& tensor, float* out, const Executor& executor);
/// One row of a tensor of a GgufFile. @shape out [row_elements]
void dequantize_row(const GgufTensor& tensor, int64_t row, float* out);

struct GgufConversion {
  uint64_t bytes_in = 0;   ///< of the GGUF file
  uint64_t bytes_out = 0;  ///< of all tensors written
};

/// Converts a GGUF model (llama and qwen2 kinds) into a Hugging Face folder: config.json,
/// generation_config.json, tokenizer.json, tokenizer_config.json (with the chat template), and
/// model.safetensors in bf16: dequantised to float32, rounded to nearest even, the rotary rows of
/// q and k back in Hugging Face's order. Memory: one tensor in bf16 at a time.
/// @errors kBadInput: another architecture or tokenizer, a missing key or tensor, a tensor or key
/// that no Hugging Face model of this kind has (all named); kCheckFailed: cannot write
Result<GgufConversion> gguf_to_folder(const std::filesystem::path& gguf,
                                      const std::filesystem::path& out, const Executor& executor);

}  // namespace lacuna::io
