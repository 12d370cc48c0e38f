// Files: read through a mapping, written under a temporary name and renamed when complete.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <string>
#include <string_view>

#include "lacuna/core/bytes.h"
#include "lacuna/core/status.h"

namespace lacuna::io {

/// Maps a whole file read-only; the mapping lives as long as the Bytes. An empty file gives empty
/// Bytes.
/// @errors kBadInput: missing, not a regular file, unreadable
Result<Bytes> map_file(const std::filesystem::path& path);
/// Takes bytes of a mapping, whole pages around them, out of this process's memory: they stay in
/// the system's cache of the file as long as it likes, and come back when they are read again.
/// @param mapped  a part of what map_file() gave, nothing else
void release_pages(const Bytes& mapped);
/// The same of memory that lies in a file. @param mapped  a part of what scratch_memory() gave
void release_pages(const void* mapped, size_t size);
/// Memory in a file without a name: the system writes out what isn't in use, and release_pages()
/// makes it. Its room on the disk is taken at once. Gone with the last pointer, or the process.
/// @errors with the system's reason, naming the folder and the size: kBadInput where the disk is
/// full, kCheckFailed otherwise; kNotPossible: the folder itself lies in memory
Result<std::shared_ptr<std::byte>> scratch_memory(const std::filesystem::path& folder, size_t size);
/// Reads a whole (small) text file. @errors as map_file
Result<std::string> read_text(const std::filesystem::path& path);
/// Writes a whole file atomically (temporary name, fsync, rename, fsync of the folder).
/// @errors kCheckFailed with the system's reason (disk full, ...)
Status write_text(const std::filesystem::path& path, std::string_view text);

/// Renames a file or folder on one file system and makes the renaming durable (fsync of the
/// folder).
/// @errors kCheckFailed with the system's reason
Status rename_durably(const std::filesystem::path& from, const std::filesystem::path& to);

/// A file that carries its final name only after commit(). Destroyed before that, it removes its
/// temporary.
class AtomicFile {
 public:
  /// A symbolic link stays one: the file that it leads to is replaced.
  /// @errors kBadInput: something else than a regular file lies there; kCheckFailed with the
  /// system's reason
  static Result<AtomicFile> create(const std::filesystem::path& name);
  AtomicFile(AtomicFile&&) noexcept;
  AtomicFile& operator=(AtomicFile&&) noexcept;
  ~AtomicFile();
  /// Appends. @errors kCheckFailed naming the path and the reason (disk full, ...)
  Status write(const void* data, size_t size);
  /// Appends all that was written to another file so far. @errors as write()
  Status append(const AtomicFile& from);
  uint64_t size() const;
  /// fsync, rename to the final name, fsync of the folder. Nothing may be written afterwards.
  /// @errors as write()
  Status commit();

 private:
  AtomicFile();
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace lacuna::io
