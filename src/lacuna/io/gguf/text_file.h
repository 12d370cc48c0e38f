// Companion files that exist only in memory.
#pragma once

#include <string>
#include <string_view>

#include "lacuna/io/checkpoint.h"

namespace lacuna::io {

/// Adds a file of this name and content to the folder that is being written.
/// @errors kCheckFailed with the system's reason
Status add_text_file(CheckpointWriter& writer, const std::string& name, std::string_view text);

}  // namespace lacuna::io
