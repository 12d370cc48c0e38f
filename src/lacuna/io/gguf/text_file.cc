#include "lacuna/io/gguf/text_file.h"

#include <cerrno>
#include <cstdlib>
#include <cstring>

#include "lacuna/io/file.h"

namespace lacuna::io {
namespace fs = std::filesystem;
namespace {

/// A new folder for the time in between; removes itself.
struct ScratchFolder {
  fs::path path;
  ~ScratchFolder() {
    std::error_code ignored;
    if (!path.empty()) fs::remove_all(path, ignored);
  }
};

}  // namespace

// The writer copies files from disk only, so the text takes the way over one.
Status add_text_file(CheckpointWriter& writer, const std::string& name, std::string_view text) {
  std::error_code failure;
  std::string pattern = (fs::temp_directory_path(failure) / "lacuna-XXXXXX").string();
  if (failure || ::mkdtemp(pattern.data()) == nullptr)
    return check_failed("{}: no folder for temporary files ({}). Set TMPDIR.", name,
                        failure ? failure.message() : std::strerror(errno));
  const ScratchFolder scratch{pattern};
  LACUNA_CHECK(write_text(scratch.path / name, text));
  return writer.copy_file(scratch.path / name);
}

}  // namespace lacuna::io
