#include "lacuna/api/jobs.h"

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/api/calibration.h"
#include "lacuna/api/layers.h"
#include "lacuna/api/predict.h"
#include "lacuna/api/store.h"
#include "lacuna/core/cpu.h"
#include "lacuna/io/gguf/gguf.h"
#include "lacuna/io/gguf/llama2c.h"
#include "lacuna/io/text_source.h"
#include "lacuna/io/tokenizer/chat_template.h"

namespace lacuna::api {
namespace fs = std::filesystem;

namespace {

/// A checkpoint, its spec and the device it will run on.
struct Opened {
  io::Checkpoint checkpoint;
  io::DecoderSpec spec;
  model::Compute compute;
};

Result<Opened> open_model(const fs::path& folder, const ComputeChoice& choice) {
  LACUNA_TRY(auto checkpoint, io::Checkpoint::open(folder));
  LACUNA_TRY(auto spec, model::spec_of(checkpoint));
  if (const auto lines = misfits(checkpoint, spec); !lines.empty())
    return bad_input("{}: {}. Is config.json that of these weights?", folder.string(), lines[0]);
  LACUNA_TRY(auto compute, resolve(choice, spec.dtype));
  return Opened{std::move(checkpoint), std::move(spec), compute};
}

void say(const JobProgress& progress, const std::string& line) {
  if (progress.log) progress.log(line);
}

/// Pruning what is sparse already is allowed; whoever does it by mistake should see it.
void say_if_sparse(const Opened& opened, bool mask_stays, const JobProgress& progress) {
  int64_t sparse = 0, quantised = 0;
  for (const auto& [name, info] : opened.checkpoint.weights()) {
    sparse += info.pattern.kind != format::PatternKind::kDense;
    quantised += !info.quantization.none();
  }
  if (sparse > 0 && !mask_stays)
    say(progress, fmt::format("{}: is sparse already ({} weights); zeros of it may be filled again",
                              opened.checkpoint.folder().string(), sparse));
  if (quantised > 0)
    say(progress,
        fmt::format("{}: is quantised ({} weights); what is written are rounded values, not codes",
                    opened.checkpoint.folder().string(), quantised));
}

/// Has a budget of time know what this machine's layers take. @errors why that can't be told
Status tell_times(const Opened& opened, prune::PruneOptions& options) {
  const auto told = [&]() -> Result<LayerTimes> {
    LACUNA_TRY(const auto table, bench::SpeedTable::here());
    LACUNA_TRY(const auto names, prune::target_names(opened.checkpoint, opened.spec, options));
    const std::set<std::string> pruned(names.begin(), names.end());
    return layer_times(
        opened.checkpoint, opened.spec, options.request.pattern,
        [&](const std::string& name) { return pruned.contains(name); }, table);
  }();
  if (!told.ok())
    return Error{told.error().code, fmt::format("--budget tpot: {}", told.error().message)};
  options.allocation.milliseconds = told->pruned;
  options.allocation.other_milliseconds = told->others;
  return {};
}

/// The first tensor of these models that holds a NaN or infinity, as an error's message.
std::string not_finite(const Opened& opened, const std::optional<Opened>& reference) {
  std::string why = api::not_finite(opened.checkpoint);
  return why.empty() && reference ? api::not_finite(reference->checkpoint) : why;
}

bool is_finite(const eval::PerplexityReport& report) {
  std::vector<double> figures = {report.perplexity, report.mean_nll};
  if (report.kl) {
    const eval::KlStatistics& kl = *report.kl;
    figures.insert(figures.end(), {kl.kl_mean, kl.kl_median, kl.kl_max, kl.delta_p_mean,
                                   kl.delta_p_rms, kl.perplexity_reference, kl.ppl_delta});
  }
  return std::all_of(figures.begin(), figures.end(), [](double f) { return std::isfinite(f); });
}

}  // namespace

Result<model::Compute> resolve(const ComputeChoice& choice, DType own) {
  model::set_threads(choice.threads);
  LACUNA_TRY(const at::Device device, model::open_device(choice.device));
  model::Compute compute{device, at::kFloat, choice.int8_activations, choice.fastest, choice.batch};
  if (choice.dtype == "auto") {
    // A CPU without bf16 products emulates them at a fraction of float32's speed.
    const bool native = device.is_cuda() ? (own == DType::kBF16 || own == DType::kF16)
                                         : (own == DType::kBF16 && cpu_features().avx512_bf16);
    if (native) compute.dtype = model::scalar_type(own);
    return compute;
  }
  const auto dtype = dtype_from_long_name(choice.dtype);
  if (!dtype || (*dtype != DType::kF32 && *dtype != DType::kBF16 && *dtype != DType::kF16))
    return usage_error("--dtype: unknown type (got {}; need auto, float32, bfloat16 or float16).",
                       choice.dtype);
  compute.dtype = model::scalar_type(*dtype);
  return compute;
}

Result<model::Decoder> load_decoder(const fs::path& folder, const ComputeChoice& choice) {
  LACUNA_TRY(const Opened opened, open_model(folder, choice));
  return model::Decoder::load(opened.checkpoint, opened.compute);
}

Result<prune::PruneReport> prune(const PruneJob& job, const JobProgress& progress) {
  LACUNA_TRY(const prune::Method method, prune::method_of(job.options));
  LACUNA_TRY(const Opened opened, open_model(job.model, job.choice));
  say_if_sparse(opened, job.options.request.keep_mask, progress);
  if (!method.needs_inputs() && (job.calibration != "self" || !job.calibration_ids.empty()) &&
      job.options.reconstruct.none() && !job.options.allocation.needs_inputs())
    say(progress, fmt::format("--method {}: looks at no inputs; the calibration measures the "
                              "layers' errors at most",
                              method.name()));
  prune::CalibrationSource source;
  // Statistics that are there already need no calibration.
  const bool there = !job.options.statistics.empty();
  if (!job.options.save_statistics.empty() ||
      (!there && (method.needs_inputs() || job.options.allocation.needs_inputs() ||
                  !job.options.reconstruct.none() || !job.calibration_ids.empty()))) {
    LACUNA_TRY(source, calibration_of({.model = job.model,
                                       .ids = job.calibration_ids,
                                       .text = job.calibration,
                                       .samples = job.samples,
                                       .length = job.length,
                                       .seed = job.options.seed,
                                       .compute = job.choice},
                                      opened.checkpoint, opened.spec, progress));
    if (!job.save_calibration_ids.empty())
      source.make = [&job, make = source.make]() -> Result<prune::Calibration> {
        LACUNA_TRY(auto calibration, make());
        LACUNA_CHECK(prune::save_calibration_ids(calibration, job.save_calibration_ids));
        return calibration;
      };
  }
  prune::PruneOptions options = job.options;
  options.compute = opened.compute;
  if (const auto& budget = options.allocation.budget;
      budget && budget->kind == prune::Budget::Kind::kMilliseconds)
    LACUNA_CHECK(tell_times(opened, options));
  return prune::prune_model(opened.checkpoint, source, job.out, options,
                            {progress.log,
                             [&](int64_t done, int64_t total, const std::string& what) {
                               if (progress.step) progress.step(what, done, total);
                             },
                             progress.interrupted});
}

Result<eval::PerplexityReport> evaluate(const EvalJob& job, const JobProgress& progress) {
  LACUNA_TRY(const fs::path text, io::find_dataset(job.text, io::Split::kTest));
  LACUNA_TRY(const Opened opened, open_model(job.model, job.choice));
  LACUNA_TRY(const auto tokenizer, io::Tokenizer::open(job.model));
  LACUNA_TRY(const auto ids, eval::evaluation_ids(text.string(), job.options.protocol, *tokenizer));
  LACUNA_TRY(const auto decoder, model::Decoder::load(opened.checkpoint, opened.compute));
  std::optional<Opened> dense;
  std::optional<model::Decoder> reference;
  if (job.compare) {
    LACUNA_TRY(dense, open_model(*job.compare, job.choice));
    LACUNA_TRY(reference, model::Decoder::load(dense->checkpoint, opened.compute));
  }
  const auto step = [&](int64_t done, int64_t total, double so_far) {
    if (progress.step) progress.step(fmt::format("perplexity {:.3f}", so_far), done, total);
  };
  LACUNA_TRY(auto report,
             eval::perplexity(decoder, ids, job.options, reference ? &*reference : nullptr, step,
                              progress.interrupted));
  report.text = text.string();
  if (is_finite(report)) return report;
  if (const std::string why = not_finite(opened, dense); !why.empty()) return bad_input("{}", why);
  return check_failed(
      "{}: not all figures are finite numbers (got perplexity {}, reference {}). Try --dtype "
      "float32.",
      job.model.string(), report.perplexity,
      report.kl ? report.kl->perplexity_reference : report.perplexity);
}

namespace {

/// The ids of each prompt, put through the chat template if the job wants that.
Result<std::vector<std::vector<int32_t>>> prompt_ids_of(const GenerateJob& job,
                                                        const io::Tokenizer& tokenizer) {
  std::optional<io::ChatTemplate> chat;
  if (job.chat) {
    LACUNA_TRY(chat, io::ChatTemplate::open(job.model));
  }
  std::vector<std::vector<int32_t>> all;
  for (const std::string& prompt :
       job.prompts.empty() ? std::vector<std::string>{job.prompt} : job.prompts)
    all.push_back(chat ? tokenizer.encode(chat->render({{"user", prompt}}), false)
                       : tokenizer.encode(prompt, true));
  return all;
}

Result<std::vector<model::Generation>> answers_of(const GenerateJob& job,
                                                  const model::Decoder& decoder,
                                                  const io::Tokenizer& tokenizer,
                                                  const std::vector<std::vector<int32_t>>& prompts,
                                                  const JobProgress& progress) {
  if (!job.prompts.empty())
    return model::generate_batch(decoder, tokenizer, prompts, job.options, progress.interrupted);
  LACUNA_TRY(auto generation, model::generate(decoder, tokenizer, prompts.front(), job.options,
                                              job.on_text, progress.interrupted));
  return std::vector<model::Generation>{std::move(generation)};
}

}  // namespace

Result<GenerateReport> generate(const GenerateJob& job, const JobProgress& progress) {
  ComputeChoice choice = job.choice;
  choice.batch = std::max<int64_t>(1, static_cast<int64_t>(job.prompts.size()));
  LACUNA_TRY(const Opened opened, open_model(job.model, choice));
  LACUNA_TRY(const auto tokenizer, io::Tokenizer::open(job.model));
  GenerateReport report;
  LACUNA_TRY(const auto prompts, prompt_ids_of(job, *tokenizer));
  report.prompt_ids = prompts.front();
  LACUNA_TRY(const auto decoder, model::Decoder::load(opened.checkpoint, opened.compute));
  auto generations = answers_of(job, decoder, *tokenizer, prompts, progress);
  if (!generations.ok() && generations.error().code == Code::kCheckFailed)
    if (const std::string why = not_finite(opened, std::nullopt); !why.empty())
      return check_failed("{}", why);
  LACUNA_TRY(report.generations, std::move(generations));
  report.generation = report.generations.front();
  report.dtype = long_name(model::dtype_of(opened.compute.dtype));
  report.device = opened.compute.device.str();
  return report;
}

Result<ConvertReport> convert(const fs::path& model, const fs::path& out,
                              const ConvertOptions& options, const JobProgress& progress) {
  ConvertReport report;
  report.out = out.string();
  if (!fs::exists(model))
    return bad_input("{}: no such file or folder. Give a model folder or a .gguf file.",
                     model.string());
  const Executor executor = model::torch_executor();
  if (fs::is_regular_file(model)) {
    if (!options.quantization.none())
      return usage_error(
          "--quantize: needs a model folder (got the file {}). Convert the file first, then the "
          "folder.",
          model.string());
    if (io::exchange_kind(options.store) != format::ExchangeKind::kNone)
      return usage_error(
          "--format: csr, coo and bsr need a model folder (got the file {}). Convert the file "
          "first, "
          "then the folder.",
          model.string());
    if (model.extension() == ".bin") {
      LACUNA_TRY(const auto done, io::llama2c_to_folder(model, out));
      report.bytes_in = done.bytes_in, report.bytes_out = done.bytes_out;
      return report;
    }
    LACUNA_TRY(const auto done, io::gguf_to_folder(model, out, executor));
    report.bytes_in = done.bytes_in, report.bytes_out = done.bytes_out;
    return report;
  }
  return convert_store(model, out, options, [&](int64_t done, int64_t total) {
    if (progress.step) progress.step("weights", done, total);
  });
}

}  // namespace lacuna::api
