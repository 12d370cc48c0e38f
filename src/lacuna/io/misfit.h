// Whether a checkpoint's weights are those that its config describes.
#pragma once

#include <optional>
#include <string>

#include "lacuna/io/checkpoint.h"

namespace lacuna::io {

/// What keeps a weight from being what a config describes, as the middle of a message: it is
/// missing, doesn't hold floating-point numbers or has another shape. Nothing when it fits.
std::optional<std::string> misfit(const Checkpoint& checkpoint, const std::string& name,
                                  const Shape& shape);

}  // namespace lacuna::io
