// llama2.c's model files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <string>

#include "lacuna/core/status.h"

namespace lacuna::io {

struct Llama2cConversion {
  uint64_t bytes_in = 0;   ///< of the .bin file
  uint64_t bytes_out = 0;  ///< of all tensors written
  std::string tokenizer;   ///< the SentencePiece model that was found; empty: none
};

/// Converts a legacy .bin file (seven int32 sizes, then float32 weights) into a Hugging Face folder
/// with the same float32 weights, the rotary rows of q and k in Hugging Face's order. The one
/// *.model file beside it becomes tokenizer.model; without one the folder has no tokenizer.
/// @errors kBadInput: impossible sizes, a file longer or shorter than they say, several *.model
/// files, one that doesn't fit; kCheckFailed: cannot write
Result<Llama2cConversion> llama2c_to_folder(const std::filesystem::path& bin,
                                            const std::filesystem::path& out);

}  // namespace lacuna::io
