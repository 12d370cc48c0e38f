#include "lacuna/io/misfit.h"

namespace lacuna::io {

std::optional<std::string> misfit(const Checkpoint& checkpoint, const std::string& name,
                                  const Shape& shape) {
  const auto found = checkpoint.weights().find(name);
  if (found == checkpoint.weights().end())
    return fmt::format("tensor \"{}\" is missing (need it with shape {})", name, shape_text(shape));
  if (!is_float(found->second.dtype))
    return fmt::format("tensor \"{}\" has the wrong type (got {}; need floating-point numbers)",
                       name, long_name(found->second.dtype));
  if (found->second.shape != shape)
    return fmt::format("tensor \"{}\" has the wrong shape (got {}; need {})", name,
                       shape_text(found->second.shape), shape_text(shape));
  return std::nullopt;
}

}  // namespace lacuna::io
