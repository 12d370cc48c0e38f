#include "support/data.h"

#include <unistd.h>

#include <cstdlib>
#include <set>
#include <vector>

namespace lacuna::testing {
namespace fs = std::filesystem;

std::set<std::string>& missing_data() {
  static std::set<std::string> missing;
  return missing;
}

fs::path source_folder() { return LACUNA_SOURCE_DIR; }

fs::path demo_model_folder() { return source_folder() / "examples/demo-model"; }

fs::path data_folder() {
  if (const char* set = std::getenv("LACUNA_DATA")) return set;
  const fs::path beside = source_folder() / ".." / "shared" / "data";
  return fs::exists(beside) ? fs::canonical(beside) : fs::path();
}

fs::path data_path(const std::string& relative) {
  const fs::path folder = data_folder();
  if (!folder.empty() && fs::exists(folder / relative)) return folder / relative;
  missing_data().insert(relative);
  return {};
}

fs::path cache_path(const std::string& relative) {
  const fs::path path = source_folder() / ".cache" / relative;
  if (fs::exists(path)) return path;
  missing_data().insert(".cache/" + relative + " (./dev test fetches it)");
  return {};
}

namespace {
struct Scratch {
  std::vector<fs::path> folders;
  ~Scratch() {
    std::error_code ignored;
    for (const fs::path& folder : folders) fs::remove_all(folder, ignored);
  }
};
}  // namespace

fs::path scratch_folder(const std::string& name) {
  static Scratch scratch;
  static int counter = 0;
  const fs::path folder =
      fs::temp_directory_path() /
      ("lacuna_test_" + name + "_" + std::to_string(getpid()) + "_" + std::to_string(counter++));
  fs::remove_all(folder);
  fs::create_directories(folder);
  scratch.folders.push_back(folder);
  return folder;
}

}  // namespace lacuna::testing
