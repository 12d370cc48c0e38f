// Runs the built tool as a person does, and makes the models that its tests damage.
#pragma once

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>
#include <wordexp.h>

#include <chrono>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "lacuna/cli/tool.h"
#include "lacuna/core/random.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/file.h"
#include "lacuna/io/safetensors.h"
#include "support/data.h"

namespace lacuna::testing {

namespace fs = std::filesystem;
using nlohmann::json;

struct Output {
  int code = -1;  ///< 128 + the signal's number when a signal ended it, as shells say it
  std::string out, err;

  json report() const {
    const json parsed = json::parse(out, nullptr, /*allow_exceptions=*/false);
    EXPECT_TRUE(parsed.is_object()) << out << err;
    return parsed;
  }
};

enum class How {
  kBinary,  ///< build/.../lacuna itself
  kChild    ///< cli::Tool in a child of this process, which has libtorch loaded already: that
            ///< costs a quarter of a second, and these tests run the tool some 250 times
};

/// The tool at work: `arguments` are a shell's words.
class Process {
 public:
  explicit Process(const std::string& arguments, const std::string& input = "",
                   How how = How::kBinary)
      : folder_(scratch_folder("cli_run")) {
    std::ofstream(folder_ / "in") << input;
    std::fflush(nullptr);  // else the child prints what waits here
    pid_ = fork();
    if (pid_ != 0) return;
    constexpr int kWrite = O_WRONLY | O_CREAT | O_TRUNC;
    setenv("LACUNA_TUNE", "off", /*overwrite=*/0);  // not the table of whoever runs the tests
    dup2(open((folder_ / "in").c_str(), O_RDONLY), STDIN_FILENO);
    dup2(open((folder_ / "out").c_str(), kWrite, 0644), STDOUT_FILENO);
    dup2(open((folder_ / "err").c_str(), kWrite, 0644), STDERR_FILENO);
    wordexp_t words{};
    if (wordexp(("lacuna " + arguments).c_str(), &words, WRDE_NOCMD) != 0) _exit(126);
    if (how == How::kBinary) {
      signal(SIGINT, SIG_DFL);  // a shell ignores it in what it runs in the background
      execv(LACUNA_BINARY_DIR "/lacuna", words.we_wordv);
      _exit(127);
    }
    const int code = cli::Tool().run(static_cast<int>(words.we_wordc), words.we_wordv);
    std::fflush(nullptr);
    _exit(code);  // what this process does at its exit is not the child's
  }
  ~Process() {
    if (pid_ > 0) send(SIGKILL), (void)wait();
  }
  Process(const Process&) = delete;
  Process& operator=(const Process&) = delete;

