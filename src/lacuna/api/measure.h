// Jobs that measure this machine: the speed of whole models, and the table of fastest candidates.
#pragma once

#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <variant>
#include <vector>

#include "lacuna/api/jobs.h"
#include "lacuna/bench/model_speed.h"
#include "lacuna/bench/tune.h"
#include "lacuna/core/status.h"
#include "lacuna/kernels/select.h"
#include "lacuna/model/synth.h"

namespace lacuna::api {

struct BenchModelJob {
  /// A model folder, or random weights of a known shape, made in memory.
  using Source = std::variant<std::filesystem::path, model::SynthOptions>;
  std::vector<Source> models;
  std::optional<size_t> baseline;  ///< the model that the others are compared with
  bench::ModelSpeedOptions options;
  std::optional<bench::ModelTurns> turns;  ///< when the order comes from outside
  /// A file or data set that each is then evaluated on, with `evaluation`; empty: nothing is.
  std::string text;
  eval::PerplexityOptions evaluation;
  ComputeChoice choice;
};

/// How reports call it: the folder, or the variant: "unstructured@0.5/int8".
std::string name_of(const BenchModelJob::Source& source);

/// How a model came into memory; from a file that the system has cached or not, as it was.
struct LoadSpeed {
  double seconds = 0;
  size_t file_bytes = 0;  ///< of all its tensors
  double gb_per_second = 0;
  /// Most memory of this process before, and until it was loaded.
  size_t memory_before_bytes = 0, peak_memory_bytes = 0;
};

/// One of them; what compares it with the baseline is there if there is one.
struct BenchedModel {
  std::string name;
  std::optional<LoadSpeed> load;  ///< of one that came from a folder
  bench::ModelSpeed speed;
  /// Time of the baseline over time of this, the median over repetitions.
  std::optional<bench::Summary> speedup_prefill, speedup_decode;
  std::optional<double> memory_saving;  ///< share of the baseline's weight bytes that this has less
  std::optional<double> perplexity, ppl_delta;  ///< delta: to the baseline's
};

struct BenchModelReport {
  std::string dtype, device, baseline;  ///< baseline: its name, or empty
  std::vector<BenchedModel> models;     ///< in the order of the job
  size_t peak_bytes = 0;                ///< of this process, all models included
};

/// Loads or makes the models, all in the type that `choice` settles for the first, and times them
/// in turns. @errors of loading, of model::synth_in_memory, of bench::time_models and of evaluate()
Result<BenchModelReport> bench_model(const BenchModelJob& job, const JobProgress& progress = {});
nlohmann::json to_json(const BenchModelReport& report);

struct TuneJob {
  /// A model folder, or problem strings.
  std::vector<std::string> what;
  std::vector<int64_t> tokens = {1, 2, 4, 8, 16};  ///< for the shapes of a model
  bench::CompareOptions options{.seconds = 0.5};
  bool keep = true;  ///< false: a trial, the table stays as it is
  ComputeChoice choice;
};

struct TuneReport {
  std::string file;  ///< empty when nothing was kept
  std::vector<bench::TunedProblem> tuned;
};

/// Measures every problem (those of a model's Linears for each number of tokens; given ones as they
/// are), keeps the winners in the table of this machine and has this process use it.
/// @errors kUsage: neither a folder nor problems; those of loading and of bench::tune. What was
/// measured before an error or an interruption is kept.
Result<TuneReport> tune(const TuneJob& job, const JobProgress& progress = {});
nlohmann::json to_json(const TuneReport& report);

/// What choose() says of a problem on this CPU and on this GPU.
struct OperationReport {
  std::string problem;
  std::vector<kernels::Explanation> candidates;  ///< of the CPU, then of the GPU
  Status status;                                 ///< why none can be chosen on either
};
/// @errors kUsage: no problem string, an unknown operation
Result<OperationReport> explain_operation(const std::string& problem);
nlohmann::json to_json(const OperationReport& report);

}  // namespace lacuna::api
