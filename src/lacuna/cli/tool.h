// What the verbs share: common flags, output, progress, exit codes.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lacuna/api/jobs.h"
#include "lacuna/core/status.h"

namespace lacuna::cli {

/// One run of the tool. Verbs add themselves (one file each) and leave what to do in `action`.
class Tool {
 public:
  Tool();
  /// Parses and runs. @return the exit code (core/status.h), 0 when all went well
  int run(int argc, char** argv);

  /// Declares a verb with the flags that all share; `examples` are full command lines.
  CLI::App* verb(const std::string& name, const std::string& does,
                 const std::vector<std::string>& examples);
  /// What the verb does once the flags are parsed.
  void action(CLI::App* verb, std::function<Status()> run);

  /// stdout gets the result only: one JSON object with --json, else the text.
  void print(const nlohmann::json& json, const std::string& text);
  bool json() const { return json_; }
  bool quiet() const { return quiet_; }
  uint64_t seed() const { return seed_; }
  /// --device, --dtype, --threads; `dtype` is the verb's own default
  api::ComputeChoice compute(const std::string& dtype = "auto") const;
  /// Progress on stderr: a bar with rate and time left on a terminal, plain lines otherwise,
  /// nothing with -q.
  api::JobProgress progress();

 private:
  CLI::App app_;
  std::function<Status()> run_;
  bool json_ = false, quiet_ = false, verbose_ = false;
  std::string device_ = "auto", dtype_;
  int threads_ = 0;
  uint64_t seed_ = 0;
};

/// Every verb's file defines one of these; verbs.cc lists them.
using AddVerb = void (*)(Tool&);
const std::vector<AddVerb>& verbs();

/// A validator for a flag whose text `parse` must accept; usage errors then come before anything is
/// read.
template <class Parse>
CLI::Validator accepted_by(Parse parse) {
  return CLI::Validator(
      [parse](std::string& text) {
        const auto parsed = parse(text);
        return parsed.ok() ? std::string() : parsed.error().message;
      },
      "");
}

}  // namespace lacuna::cli
