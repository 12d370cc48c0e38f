// The folder that a run writes: what it is called, and that nobody else writes it meanwhile.
#pragma once

#include <filesystem>
#include <memory>

#include "lacuna/core/status.h"

namespace lacuna::io {

/// The path by which a folder has a last name: "models/out/" and "models/./out" are "models/out",
/// "." is the current folder's full path. What is derived from the name ("out.partial", "out-2-4")
/// lies beside the folder then, not in it.
std::filesystem::path folder_path(const std::filesystem::path& folder);

/// The same, absolute, for a folder that is to be written.
/// @errors kUsage: the current folder or one above it, which can't be replaced
Result<std::filesystem::path> out_folder(const std::filesystem::path& out);

/// What is written replaces a folder as a whole: it must not be the one that is read.
/// @errors kUsage: `out` and `source` are one folder
Status check_not_source(const std::filesystem::path& out, const std::filesystem::path& source);

/// For whoever was not told to replace what is there. What this tool did not write is refused by
/// the writer.
/// @errors kBadInput: a finished model of this tool lies in `out`
Status check_free(const std::filesystem::path& out);

/// The right to write OUT, OUT.partial and OUT.journal, held while it lives: a lock on the file
/// OUT.lock, which goes with it. After a kill the file stays and locks nothing.
class OutLock {
 public:
  /// @param out  as out_folder() gives it; the folder above is made where it is missing
  /// @errors kBadInput: another run writes there; kCheckFailed with the system's reason
  static Result<std::shared_ptr<const OutLock>> take(const std::filesystem::path& out);
  OutLock(const OutLock&) = delete;
  OutLock& operator=(const OutLock&) = delete;
  ~OutLock();

 private:
  OutLock(std::filesystem::path file, int descriptor);
  std::filesystem::path file_;
  int descriptor_;
};

}  // namespace lacuna::io
