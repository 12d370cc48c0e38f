#include "lacuna/io/out_folder.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <nlohmann/json.hpp>
#include <utility>

#include "lacuna/io/file.h"
#include "lacuna/io/json.h"

namespace lacuna::io {
namespace fs = std::filesystem;

fs::path folder_path(const fs::path& folder) {
  fs::path path = folder.lexically_normal();
  const fs::path name = path.filename();
  if (name == "." || name == "..") path = fs::absolute(path).lexically_normal();
  return !path.has_filename() && path.has_relative_path() ? path.parent_path() : path;
}

Result<fs::path> out_folder(const fs::path& out) {
  std::error_code failure;
  fs::path folder = folder_path(fs::absolute(out, failure));
  const fs::path here = fs::current_path(failure);
  for (fs::path above = here; !failure; above = above.parent_path()) {
    std::error_code missing;  // what isn't there yet is neither
    if (fs::equivalent(folder, above, missing))
      return usage_error(
          "{}: is the current folder or one above it (need a folder of its own). Choose another "
          "name.",
          out.string());
    if (above == above.parent_path()) break;
  }
  return folder;
}

Status check_not_source(const fs::path& out, const fs::path& source) {
  std::error_code missing;  // what isn't there yet is no source
  if (!fs::equivalent(out, source, missing)) return {};
  return usage_error(
      "{}: is the model that is read, and would be replaced (need another folder). "
      "Choose another name.",
      out.string());
}

Status check_free(const fs::path& out) {
  const fs::path config_file = out / "config.json";
  std::error_code failure;
  if (!fs::exists(config_file, failure)) return {};
  const auto text = read_text(config_file);
  const auto config =
      text.ok() ? parse_json_object(*text, "config.json") : Result<nlohmann::json>(text.error());
  if (!config.ok() || !config->contains("lacuna")) return {};
  return bad_input(
      "{}: a finished model is there already. Give --overwrite to replace it, or choose another "
      "name.",
      out.string());
}

OutLock::OutLock(fs::path file, int descriptor) : file_(std::move(file)), descriptor_(descriptor) {}

Result<std::shared_ptr<const OutLock>> OutLock::take(const fs::path& out) {
  const auto failed = [&](const std::string& why) {
    return check_failed("{}: cannot be created ({}). Choose another place.", out.string(), why);
  };
  std::error_code failure;
  fs::create_directories(out.parent_path(), failure);
  if (failure) return failed(failure.message());
  fs::path file = out;
  file += ".lock";
  while (true) {
    const int descriptor = ::open(file.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0644);
    if (descriptor < 0) return failed(std::strerror(errno));
    // A file system without locks is written to as before there were any.
    if (::flock(descriptor, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK) {
      ::close(descriptor);
      return bad_input("{}: another run writes here. Wait for its end, or choose another name.",
                       out.string());
    }
    // The holder before may have removed the file between our opening and locking it.
    struct stat locked {
    }, named{};
    ::fstat(descriptor, &locked);
    if (::stat(file.c_str(), &named) == 0 && locked.st_ino == named.st_ino)
      return std::shared_ptr<const OutLock>(new OutLock(file, descriptor));
    ::close(descriptor);
  }
}

OutLock::~OutLock() {
  ::unlink(file_.c_str());  // while it is locked: nobody can hold the same name then
  ::close(descriptor_);
}

}  // namespace lacuna::io
