#include "lacuna/cli/tool.h"

#include <csignal>
#include <cstdio>
#include <memory>

#include "lacuna/cli/progress.h"
#include "lacuna/core/version.h"

namespace lacuna::cli {
namespace {

std::atomic<bool> interrupted{false};

void on_interrupt(int) {
  // A second signal ends the process at once.
  if (interrupted.exchange(true)) std::_Exit(130);
}

}  // namespace

Tool::Tool()
    : app_("Lacuna makes large language models sparse and makes the sparsity pay.", "lacuna") {
  app_.set_version_flag("--version", std::string("lacuna ") + kVersion);
  app_.require_subcommand(1);
  app_.footer(
      "Exit codes: 0 ok, 1 the run or the check failed, 2 usage, 3 bad input, 4 not possible here, "
      "130 interrupted.\n`lacuna VERB --help` shows flags and examples.");
}

CLI::App* Tool::verb(const std::string& name, const std::string& does,
                     const std::vector<std::string>& examples) {
  CLI::App* verb = app_.add_subcommand(name, does);
  verb->add_flag("--json", json_, "print one JSON object");
  verb->add_option("--device", device_, "where to compute")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  verb->add_option("--dtype", dtype_, "type to compute in (default: the verb's own)")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16", "float16"}));
  verb->add_option("--threads", threads_, "threads (0 = all cores)")->check(CLI::NonNegativeNumber);
  verb->add_option("--seed", seed_, "seed of everything random")->capture_default_str();
  verb->add_flag("-q,--quiet", quiet_, "no progress, no remarks");
  verb->add_flag("-v,--verbose", verbose_, "say more");
  std::string footer = "Examples:";
  for (const std::string& example : examples) footer += "\n  " + example;
  verb->footer(footer);
  return verb;
}

void Tool::action(CLI::App* verb, std::function<Status()> run) {
  verb->callback([this, run = std::move(run)] { run_ = run; });
}

void Tool::print(const nlohmann::json& json, const std::string& text) {
  // Model output may hold invalid UTF-8; JSON gets replacement characters instead of an exception.
  const std::string out =
      json_ ? json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n" : text;
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

api::ComputeChoice Tool::compute(const std::string& dtype) const {
  return {device_, dtype_.empty() ? dtype : dtype_, threads_};
}

api::JobProgress Tool::progress() {
  api::JobProgress progress;
  progress.interrupted = &interrupted;
  if (quiet_) return progress;
  auto bar = std::make_shared<Progress>();
  progress.log = [bar](const std::string& line) { bar->log(line); };
  progress.step = [bar](const std::string& phase, int64_t done, int64_t total) {
    bar->step(phase, done, total);
  };
  return progress;
}

int Tool::run(int argc, char** argv) {
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  for (AddVerb add : verbs()) add(*this);
  try {
    app_.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // --help and --version are "errors" with exit code 0 to CLI11.
    return app_.exit(error) == 0 ? 0 : static_cast<int>(Code::kUsage);
  }
  Status status;
  try {
    status = run_();
  } catch (const std::bad_alloc&) {
    status = not_possible(
        "lacuna: out of memory. Use a smaller model, fewer --samples or a shorter --length.");
  } catch (const std::exception& error) {
    // torch reports its own failures by exceptions; they end here.
    status = check_failed("lacuna: {}", error.what());
  }
  if (status.ok()) return 0;
  if (!status.error().message.empty())
    std::fprintf(stderr, "lacuna: %s\n", status.error().message.c_str());
  return static_cast<int>(status.error().code);
}

}  // namespace lacuna::cli
