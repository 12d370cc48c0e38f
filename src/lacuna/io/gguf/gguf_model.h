// A GGUF model described the Hugging Face way. Nothing here touches a disk or a weight's values.
#pragma once

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/io/gguf/gguf.h"
#include "lacuna/io/gguf/gguf_tokenizer.h"

namespace lacuna::io {

struct GgufModel {
  /// A tensor of the Hugging Face model and where it comes from.
  struct Planned {
    std::string name;       ///< "model.layers.0.self_attn.q_proj.weight"
    size_t source = 0;      ///< in GgufFile::tensors()
    int64_t head_rows = 0;  ///< rows of a head, where the rows are to be reordered; else 0
  };
  nlohmann::json config, generation_config;
  GgufTokenizer tokenizer;
  std::vector<Planned> tensors;  ///< in the order of the model
};

/// Reads metadata and tensor list of a llama or qwen2 model. Every tensor that such a model has is
/// there with its shape, and no other.
/// @errors as gguf_to_folder()
Result<GgufModel> describe_gguf(const GgufFile& file);

}  // namespace lacuna::io