  void send(int signal) const { kill(pid_, signal); }
  /// Waits until the condition holds while the tool is still running.
  template <class Condition>
  bool until(Condition&& condition) const {
    const auto end = std::chrono::steady_clock::now() + std::chrono::minutes(2);
    siginfo_t state{};
    while (!condition()) {
      waitid(P_PID, static_cast<id_t>(pid_), &state, WEXITED | WNOHANG | WNOWAIT);
      if (state.si_pid != 0 || std::chrono::steady_clock::now() > end) return false;
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    return true;
  }
  /// What it has printed so far.
  std::string out() const { return text("out"); }
  Output wait() {
    int status = 0;
    waitpid(std::exchange(pid_, -1), &status, 0);
    Output output;
    output.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    output.out = out();
    output.err = text("err");
    return output;
  }

 private:
  std::string text(const char* stream) const {
    const auto read = io::read_text(folder_ / stream);
    return read.ok() ? *read : "";  // the shell may not have made it yet
  }
  fs::path folder_;
  pid_t pid_ = -1;
};

inline Output lacuna_tool(const std::string& arguments, const std::string& input = "",
                          How how = How::kChild) {
  return Process(arguments, input, how).wait();
}

/// The same for many command lines, a few at a time; outputs in their order.
inline std::vector<Output> lacuna_tools(const std::vector<std::string>& lines) {
  std::vector<Output> outputs;
  std::deque<Process> running;
  for (const std::string& line : lines) {
    if (running.size() == std::max(2u, std::thread::hardware_concurrency())) {
      outputs.push_back(running.front().wait());
      running.pop_front();
    }
    running.emplace_back(line, "", How::kChild);
  }
  for (Process& process : running) outputs.push_back(process.wait());
  return outputs;
}

/// A run that must go well.
inline Output done(const std::string& arguments, How how = How::kChild) {
  Output output = lacuna_tool(arguments, "", how);
  EXPECT_EQ(output.code, 0) << arguments << "\n" << output.err;
  return output;
}

inline std::string demo_model() { return (source_folder() / "examples/demo-model").string(); }

/// A copy of a model folder that a test may damage.
inline fs::path copy_of(const fs::path& model) {
  fs::path folder = scratch_folder("copy") / "model";
  fs::copy(model, folder);
  return folder;
}

/// A pruned demo model and what prune --json said of it.
struct Pruned {
  fs::path folder;
  json report;
};

/// Magnitude pruning of the demo model by pattern, made once each: no calibration, a second.
inline const Pruned& pruned(const std::string& pattern) {
  static std::map<std::string, Pruned> models;
  const auto [found, fresh] = models.try_emplace(pattern);
  if (fresh) {
    found->second.folder = scratch_folder("pruned") / "model";
    found->second.report =
        done(fmt::format("prune {} -o {} --method magnitude --pattern {} --threads 1 -q --json",
                         demo_model(), found->second.folder.string(), pattern))
            .report();
  }
  return found->second;
}

/// `pruned` in another store, made once each.
inline const fs::path& converted(const std::string& pattern, const std::string& store) {
  static std::map<std::string, fs::path> models;
  fs::path& folder = models[pattern + " " + store];
  if (folder.empty()) {
    folder = scratch_folder("converted") / "model";
    done(fmt::format("convert {} -o {} --store {} -q", pruned(pattern).folder.string(),
                     folder.string(), store));
  }
  return folder;
}

inline std::string bytes_of(const fs::path& file) {
  const auto text = io::read_text(file);
  EXPECT_TRUE(text.ok()) << text.error().message;
  return text.ok() ? *text : "";
}

inline json json_of(const fs::path& file) { return json::parse(bytes_of(file)); }

/// English of a sort: words in random order.
inline std::string some_text(size_t words) {
  static constexpr const char* kWords[] = {"the",   "river", "of",   "history", "was",  "long",
                                           "and",   "a",     "city", "people",  "came", "to",
                                           "build", "walls", "from", "stone",   "in",   "winter"};
  std::string text;
  for (size_t i = 0; i < words; ++i) {
    text += kWords[random_bits(7, 1, i) % std::size(kWords)];
    text += i % 9 == 8 ? ". " : " ";
  }
  return text;
}

/// A safetensors file taken apart: its header may be changed, its bytes edited in place.
struct OpenFile {
  explicit OpenFile(fs::path file) : path(std::move(file)) {
    const std::string all = bytes_of(path);
    const auto size = read_unaligned<uint64_t>(all.data());
    header = json::parse(all.substr(8, size));
    data = all.substr(8 + size);
  }
  /// Where a tensor's bytes begin in `data`, and how many there are.
  std::pair<size_t, size_t> place(const std::string& tensor) const {
    const json& offsets = header.at(tensor).at("data_offsets");
    const auto begin = offsets[0].get<size_t>();
    return {begin, offsets[1].get<size_t>() - begin};
  }
  void flip_bit(size_t byte, int bit) {
    data.at(byte) = static_cast<char>(data[byte] ^ (1 << bit));
  }
  void save() const {
    const std::string text = header.dump();
    const uint64_t size = text.size();
    std::ofstream(path, std::ios::binary)
        << std::string(reinterpret_cast<const char*>(&size), 8) << text << data;
  }
  /// save(), and checksums.json says that this is how it should be.
  void save_with_checksums() const {
    save();
    const fs::path file = path.parent_path() / "checksums.json";
    json checksums = json_of(file);
    for (auto& [tensor, chunks] : checksums["tensors"].items()) {
      const auto [begin, count] = place(tensor);
      chunks = io::chunk_checksums(
          Bytes::take(std::vector<char>(data.begin() + begin, data.begin() + begin + count)));
    }
    std::ofstream(file) << checksums.dump(1);
  }

  fs::path path;
  json header;
  std::string data;
};

inline OpenFile open_weights(const fs::path& model) {
  return OpenFile(model / "model.safetensors");
}

}  // namespace lacuna::testing
