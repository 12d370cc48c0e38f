// Tensors that memory needn't hold: their pages lie in a file.
#pragma once

#include <ATen/ATen.h>

#include <filesystem>

#include "lacuna/core/status.h"

namespace lacuna::prune {

/// A tensor in a file of `folder` that has no name any more, so that nothing of it outlives the
/// process. All of the file is there from the start.
/// @errors kCheckFailed: the folder takes no such file (how large it must be is said)
Result<at::Tensor> file_tensor(const std::filesystem::path& folder, at::IntArrayRef shape,
                               at::ScalarType type);

/// Gives the memory of some rows of a file_tensor() back; they are read again when asked for.
void give_back(const at::Tensor& rows);

}  // namespace lacuna::prune
