// Many ways of pruning one model, from one calibration, side by side; and how far each code goes.
#pragma once

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/api/jobs.h"
#include "lacuna/core/status.h"
#include "lacuna/eval/perplexity.h"
#include "lacuna/prune/pipeline.h"

namespace lacuna::api {

/// What a sweep writes as one word: "0.5", "2:4", "block:16x16@0.5", "2:4+dense@0.4".
struct SweepPattern {
  format::Pattern pattern;
  double sparsity = 0;
  format::Pattern rest = {};  ///< beside dense columns, as prune::Request has it
  /// @errors kUsage
  static Result<SweepPattern> parse(const std::string& text);
  std::string text() const;
};

/// "alps", or with refinements behind it: "alps+swaps+polish". @errors kUsage
Result<prune::MethodChoice> parse_sweep_method(const std::string& text);

/// Which rows are pruned a second time, with statistics through the pruned blocks.
enum class Propagated : uint8_t { kNone, kBest, kAll };
/// "best" (of each pattern) or "all". @errors kUsage
Result<Propagated> parse_propagated(const std::string& name);

struct SweepJob {
  std::filesystem::path model;
  std::filesystem::path statistics;  ///< of the dense model, by `prune --save-statistics`
  std::vector<std::string> methods;
  std::vector<std::string> patterns;
  /// What kept weights become in the same pass, as format::Quantization spells it; "none": nothing.
  std::vector<std::string> codes = {"none"};
  std::string text;  ///< file or data set name to measure on; empty: layer errors alone
  eval::PerplexityOptions evaluation;
  std::filesystem::path
      write;               ///< folder for the models, METHOD-PATTERN each; empty: they go again
  bool resume = false;     ///< with `write`
  bool overwrite = false;  ///< of models that lie there
  double damping = 0.01;
  /// How much higher than the dense model's a perplexity may be on the frontier: 0.05. Nothing: no
  /// frontier.
  std::optional<double> frontier;
  /// Needs `text`, and the calibration that the statistics are of: its tokens are made again, by
  /// the samples, the length and the checksum that the statistics record.
  Propagated propagated = Propagated::kNone;
  std::string calibration;  ///< file, data set name or "self"; empty: "self" if it was that
  std::filesystem::path calibration_ids;  ///< takes precedence when given
  uint64_t seed = 0;                      ///< of that calibration
  ComputeChoice choice;                   ///< pruning takes the device, measuring the type too
};

/// What was measured of a model; absent: not measured.
struct SweepMeasure {
  uint64_t bytes = 0;
  std::optional<double> perplexity, kl;
  std::optional<double> milliseconds;  ///< of a token in the Linears, predicted
  std::string no_milliseconds;         ///< why not
};

struct SweepRow {
  std::string method, pattern, code = "none";
  double sparsity = 0;
  double layer_error = 0;  ///< mean of the layers
  int64_t fell_back = 0;   ///< layers
  /// Of its pattern and code: least perplexity, or where none was measured, error.
  bool best = false;
  SweepMeasure measure;
  /// The same method and pattern with statistics through the pruned blocks.
  std::optional<SweepMeasure> propagated;
  /// What statistics of the dense model cost against those: 0.02 is 2 % more perplexity.
  std::optional<double> lost() const;
  std::filesystem::path folder;  ///< when written
};

/// The largest sparsity, to whole percents, that stays within the tolerance.
struct FrontierRow {
  std::string method, code;        ///< "none", "int8", "int4g64"
  std::optional<double> sparsity;  ///< none: the code alone goes too far already
  SweepMeasure measure;            ///< there, or of the code alone
  int64_t probes = 0;              ///< models that were measured for it
};

struct SweepReport {
  SweepMeasure dense;
  std::vector<SweepRow> rows;
  std::vector<FrontierRow> frontier;
  double frontier_tolerance = 0;
  double prune_seconds = 0;    ///< all rows, from statistics to finished files
  double measure_seconds = 0;  ///< the rest, but for these two
  double compare_seconds = 0;  ///< pruning and measuring `propagated`
  double frontier_seconds = 0;
};

/// What can be known to fail does so before anything is pruned.
/// @errors kUsage: an unknown method, pattern or code; combinations that can't be done (all of
/// them); nothing to sweep; a frontier or a comparison without text; another calibration than that
/// of the statistics; those of prune::prune_variants, convert and evaluate
Result<SweepReport> sweep(const SweepJob& job, const JobProgress& progress = {});

}  // namespace lacuna::api
