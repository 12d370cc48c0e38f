#include "lacuna/io/file.h"

#include <fcntl.h>
#include <linux/magic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/vfs.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "lacuna/core/memory.h"

namespace lacuna::io {
namespace fs = std::filesystem;
namespace {

constexpr size_t kCopyBytes = size_t{1} << 20;

/// A file descriptor that closes itself.
struct Descriptor {
  int number = -1;
  explicit Descriptor(int n) : number(n) {}
  Descriptor(const Descriptor&) = delete;
  Descriptor& operator=(const Descriptor&) = delete;
  ~Descriptor() {
    if (number >= 0) ::close(number);
  }
};

Error cannot_read(const fs::path& path, const std::string& why) {
  return bad_input("{}: cannot be read ({}). Check the path.", path.string(), why);
}

Error cannot_write(const fs::path& path, int reason = errno) {
  if (reason == ENOSPC || reason == EDQUOT)  // the place that was given won't do
    return bad_input("{}: cannot be written ({}). Free some space and run it again.", path.string(),
                     std::strerror(reason));
  return check_failed("{}: cannot be written ({}). Choose another place.", path.string(),
                      std::strerror(reason));
}

/// The file that is to be replaced: where symbolic links lead, that a link stays one.
/// @errors kBadInput: something else than a file lies there
Result<fs::path> replaceable(fs::path path) {
  constexpr int kMostLinks = 40;  // as many as Linux follows
  std::error_code failure;
  for (int i = 0; i < kMostLinks && fs::is_symlink(path, failure); ++i) {
    const fs::path target = fs::read_symlink(path, failure);
    if (failure) break;
    path = path.parent_path() / target;  // an absolute target replaces the whole
  }
  const auto kind = fs::status(path, failure).type();
  if (kind == fs::file_type::regular || kind == fs::file_type::not_found) return path;
  if (kind == fs::file_type::none) return path;  // can't be looked at: opening says why
  return bad_input(
      "{}: exists and is not a regular file (need a new name, or a file). Choose "
      "another name.",
      path.string());
}

/// @return 0, or an errno
int take_room(int descriptor, const fs::path& folder, off_t size) {
  if (::fallocate(descriptor, 0, 0, size) == 0) return 0;
  if (errno != EOPNOTSUPP) return errno;
  // Then it is done by writing to every block, which may not go on until the disk is full.
  std::error_code failure;
  if (fs::space(folder, failure).available < static_cast<uintmax_t>(size)) return ENOSPC;
  return ::posix_fallocate(descriptor, 0, size);
}

/// Makes the renaming itself durable. Some file systems can't sync folders, so failing is no error.
void sync_folder(const fs::path& folder) {
  const Descriptor descriptor(::open(folder.c_str(), O_RDONLY | O_DIRECTORY));
  if (descriptor.number >= 0) ::fsync(descriptor.number);
}

}  // namespace

Result<Bytes> map_file(const fs::path& path) {
  const Descriptor descriptor(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (descriptor.number < 0) return cannot_read(path, std::strerror(errno));
  struct stat facts {};
  if (::fstat(descriptor.number, &facts) != 0) return cannot_read(path, std::strerror(errno));
  if (!S_ISREG(facts.st_mode)) return cannot_read(path, "not a regular file");
  const auto size = static_cast<size_t>(facts.st_size);
  if (size == 0) return Bytes();
  void* address = ::mmap(nullptr, size, PROT_READ, MAP_PRIVATE, descriptor.number, 0);
  if (address == MAP_FAILED) return cannot_read(path, std::strerror(errno));
  std::shared_ptr<const void> owner(
      address, [size](const void* at) { ::munmap(const_cast<void*>(at), size); });
  return Bytes(std::move(owner), static_cast<const std::byte*>(address), size);
}

void release_pages(const Bytes& mapped) { release_pages(mapped.data(), mapped.size()); }

void release_pages(const void* mapped, size_t size) {
  if (size == 0) return;
  const auto page = static_cast<uintptr_t>(::sysconf(_SC_PAGE_SIZE));
  const auto first = reinterpret_cast<uintptr_t>(mapped);
  const uintptr_t begin = first / page * page;
  // A hint: whatever it answers, the bytes stay what they are.
  ::madvise(reinterpret_cast<void*>(begin), first + size - begin, MADV_DONTNEED);
}

Result<std::shared_ptr<std::byte>> scratch_memory(const fs::path& folder, size_t size) {
  const auto failed = [&](int reason) {
    return cannot_write(folder.string() + fmt::format(" (a file of {})", bytes_text(size)), reason);
  };
  struct statfs facts {};
  if (::statfs(folder.c_str(), &facts) == 0 &&
      (facts.f_type == TMPFS_MAGIC || facts.f_type == RAMFS_MAGIC))
    return not_possible(
        "{}: lies in memory itself, so a file there spares none (need {}). Choose a folder on a "
        "disk.",
        folder.string(), bytes_text(size));
  std::string name = (folder / ".lacuna-scratch-XXXXXX").string();
  const Descriptor file(::mkostemp(name.data(), O_CLOEXEC));
  if (file.number < 0) return failed(errno);
  ::unlink(name.c_str());
  // What a write to a mapped hole finds on a full disk is the end of the process.
  if (const int reason = take_room(file.number, folder, static_cast<off_t>(size)); reason != 0)
    return failed(reason);
  void* const data = ::mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, file.number, 0);
  if (data == MAP_FAILED) return failed(errno);
  return std::shared_ptr<std::byte>(static_cast<std::byte*>(data),
                                    [size](std::byte* mapped) { ::munmap(mapped, size); });
}

Result<std::string> read_text(const fs::path& path) {
  LACUNA_TRY(const Bytes bytes, map_file(path));
  return std::string(reinterpret_cast<const char*>(bytes.data()), bytes.size());
}

Status write_text(const fs::path& path, std::string_view text) {
  LACUNA_TRY(auto file, AtomicFile::create(path));
  LACUNA_CHECK(file.write(text.data(), text.size()));
  return file.commit();
}

struct AtomicFile::State {
  fs::path path, temporary;
  int descriptor = -1;
  uint64_t size = 0;
  bool committed = false;

