// Which weights a pruned model keeps, without their values: a patch on a public checkpoint of about
// a bit a weight (docs/formats.md).
#pragma once

#include <filesystem>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "lacuna/core/bytes.h"
#include "lacuna/core/status.h"
#include "lacuna/format/pattern.h"

namespace lacuna::io {

/// The mask of one weight.
struct WeightMask {
  format::Pattern pattern;
  int64_t rows = 0, columns = 0;
  DType values = DType::kBF16;  ///< of the weight
  Bytes bitmap;  ///< u8 [rows, ceil(columns/8)]: bit 0 = first column, 1 = kept; as in the store
};

struct MaskFile {
  std::map<std::string, WeightMask> weights;
  /// whole_checksum() of every tensor of the dense model, those without a mask too: what else a
  /// model is made of must be the same.
  std::map<std::string, std::string> dense;
  nlohmann::json about;  ///< how the model was pruned: "lacuna" of its config.json
};

/// A safetensors file: NAME.mask for every weight, the rest and a checksum for every MiB in its
/// metadata. @errors kCheckFailed
Status write_mask_file(const std::filesystem::path& file, const MaskFile& masks);
/// @errors kBadInput: not such a file, a newer version; damaged (tensor named); bits past the last
/// column
Result<MaskFile> read_mask_file(const std::filesystem::path& file);

}  // namespace lacuna::io
