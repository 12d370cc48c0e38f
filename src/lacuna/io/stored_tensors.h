// The raw tensors of a model folder, whichever file holds them.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "lacuna/io/safetensors.h"

namespace lacuna::io {

struct StoredTensor {
  Tensor tensor;
  std::string file;     ///< for messages
  bool mapped = false;  ///< release_pages() may be called for its bytes
};

using StoredTensors = std::map<std::string, StoredTensor, std::less<>>;

/// All tensors of some files as one. @errors kBadInput: two files hold the same name
Result<StoredTensors> collect_tensors(const std::vector<SafetensorsFile>& files);

/// The one tensor `name`, of the given dtype and shape; an extent of -1 matches any.
/// @errors kBadInput: missing, or of another dtype or shape
Result<StoredTensor> expect_tensor(const StoredTensors& tensors, const std::string& name,
                                   DType dtype, const Shape& shape);

}  // namespace lacuna::io
