#include "cli/run_tool.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <unistd.h>
#include <wordexp.h>

#include <algorithm>
#include <cstdio>
#include <deque>
#include <fstream>
#include <map>

#include "lacuna/cli/run.h"
#include "lacuna/core/random.h"
#include "lacuna/io/checkpoint.h"
#include "lacuna/io/safetensors.h"

namespace lacuna::testing {

json Output::report() const {
  const json parsed = json::parse(out, nullptr, /*allow_exceptions=*/false);
  EXPECT_TRUE(parsed.is_object()) << out << err;
  return parsed;
}

Process::Process(const std::string& arguments, const std::string& input, How how)
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
  const int code = cli::run(static_cast<int>(words.we_wordc), words.we_wordv);
  std::fflush(nullptr);
  _exit(code);  // what this process does at its exit is not the child's
}

Process::~Process() {
  if (pid_ > 0) send(SIGKILL), (void)wait();
}

bool Process::ended() const {
  siginfo_t state{};
  waitid(P_PID, static_cast<id_t>(pid_), &state, WEXITED | WNOHANG | WNOWAIT);
  return state.si_pid != 0;
}

Output Process::wait() {
  int status = 0;
  waitpid(std::exchange(pid_, -1), &status, 0);
  Output output;
  output.code = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  output.out = out();
  output.err = text("err");
  return output;
}

std::string Process::text(const char* stream) const {
  const auto read = io::read_text(folder_ / stream);
  return read.ok() ? *read : "";  // the shell may not have made it yet
}

Output lacuna_tool(const std::string& arguments, const std::string& input, How how) {
  return Process(arguments, input, how).wait();
}

std::vector<Output> lacuna_tools(const std::vector<std::string>& lines) {
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

Output done(const std::string& arguments, How how) {
  Output output = lacuna_tool(arguments, "", how);
  EXPECT_EQ(output.code, 0) << arguments << "\n" << output.err;
  return output;
}

std::string demo_model() { return (source_folder() / "examples/demo-model").string(); }

fs::path copy_of(const fs::path& model) {
  fs::path folder = scratch_folder("copy") / "model";
  fs::copy(model, folder);
  return folder;
}

const Pruned& pruned(const std::string& pattern) {
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

const fs::path& converted(const std::string& pattern, const std::string& store) {
  static std::map<std::string, fs::path> models;
  fs::path& folder = models[pattern + " " + store];
  if (folder.empty()) {
    folder = scratch_folder("converted") / "model";
    done(fmt::format("convert {} -o {} --store {} -q", pruned(pattern).folder.string(),
                     folder.string(), store));
  }
  return folder;
}

std::string bytes_of(const fs::path& file) {
  const auto text = io::read_text(file);
  EXPECT_TRUE(text.ok()) << text.error().message;
  return text.ok() ? *text : "";
}

json json_of(const fs::path& file) { return json::parse(bytes_of(file)); }

std::string some_text(size_t words) {
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

OpenFile::OpenFile(fs::path file) : path(std::move(file)) {
  const std::string all = bytes_of(path);
  const auto size = read_unaligned<uint64_t>(all.data());
  header = json::parse(all.substr(8, size));
  data = all.substr(8 + size);
}

std::pair<size_t, size_t> OpenFile::place(const std::string& tensor) const {
  const json& offsets = header.at(tensor).at("data_offsets");
  const auto begin = offsets[0].get<size_t>();
  return {begin, offsets[1].get<size_t>() - begin};
}

void OpenFile::flip_bit(size_t byte, int bit) {
  data.at(byte) = static_cast<char>(data[byte] ^ (1 << bit));
}

void OpenFile::save() const {
  const std::string text = header.dump();
  const uint64_t size = text.size();
  std::ofstream(path, std::ios::binary)
      << std::string(reinterpret_cast<const char*>(&size), 8) << text << data;
}

void OpenFile::save_with_checksums() const {
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

OpenFile open_weights(const fs::path& model) { return OpenFile(model / "model.safetensors"); }

}  // namespace lacuna::testing
