// Texts for calibration and evaluation.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include "lacuna/core/status.h"

namespace lacuna::io {

/// The documents of a file: a .jsonl file gives the `text` field of every line, any other file is
/// one document.
/// @errors kBadInput: missing file; a line that is not a JSON object with a string `text` (line
/// number named); no text
Result<std::vector<std::string>> read_documents(const std::filesystem::path& path);

/// Which part of a data set is wanted: one to calibrate with, or one to judge by.
enum class Split { kTrain, kTest };

/// Finds a data set by name ("wikitext-2", "c4", ...) or as a path. Names are looked up under
/// $LACUNA_DATASETS: NAME, NAME.txt and NAME.jsonl, which have one part, then NAME/train.txt or
/// NAME/test.txt, the same with .jsonl, and wiki.train.raw, wiki.train.tokens or wiki.test...
/// there.
/// @errors kBadInput: says every place where it looked
Result<std::filesystem::path> find_dataset(const std::string& name_or_path, Split split);

}  // namespace lacuna::io
