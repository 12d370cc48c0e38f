// What the verbs share: common flags, output, progress, exit codes.
#pragma once

#include <CLI/CLI.hpp>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "lacuna/api/jobs.h"
#include "lacuna/bench/tune.h"
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
  // Flags of the verbs that have a use for them.
  /// --device and those of chooses_types() and threaded().
  void computes(CLI::App* verb);
  /// Those of computes(), and --memory: how sparse weights lie in memory.
  void runs_sparse(CLI::App* verb);
  void chooses_types(CLI::App* verb);  ///< --dtype, --activations
  void threaded(CLI::App* verb);       ///< --threads
  void seeded(CLI::App* verb);         ///< --seed
  /// Declares a verb's positional MODEL, and --verify, which has its checksums compared before the
  /// verb does anything.
  void model(CLI::App* verb, std::filesystem::path& folder, const std::string& what);
  /// Declares -o for the folder that the verb writes, and --overwrite, without which a finished
  /// model there is refused before the verb does anything.
  void writes(CLI::App* verb, std::filesystem::path& folder);
  /// What the verb does once the flags are parsed.
  void action(CLI::App* verb, std::function<Status()> run);

  /// stdout gets the result only: one JSON object with --json, else the text.
  void print(const nlohmann::json& json, const std::string& text);
  bool json() const { return json_; }
  bool quiet() const { return quiet_; }
  bool verbose() const { return verbose_; }
  uint64_t seed() const { return seed_; }
  /// The measured table that kernels are chosen by, read when the tool started.
  const bench::TunedUse& tuned() const { return tuned_; }
  /// --device, --dtype, --threads, --activations; `dtype` is the verb's own default
  api::ComputeChoice compute(const std::string& dtype = "auto") const;
  /// Progress on stderr: a bar with rate and time left on a terminal, plain lines otherwise,
  /// nothing with -q.
  api::JobProgress progress();
  /// The same for a job that looks at `interrupted` and stops cleanly at the next safe point.
  /// Ctrl-C ends every other job at once; nothing half-written has its final name.
  api::JobProgress stoppable_progress();

 private:
  bool knows(std::string_view verb);
  Status run_verb();

  CLI::App app_;
  std::function<Status()> run_;
  std::map<const CLI::App*, const std::filesystem::path*> models_, outs_;
  bool json_ = false, quiet_ = false, verbose_ = false, verify_ = false, overwrite_ = false;
  std::string device_ = "auto", dtype_, activations_ = "int8", memory_ = "compact";
  int threads_ = 0;
  uint64_t seed_ = 0;
  bench::TunedUse tuned_;
};

/// Every verb's file defines one of these; verbs.cc lists them.
using AddVerb = void (*)(Tool&);
const std::vector<AddVerb>& verbs();

/// Numbers from `low` to `high`, both included; NaN is none of them.
CLI::Validator between(double low, double high = std::numeric_limits<double>::infinity());
/// Shares of a whole, from 0 to 1.
CLI::Validator share();
/// Numbers above `low`.
CLI::Validator above(double low);

/// Names of files that end in one of these: their form follows from it.
CLI::Validator named_like(std::vector<std::string> endings);

/// A pattern that leaves zeros ("dense" doesn't). @errors kUsage
Result<format::Pattern> sparse_pattern(const std::string& text);
/// The sparsity that --pattern and --sparsity give together; `given`: --sparsity was on the command
/// line. @errors kUsage: it disagrees with KEEP:OF
Result<double> settle_sparsity(const format::Pattern& pattern, double sparsity, bool given);

/// What --quantize asks for: a code as format::Quantization reads it, with the group and zero
/// points of flags beside it (0, false: not given). @errors kUsage
Result<format::Quantization> parse_codes(const std::string& code, int64_t group = 0,
                                         bool zero_points = false);

/// A message without the flag that it begins with, for CLI11 says that itself.
std::string without_flag(const std::string& message);

/// A validator for a flag whose text `parse` must accept; usage errors then come before anything is
/// read.
template <class Parse>
CLI::Validator accepted_by(Parse parse) {
  return CLI::Validator(
      [parse](std::string& text) {
        const auto parsed = parse(text);
        return parsed.ok() ? std::string() : without_flag(parsed.error().message);
      },
      "");
}

}  // namespace lacuna::cli
