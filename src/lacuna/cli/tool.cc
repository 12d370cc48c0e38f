#include "lacuna/cli/tool.h"

#include <fmt/ranges.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <memory>

#include "lacuna/api/verify.h"
#include "lacuna/cli/progress.h"
#include "lacuna/core/clock.h"
#include "lacuna/core/memory.h"
#include "lacuna/core/version.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/kernels/linear.h"
#include "lacuna/prune/journal.h"

namespace lacuna::cli {
namespace {

std::atomic<bool> interrupted{false};

void on_interrupt(int) {
  // A second signal ends the process at once.
  if (interrupted.exchange(true)) std::_Exit(130);
  constexpr std::string_view kText = "\nstopping at the next safe point; once more stops at once\n";
  [[maybe_unused]] const auto written = write(STDERR_FILENO, kText.data(), kText.size());
}

/// A flag's number must fulfil `accepts`; what isn't a number at all is told by the conversion.
template <class Accepts>
CLI::Validator number(std::string need, Accepts accepts) {
  return CLI::Validator(
      [need = std::move(need), accepts](std::string& text) {
        char* end = nullptr;
        const double value = std::strtod(text.c_str(), &end);
        const bool fine = end == text.c_str() || *end != '\0' || accepts(value);
        return fine ? std::string() : fmt::format("out of range (got {}; need {})", text, need);
      },
      "");
}

}  // namespace

CLI::Validator between(double low, double high) {
  return number(
      std::isinf(high) ? fmt::format("at least {:g}", low) : fmt::format("{:g} to {:g}", low, high),
      [=](double value) { return value >= low && value <= high; });
}

CLI::Validator share() {
  return number("a share, 0 to 1: half is 0.5, not 50",
                [](double value) { return value >= 0 && value <= 1; });
}

CLI::Validator above(double low) {
  return number(fmt::format("more than {:g}", low), [=](double value) { return value > low; });
}

CLI::Validator named_like(std::vector<std::string> endings) {
  return CLI::Validator(
      [endings = std::move(endings)](std::string& file) {
        const bool fine = std::ranges::any_of(
            endings, [&](const std::string& ending) { return file.ends_with(ending); });
        return fine ? std::string()
                    : fmt::format("need a name that ends in {} (got {})",
                                  fmt::join(endings, " or "), file);
      },
      "");
}

Result<format::Pattern> sparse_pattern(const std::string& text) {
  LACUNA_TRY(const auto pattern, format::Pattern::parse(text));
  if (pattern.kind == format::PatternKind::kDense)
    return usage_error("dense is no sparse pattern (need unstructured, KEEP:OF or block:RxC).");
  return pattern;
}

Result<double> settle_sparsity(const format::Pattern& pattern, double sparsity, bool given) {
  if (pattern.kind != format::PatternKind::kKeepOf) return sparsity;
  const double implied = pattern.sparsity();
  if (given && std::abs(sparsity - implied) > 1e-9)
    return usage_error(
        "--sparsity: {} disagrees with --pattern {} (which gives {:g}). Leave --sparsity out.",
        sparsity, pattern.text(), implied);
  return implied;
}

Result<format::Quantization> parse_codes(const std::string& code, int64_t group, bool zero_points) {
  auto codes = format::Quantization::parse(fmt::format(
      "{}{}{}", code, group > 0 ? fmt::format("g{}", group) : "", zero_points ? "z" : ""));
  if (codes.ok() && codes->none())
    return usage_error("--quantize: none asks for nothing. Leave it out.");
  if (!codes.ok()) return usage_error("--quantize: {}", codes.error().message);
  return codes;
}

std::string without_flag(const std::string& message) {
  const size_t colon = message.find(": ");
  return message.starts_with("--") && colon != std::string::npos ? message.substr(colon + 2)
                                                                 : message;
}

Tool::Tool()
    : app_("Lacuna makes large language models sparse and makes the sparsity pay.", "lacuna") {
  app_.set_version_flag("--version", std::string("lacuna ") + kVersion);
  app_.require_subcommand(0, 1);  // none is told by run(): CLI11 would not name a wrong one
  app_.footer(
      "Exit codes: 0 ok, 1 the run or the check failed, 2 usage, 3 bad input, 4 not possible here, "
      "130 interrupted.\n`lacuna VERB --help` shows flags and examples.");
}

CLI::App* Tool::verb(const std::string& name, const std::string& does,
                     const std::vector<std::string>& examples) {
  CLI::App* verb = app_.add_subcommand(name, does);
  verb->add_flag("--json", json_, "print one JSON object");
  verb->add_flag("-q,--quiet", quiet_, "no progress, no remarks");
  verb->add_flag("-v,--verbose", verbose_, "say how long it took and how much memory");
  std::string footer = "Examples:";
  for (const std::string& example : examples) footer += "\n  " + example;
  verb->footer(footer);
  return verb;
}

void Tool::computes(CLI::App* verb) {
  verb->add_option("--device", device_, "where to compute")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  chooses_types(verb);
  threaded(verb);
}

void Tool::runs_sparse(CLI::App* verb) {
  computes(verb);
  verb->add_option("--memory", memory_,
                   "on a GPU: compact keeps a sparse weight once, fastest also in other forms and "
                   "dense, and takes the fastest for every number of tokens")
      ->check(CLI::IsMember({"compact", "fastest"}))
      ->capture_default_str();
}

void Tool::chooses_types(CLI::App* verb) {
  verb->add_option("--dtype", dtype_, "type to compute in (default: the verb's own)")
      ->check(CLI::IsMember({"auto", "float32", "bfloat16", "float16"}));
  verb->add_option(
          "--activations", activations_,
          "what weights in codes multiply: int8 (rounded per token; fp8 weights on a GPU: to "
          "fp8), or bf16: as they come, in --dtype (slower)")
      ->check(CLI::IsMember({"int8", "bf16"}))
      ->capture_default_str();
}

void Tool::threaded(CLI::App* verb) {
  verb->add_option("--threads", threads_, "threads (0 = all cores)")->check(between(0));
}

void Tool::seeded(CLI::App* verb) {
  verb->add_option("--seed", seed_, "seed of everything random")
      ->check(between(0))
      ->capture_default_str();
}

void Tool::model(CLI::App* verb, std::filesystem::path& folder, const std::string& what) {
  verb->add_option("MODEL", folder, what)->required();
  verb->add_flag("--verify", verify_, "compare MODEL with its checksums first");
  models_[verb] = &folder;
}

void Tool::writes(CLI::App* verb, std::filesystem::path& folder) {
  verb->add_option("-o,--out", folder, "folder to write")->required();
  verb->add_flag("--overwrite", overwrite_, "replace a finished model there");
  outs_[verb] = &folder;
}

void Tool::action(CLI::App* verb, std::function<Status()> run) {
  verb->callback([this, verb, run = std::move(run)] {
    run_ = [this, verb, run]() -> Status {
      // With a journal beside it, it is a run to go on with: `prune` knows.
      if (const auto given = outs_.find(verb); given != outs_.end() && !overwrite_) {
        const std::filesystem::path out = io::folder_path(*given->second);
        if (!prune::Journal::exists(out)) LACUNA_CHECK(io::check_free(out));
      }
      if (verify_) LACUNA_CHECK(api::check_checksums(*models_.at(verb)));
      return run();
    };
  });
}

void Tool::print(const nlohmann::json& json, const std::string& text) {
  // Model output may hold invalid UTF-8; JSON gets replacement characters instead of an exception.
  const std::string out =
      json_ ? json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace) + "\n" : text;
  std::fwrite(out.data(), 1, out.size(), stdout);
  std::fflush(stdout);
}

