// One HTML file from the JSON that the other verbs left.
#pragma once

#include <filesystem>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::report {

/// Reads the JSON files and writes one self-contained HTML page: sizes, perplexity, speed, sparsity
/// and error by layer, answers. Nothing is shown that no run measured.
/// @errors kBadInput: a file that is missing, not JSON, or not the output of a verb (named);
/// kCheckFailed: cannot write
Status write_html(const std::vector<std::filesystem::path>& runs, const std::filesystem::path& out);

}  // namespace lacuna::report
