// Runs the built tool as a person does, and makes the models that its tests damage.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>

#include <chrono>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "lacuna/io/file.h"
#include "support/data.h"

namespace lacuna::testing {

namespace fs = std::filesystem;
using nlohmann::json;

struct Output {
  int code = -1;  ///< 128 + the signal's number when a signal ended it, as shells say it
  std::string out, err;

  json report() const;
};

enum class How {
  kBinary,  ///< build/.../lacuna itself
  kChild    ///< cli::run in a child of this process, which has libtorch loaded already: that
            ///< costs a quarter of a second, and these tests run the tool some 250 times
};

/// The tool at work: `arguments` are a shell's words.
class Process {
 public:
  explicit Process(const std::string& arguments, const std::string& input = "",
                   How how = How::kBinary);
  ~Process();
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void send(int signal) const { kill(pid_, signal); }
  /// Waits until the condition holds while the tool is still running.
  template <class Condition>
  bool until(Condition&& condition) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    while (!condition()) {
      if (ended() || std::chrono::steady_clock::now() > end) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
  }
  /// What it has printed so far.
  std::string out() const { return text("out"); }
  Output wait();

 private:
  bool ended() const;
  std::string text(const char* stream) const;

  fs::path folder_;
  pid_t pid_ = -1;
};

Output lacuna_tool(const std::string& arguments, const std::string& input = "",
                   How how = How::kChild);
/// The same for many command lines, a few at a time; outputs in their order.
std::vector<Output> lacuna_tools(const std::vector<std::string>& lines);
/// A run that must go well.
Output done(const std::string& arguments, How how = How::kChild);

std::string demo_model();
/// A copy of a model folder that a test may damage.
fs::path copy_of(const fs::path& model);

/// A pruned demo model and what prune --json said of it.
struct Pruned {
  fs::path folder;
  json report;
};

/// Magnitude pruning of the demo model by pattern, made once each: no calibration, a second.
const Pruned& pruned(const std::string& pattern);
/// `pruned` in another store, made once each.
const fs::path& converted(const std::string& pattern, const std::string& store);

std::string bytes_of(const fs::path& file);
json json_of(const fs::path& file);
/// English of a sort: words in random order.
std::string some_text(size_t words);

/// A safetensors file taken apart: its header may be changed, its bytes edited in place.
struct OpenFile {
  explicit OpenFile(fs::path file);
  /// Where a tensor's bytes begin in `data`, and how many there are.
  std::pair<size_t, size_t> place(const std::string& tensor) const;
  void flip_bit(size_t byte, int bit);
  void save() const;
  /// save(), and checksums.json says that this is how it should be.
  void save_with_checksums() const;

  fs::path path;
  json header;
  std::string data;
};

OpenFile open_weights(const fs::path& model);

}  // namespace lacuna::testing
