#include "lacuna/api/verify.h"

#include <algorithm>

#include "lacuna/cli/tool.h"

namespace lacuna::cli {
namespace {

constexpr size_t kShown = 10;  ///< violations, unless all are asked for

}  // namespace

void add_verify(Tool& tool) {
  auto* verb = tool.verb(
      "verify", "Read every tensor back and prove checksums, structure, pattern and sparsity.",
      {"lacuna verify models/llama-24 --expect-pattern 2:4",
       "lacuna verify models/llama-wanda --expect-sparsity 0.5 --against models/llama"});
  struct Flags {
    std::filesystem::path model;
    std::string pattern, against;
    double sparsity = -1;
  };
  static Flags flags;
  verb->add_option("MODEL", flags.model, "model folder")->required();
  verb->add_option("--expect-pattern", flags.pattern, "every sparse layer must follow this pattern")
      ->check(accepted_by(sparse_pattern));
  verb->add_option("--expect-sparsity", flags.sparsity,
                   "share of zeros over the sparse layers, within 0.005 (quantised: of dropped "
                   "weights)")
      ->check(share());
  verb->add_option(
      "--against", flags.against,
      "dense model whose values the kept ones must equal (methods that don't update weights); for "
      "quantised weights, the model that was quantised");
  tool.action(verb, [&tool]() -> Status {
    api::VerifyOptions options;
    if (!flags.pattern.empty()) {
      LACUNA_TRY(options.expect_pattern, sparse_pattern(flags.pattern));
    }
    if (flags.sparsity >= 0) options.expect_sparsity = flags.sparsity;
    if (!flags.against.empty()) options.against = flags.against;
    const auto progress = tool.progress();
    LACUNA_TRY(const auto report,
               api::verify(flags.model, options, [&](int64_t done, int64_t total) {
                 if (progress.step) progress.step("verify", done, total);
               }));
    std::string text;
    const size_t all = report.violations.size(),
                 shown = tool.verbose() ? all : std::min(all, kShown);
    for (size_t i = 0; i < shown; ++i) text += report.violations[i] + "\n";
    if (shown < all) text += fmt::format("... and {} more; -v lists all\n", all - shown);
    if (report.differs)
      text +=
          "SparseGPT updates the weights that it keeps; --against suits magnitude, Wanda and what "
          "convert wrote.\n";
    const char* checksums = !report.ok             ? ""
                            : report.has_checksums ? ", checksums equal"
                                                   : ", no checksums.json";
    text += fmt::format("{}: {}, {} tensors read back, sparsity {:.4f}{}\n", report.model,
                        report.ok ? "ok" : "NOT OK", report.tensors, report.sparsity, checksums);
    tool.print(to_json(report), text);
    if (report.ok) return {};
    return check_failed("{}: {} violation(s){}", report.model, all,
                        tool.json()   ? "; first: " + report.violations.front()
                        : shown < all ? "; the first stand above."
                                      : ", listed above.");
  });
}

}  // namespace lacuna::cli