  State(fs::path final_path, fs::path temporary_path, int number)
      : path(std::move(final_path)), temporary(std::move(temporary_path)), descriptor(number) {}
  State(const State&) = delete;
  State& operator=(const State&) = delete;
  ~State() {
    if (descriptor >= 0) ::close(descriptor);
    if (!committed) ::unlink(temporary.c_str());
  }

  Status put(const void* data, size_t count, uint64_t position) {
    const auto* from = static_cast<const char*>(data);
    while (count > 0) {
      const ssize_t written = ::pwrite(descriptor, from, count, static_cast<off_t>(position));
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) return cannot_write(path);
      from += written;
      position += static_cast<uint64_t>(written);
      count -= static_cast<size_t>(written);
    }
    return {};
  }
};

AtomicFile::AtomicFile() = default;
AtomicFile::AtomicFile(AtomicFile&&) noexcept = default;
AtomicFile& AtomicFile::operator=(AtomicFile&&) noexcept = default;
AtomicFile::~AtomicFile() = default;

Result<AtomicFile> AtomicFile::create(const fs::path& name) {
  LACUNA_TRY(const fs::path path, replaceable(name));
  fs::path temporary = path;
  temporary += ".partial";
  const int descriptor = ::open(temporary.c_str(), O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (descriptor < 0) return cannot_write(path);
  AtomicFile file;
  file.state_ = std::make_unique<State>(path, std::move(temporary), descriptor);
  return file;
}

Status AtomicFile::write(const void* data, size_t size) {
  LACUNA_CHECK(state_->put(data, size, state_->size));
  state_->size += size;
  return {};
}

Status AtomicFile::append(const AtomicFile& from) {
  const State& source = *from.state_;
  std::vector<char> buffer(std::min<uint64_t>(kCopyBytes, source.size));
  for (uint64_t position = 0; position < source.size;) {
    const ssize_t count =
        ::pread(source.descriptor, buffer.data(), buffer.size(), static_cast<off_t>(position));
    if (count < 0 && errno == EINTR) continue;
    if (count <= 0) return cannot_read(source.temporary, std::strerror(errno));
    LACUNA_CHECK(write(buffer.data(), static_cast<size_t>(count)));
    position += static_cast<uint64_t>(count);
  }
  return {};
}

uint64_t AtomicFile::size() const { return state_->size; }

Status AtomicFile::commit() {
  State& state = *state_;
  if (::fsync(state.descriptor) != 0) return cannot_write(state.path);
  if (::close(std::exchange(state.descriptor, -1)) != 0) return cannot_write(state.path);
  LACUNA_CHECK(rename_durably(state.temporary, state.path));
  state.committed = true;
  return {};
}

Status rename_durably(const fs::path& from, const fs::path& to) {
  if (::rename(from.c_str(), to.c_str()) != 0) return cannot_write(to);
  sync_folder(to.has_parent_path() ? to.parent_path() : fs::path("."));
  return {};
}

}  // namespace lacuna::io