api::ComputeChoice Tool::compute(const std::string& dtype) const {
  return {device_, dtype_.empty() ? dtype : dtype_, threads_, activations_ == "int8",
          memory_ == "fastest"};
}

api::JobProgress Tool::progress() {
  api::JobProgress progress;
  if (quiet_) return progress;
  auto bar = std::make_shared<Progress>();
  progress.log = [bar](const std::string& line) { bar->log(line); };
  progress.step = [bar](const std::string& phase, int64_t done, int64_t total) {
    bar->step(phase, done, total);
  };
  return progress;
}

api::JobProgress Tool::stoppable_progress() {
  std::signal(SIGINT, on_interrupt);
  std::signal(SIGTERM, on_interrupt);
  api::JobProgress stoppable = progress();
  stoppable.interrupted = &interrupted;
  return stoppable;
}

bool Tool::knows(std::string_view verb) {
  return !app_.get_subcommands([&](const CLI::App* one) { return one->get_name() == verb; })
              .empty();
}

namespace {

/// The exit code of a verb that did its work: 0 if whoever reads standard output got all of it.
int written() {
  std::cout.flush();  // CLI11 prints there
  if (std::cout.good() && std::fflush(stdout) == 0 && std::ferror(stdout) == 0) return 0;
  std::fputs("lacuna: standard output can't be written (is the disk full?).\n", stderr);
  return static_cast<int>(Code::kCheckFailed);
}

}  // namespace

int Tool::run(int argc, char** argv) {
  for (AddVerb add : verbs()) add(*this);
  if (argc > 1 && argv[1][0] != '-' && !knows(argv[1])) {
    std::fprintf(stderr, "lacuna: %s: no such verb. `lacuna --help` lists them.\n", argv[1]);
    return static_cast<int>(Code::kUsage);
  }
  try {
    app_.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    // --help and --version are "errors" with exit code 0 to CLI11.
    return app_.exit(error) == 0 ? written() : static_cast<int>(Code::kUsage);
  }
  if (!run_) {
    std::fputs(app_.help().c_str(), stderr);
    return static_cast<int>(Code::kUsage);
  }
  tuned_ = bench::use_tuned();
  if (!tuned_.remark.empty() && !quiet_)
    std::fprintf(stderr, "lacuna: %s\n", tuned_.remark.c_str());
  const auto start = Clock::now();
  const Status forced = kernels::check_forced();
  const Status status = forced.ok() ? run_verb() : forced;
  const double seconds = seconds_since(start);
  if (verbose_)
    std::fprintf(stderr, "[%.1f s, at most %s of memory]\n", seconds,
                 bytes_text(peak_memory_bytes()).c_str());
  if (status.ok()) return written();
  if (!status.error().message.empty())
    std::fprintf(stderr, "lacuna: %s\n", status.error().message.c_str());
  return static_cast<int>(status.error().code);
}

Status Tool::run_verb() {
  try {
    return run_();
  } catch (const std::bad_alloc&) {
    return not_possible(
        "out of memory. Use a smaller model, fewer --samples or a shorter --length.");
  } catch (const std::exception& error) {
    // torch reports its own failures by exceptions; they end here.
    return check_failed("{}", model::what(error));
  }
}

int run(int argc, char** argv) { return Tool().run(argc, argv); }

}  // namespace lacuna::cli
