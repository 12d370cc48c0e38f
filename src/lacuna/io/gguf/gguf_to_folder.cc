#include <algorithm>

#include "lacuna/core/half.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/gguf/gguf_model.h"
#include "lacuna/io/gguf/rotary_rows.h"
#include "lacuna/io/tokenizer/utf8.h"

namespace lacuna::io {
namespace {
namespace fs = std::filesystem;

constexpr int64_t kChunkElements = 1 << 16;

/// A vector's elements are its rows.
Tensor vector_in_bf16(const GgufTensor& tensor, int64_t head_rows) {
  const int64_t elements = tensor.elements();
  std::vector<float> values(static_cast<size_t>(elements));
  dequantize_row(tensor, 0, values.data());
  std::vector<uint16_t> rounded(values.size());
  for (int64_t i = 0; i < elements; ++i) {
    const int64_t from = head_rows > 0 ? neighbour_row(i, head_rows) : i;
    rounded[static_cast<size_t>(i)] = float_to_bf16(values[static_cast<size_t>(from)]);
  }
  return {DType::kBF16, tensor.shape, Bytes::take(std::move(rounded))};
}

/// Row by row, so that the float32 values of a whole tensor never exist at once.
Tensor matrix_in_bf16(const GgufTensor& tensor, int64_t head_rows, const Executor& executor) {
  const int64_t rows = tensor.shape[0], columns = tensor.shape[1];
  std::vector<uint16_t> rounded(static_cast<size_t>(rows * columns));
  const int64_t step = std::max<int64_t>(1, kChunkElements / columns);
  executor.parallel_for((rows + step - 1) / step, [&](int64_t chunk) {
    std::vector<float> values(static_cast<size_t>(columns));
    for (int64_t row = chunk * step; row < std::min(rows, (chunk + 1) * step); ++row) {
      dequantize_row(tensor, head_rows > 0 ? neighbour_row(row, head_rows) : row, values.data());
      std::transform(values.begin(), values.end(), rounded.begin() + row * columns, float_to_bf16);
    }
  });
  return {DType::kBF16, tensor.shape, Bytes::take(std::move(rounded))};
}

}  // namespace

Result<GgufConversion> gguf_to_folder(const fs::path& gguf, const fs::path& out,
                                      const Executor& executor) {
  LACUNA_TRY(const GgufFile file, GgufFile::open(gguf));
  LACUNA_TRY(GgufModel model, describe_gguf(file));
  model.config["lacuna"] = {{"converted_from", tokenizer::to_valid_utf8(gguf.filename().string())}};
  LACUNA_TRY(auto writer, CheckpointWriter::create(out, {.store = Store::kDense}));
  GgufConversion done;
  done.bytes_in = file.file_bytes();
  for (const auto& [name, source, head_rows] : model.tensors) {
    const GgufTensor& from = file.tensors()[source];
    const Tensor tensor = from.shape.size() == 1 ? vector_in_bf16(from, head_rows)
                                                 : matrix_in_bf16(from, head_rows, executor);
    LACUNA_CHECK(writer.add(name, tensor));
    done.bytes_out += tensor.bytes.size();
  }
  LACUNA_CHECK(writer.add_text("tokenizer.json", model.tokenizer.tokenizer_json));
  LACUNA_CHECK(writer.add_text("tokenizer_config.json", model.tokenizer.tokenizer_config_json));
  LACUNA_CHECK(writer.add_text("generation_config.json", model.generation_config.dump(2) + "\n"));
  LACUNA_CHECK(writer.finish(model.config));
  return done;
}

}  // namespace lacuna::io
