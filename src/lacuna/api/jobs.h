// Whole jobs, as a person names them: folders and words in, a report out. The command line and
// SparsityManager are two ways to fill in the same jobs.
#pragma once

#include <atomic>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "lacuna/core/status.h"
#include "lacuna/eval/perplexity.h"
#include "lacuna/io/tokenizer/tokenizer.h"
#include "lacuna/model/decoder.h"
#include "lacuna/model/generate.h"
#include "lacuna/prune/pipeline.h"

namespace lacuna::api {

/// Where and how to compute. dtype "auto": the model's own where this device multiplies it at full
/// speed, else float32.
struct ComputeChoice {
  std::string device = "auto";   ///< auto, cpu, cuda
  std::string dtype = "auto";    ///< auto, float32, bfloat16, float16
  int threads = 0;               ///< 0 = all cores
  bool int8_activations = true;  ///< model::Compute
  bool fastest = false;          ///< model::Compute
  int64_t batch = 1;             ///< model::Compute
};
/// @param own  dtype of the model
Result<model::Compute> resolve(const ComputeChoice& choice, DType own);

/// A model in memory, ready to run; sets the number of threads. @errors those of opening and
/// loading
Result<model::Decoder> load_decoder(const std::filesystem::path& folder,
                                    const ComputeChoice& choice);

/// How a job tells what it is doing; every member may be empty.
struct JobProgress {
  std::function<void(const std::string& line)> log;
  std::function<void(const std::string& phase, int64_t done, int64_t total)> step;
  const std::atomic<bool>* interrupted = nullptr;
};

struct PruneJob {
  std::filesystem::path model, out;
  prune::PruneOptions options;  ///< `compute` is filled in from `choice`
  ComputeChoice choice{.dtype = "float32"};
  std::string calibration = "self";            ///< file, data set name, or "self"
  std::filesystem::path calibration_ids;       ///< takes precedence when given
  std::filesystem::path save_calibration_ids;  ///< when given, the token ids used are written there
  int64_t samples = 128, length = 2048;
};
/// Opens, calibrates, prunes, writes. @errors those of the steps
Result<prune::PruneReport> prune(const PruneJob& job, const JobProgress& progress = {});

struct EvalJob {
  std::filesystem::path model;
  std::string text;  ///< file or data set name
  std::optional<std::filesystem::path> compare;
  eval::PerplexityOptions options;
  ComputeChoice choice;
};
Result<eval::PerplexityReport> evaluate(const EvalJob& job, const JobProgress& progress = {});

struct GenerateJob {
  std::filesystem::path model;
  std::string prompt;
  bool chat = false;
  model::GenerateOptions options;
  ComputeChoice choice;
  std::function<void(std::string_view)> on_text;
  /// Answered at once, in place of `prompt`; on_text hears nothing of them.
  std::vector<std::string> prompts;
};
struct GenerateReport {
  model::Generation generation;  ///< of the first prompt
  std::vector<int32_t> prompt_ids;
  std::vector<model::Generation> generations;  ///< of all `prompts`
  std::string dtype, device;
};
Result<GenerateReport> generate(const GenerateJob& job, const JobProgress& progress = {});

struct ConvertOptions {
  io::Store store = io::Store::kCompact;
  format::Pattern blocks;  ///< of bsr, as io::CheckpointWriter::Options has them
  /// What the Linears of the blocks become; nothing by default. Embedding and output matrix become
  /// int8 with one scale a row then, unless `keep_head`.
  format::Quantization quantization;
  bool keep_head = false;
};
struct QuantizedWeight {
  std::string name, pattern, from, to;  ///< from: type of the values
  uint64_t bytes_in = 0, bytes_out = 0;
  int64_t kept = 0, rounded_to_zero = 0;  ///< weights; the latter stay kept
};
struct ConvertReport {
  uint64_t bytes_in = 0, bytes_out = 0;
  std::string out;
  std::vector<QuantizedWeight> quantized;  ///< their masks were compared in what was written
};
/// A GGUF file, a llama2.c .bin (with tokenizer.model beside it) or a model folder into a folder of
/// another store; a model folder into a quantised one, if asked.
/// @errors kBadInput: a model that is quantised already, where codes are asked for; a weight that
/// can't be quantised (named); codes for an exchange format; kUsage: codes or an exchange format of
/// a file, codes in a store that has none; kCheckFailed: a mask that was written is not the one
/// that was read
Result<ConvertReport> convert(const std::filesystem::path& model, const std::filesystem::path& out,
                              const ConvertOptions& options = {}, const JobProgress& progress = {});

/// "compact", "dense", "compressed-tensors", "csr", "coo" or "bsr". @errors kUsage, naming the
/// option
Result<io::Store> parse_store(const std::string& name, std::string_view option = "--store");

}  // namespace lacuna::api
