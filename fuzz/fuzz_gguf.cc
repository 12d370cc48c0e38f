// GGUF from anywhere: refused with a message, or every tensor can be dequantised; and what is said
// of model and tokenizer is refused or gives a description and a tokenizer that work.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "lacuna/io/decoder_spec.h"
#include "lacuna/io/gguf/gguf_model.h"
#include "lacuna/io/tokenizer/huggingface.h"

namespace {

using lacuna::Bytes;
using lacuna::Executor;
using lacuna::io::GgufFile;
using lacuna::io::GgufTensor;

constexpr int64_t kMostElements = 1 << 16;

void require(bool holds) {
  if (!holds) std::abort();
}

/// Whole and row by row give the same.
void exercise(const GgufTensor& tensor) {
  const int64_t elements = tensor.elements(), row = tensor.row_elements();
  if (elements > kMostElements || elements == 0) return;
  std::vector<float> whole(static_cast<size_t>(elements)), one(static_cast<size_t>(row));
  require(lacuna::io::dequantize(tensor, whole.data(), Executor::serial()).ok());
  for (int64_t at = 0; at < elements; at += row) {
    lacuna::io::dequantize_row(tensor, at / row, one.data());
    require(std::memcmp(one.data(), whole.data() + at, one.size() * sizeof(float)) == 0);
  }
}

void exercise(const lacuna::io::GgufTokenizer& made) {
  const auto config =
      lacuna::io::tokenizer::TokenizerConfig::parse(made.tokenizer_config_json, "config");
  require(config.ok());
  const auto tokenizer =
      lacuna::io::tokenizer::parse_huggingface(made.tokenizer_json, *config, "tokenizer");
  require(tokenizer.ok() && (*tokenizer)->vocab_size() <= made.tokens);
  for (const int32_t id : (*tokenizer)->encode("ab <|a|>\n12 A</s>", true))
    require(id >= 0 && id < made.tokens);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const auto* bytes = reinterpret_cast<const char*>(data);
  const auto file = GgufFile::parse(Bytes::take(std::vector<char>(bytes, bytes + size)), "fuzz");
  if (!file.ok()) {
    require(file.error().message.starts_with("fuzz: "));
    return 0;
  }
  for (const GgufTensor& tensor : file->tensors()) exercise(tensor);
  const auto tokenizer = lacuna::io::gguf_tokenizer(*file);
  if (tokenizer.ok())
    exercise(*tokenizer);
  else
    require(tokenizer.error().message.starts_with("fuzz: "));
  const auto model = lacuna::io::describe_gguf(*file);
  if (!model.ok()) {
    require(model.error().message.starts_with("fuzz: "));
    return 0;
  }
  const auto spec = lacuna::io::decoder_spec(model->config, &model->generation_config, "fuzz");
  require(spec.ok() && model->tensors.size() == spec->tensors().size());
  for (const auto& planned : model->tensors) {
    require(planned.source < file->tensors().size());
    require(planned.head_rows >= 0 && planned.head_rows % 2 == 0);
  }
  return 0;
}
