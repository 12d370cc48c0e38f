#include "lacuna/prune/pipeline.h"

#include <future>

#include "lacuna/core/clock.h"
#include "lacuna/core/memory.h"
#include "lacuna/io/file.h"
#include "lacuna/model/decoder.h"
#include "lacuna/prune/about.h"
#include "lacuna/prune/activations.h"
#include "lacuna/prune/allocation_pass.h"
#include "lacuna/prune/budget.h"
#include "lacuna/prune/finished_model.h"
#include "lacuna/prune/gradient_pass.h"
#include "lacuna/prune/journal.h"
#include "lacuna/prune/prune_linear.h"
#include "lacuna/prune/reconstruction_pass.h"
#include "lacuna/prune/run.h"
#include "lacuna/prune/statistics_pass.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

Status check_length(int64_t length, const io::DecoderSpec& spec) {
  if (length > spec.max_positions)
    return usage_error(
        "--length: samples are longer than the model's positions (got {}; need {} at most).",
        length, spec.max_positions);
  return {};
}

Status check_calibration(const Calibration& calibration, const io::DecoderSpec& spec) {
  LACUNA_CHECK(check_length(calibration.length(), spec));
  for (const auto& row : calibration.ids)
    for (const int32_t id : row)
      if (id < 0 || id >= spec.vocab)
        return bad_input("{}: token id outside the vocabulary (got {}; need 0 to {}).",
                         calibration.source, id, spec.vocab - 1);
  return {};
}

/// What of the options can't be done together, or not without calibration.
Status check_options(const Run& run) {
  const PruneOptions& options = run.options;
  const bool calibrated = run.passes.samples > 0;
  if (run.method->needs_inputs() && !calibrated && options.statistics.empty())
    return usage_error("--method {}: needs calibration (got none). Give --calibration.",
                       run.method->name());
  if (options.allocation.needs_inputs() && !calibrated && options.statistics.empty())
    return usage_error("--allocate {}: needs calibration (got none). Give --calibration.",
                       allocation_name(options.allocation.by));
  if (!options.reconstruct.none() && run.passes.on_disk)
    return usage_error(
        "--reconstruct: needs the calibration itself, which runs through the blocks (got "
        "statistics of the dense model). Leave --statistics and --save-statistics out.");
  if (!options.reconstruct.none() && !calibrated)
    return usage_error("--reconstruct: needs calibration (got none). Give --calibration.");
  LACUNA_CHECK(check_allocation(options.allocation, options.request, options.store));
  if ((run.passes.slope != Slope::kNone && !calibrated) ||
      (run.passes.wants_regional_gradients() && run.passes.on_disk))
    return usage_error(
        "--score: gradients of {} need calibration text that runs through the blocks. Leave "
        "--statistics and --save-statistics out.",
        run.method->name());
  return {};
}

class Pipeline {
 public:
  Pipeline(const io::Checkpoint& checkpoint, const CalibrationSource& source, const fs::path& out,
           const PruneOptions& options, const PruneProgress& progress)
      : source_(source), run_(checkpoint, out, options, progress) {
    Request& request = run_.options.request;
    request.executor = model::executor_for(options.compute.device);
    request.coder = model::torch_executor();
    request.rounded_products =
        options.compute.device.is_cuda() && options.compute.dtype != at::kFloat;
  }

  Result<PruneReport> run();
  /// The same in steps, for several runs side by side: begin(), prune_from() for every block,
  /// finish().
  Status begin();
  /// @param inputs  statistics of the block, on the device; what is derived from them stays there
  Status prune_from(int64_t layer, InputsByTarget inputs);
  Result<PruneReport> finish();
  /// After begin(), in place of the blocks and finish(): as finished_model.h has it.
  Result<std::optional<PruneReport>> finished_before(bool overwrite) {
    return prune::finished_before(run_, *journal_, overwrite);
  }
  int64_t layers() const { return run_.spec.layers; }

 private:
  /// States what the run will take, and where its activations lie. @errors kNotPossible: more than
  /// PruneOptions::memory
  Status plan_memory();
  uint64_t states_bytes() const;  ///< of the activations between two blocks
  Status calibrate();
  Status blocks_or_nothing();
  /// Until all that was finished is durable. @errors as Journal::write()
  Status written() { return writing_.valid() ? writing_.get() : Status(); }
  /// A run that fails before it has finished a block leaves nothing behind.
  Status ended(Status done);
  Status blocks();
  Status resume_block(int64_t layer, model::Block* block);
  Status prune_block(int64_t layer, model::Block* block);
  Status prune_targets(int64_t layer, model::Block* block, InputsByTarget inputs);

  const CalibrationSource& source_;
  Run run_;
  Clock::time_point start_;
  std::optional<Activations> activations_;       // none without calibration
  std::optional<Activations> dense_;             // of the dense blocks, for a reconstruction
  std::map<std::string, Tensor> reconstructed_;  // by name, in place of the journal's
  std::optional<Journal> journal_;
  std::future<Status> writing_;  // of a block, while the next one is under work
  int64_t resumed_ = 0;          // blocks that an earlier process finished
};

Result<PruneReport> Pipeline::run() {
  LACUNA_CHECK(begin());
  LACUNA_CHECK(blocks_or_nothing());
  if (run_.options.reconstruct.model) {
    activations_.reset();
    LACUNA_TRY(reconstructed_, reconstruct_model(run_, *journal_, *dense_));
    dense_.reset();
  }
  return finish();
}

Status Pipeline::begin() {
  start_ = Clock::now();
  PruneOptions& options = run_.options;
  LACUNA_TRY(run_.method, method_of(options));
  LACUNA_TRY(run_.spec, model::spec_of(run_.checkpoint));
  run_.passes = Passes(run_.spec, source_.samples, options, run_.method->slope());
  LACUNA_TRY(run_.targets, find_targets(run_.checkpoint, run_.spec, options));
  LACUNA_CHECK(choose_refined(run_));
  LACUNA_CHECK(check_length(source_.length, run_.spec));
  LACUNA_CHECK(check_options(run_));
  if (options.request.pattern.kind == format::PatternKind::kKeepOf)
    options.request.sparsity = options.request.pattern.sparsity();
  LACUNA_CHECK(check_pattern(options.request));
  run_.report.out = run_.given_out;
  run_.report.quantization = options.request.quantization.text();
  LACUNA_TRY(run_.out, io::out_folder(run_.given_out));
  LACUNA_CHECK(plan_memory());
  LACUNA_CHECK(io::check_not_source(run_.out, run_.checkpoint.folder()));
  LACUNA_TRY(run_.lock, io::OutLock::take(run_.out));
  LACUNA_CHECK(Journal::check(run_.out, options.resume));
  run_.progress.blocks_kept = options.resume && Journal::exists(run_.out);
  LACUNA_CHECK(probe_out(run_));
  if (!run_.states_in.empty())  // given up again; each pass makes its own
    LACUNA_CHECK(io::scratch_memory(run_.states_in, states_bytes()));
  LACUNA_CHECK(calibrate());
  LACUNA_CHECK(open_statistics(run_));
  LACUNA_CHECK(allocation_pass(run_));
  LACUNA_CHECK(loss_gradient_pass(run_));
  LACUNA_TRY(const json about, about_run(run_));
  LACUNA_TRY(journal_, Journal::open(run_.out, about, options.resume));
  run_.progress.blocks_kept = true;
  resumed_ = journal_->finished_blocks();
  if (resumed_ > 0)
    run_.progress.log(
        fmt::format("resuming: {} of {} blocks are finished", resumed_, run_.spec.layers));
  return {};
}

Status Pipeline::plan_memory() {
  const PruneOptions& options = run_.options;
  // As it is told, so that what is told is enough.
  const auto planned = [&](const CalibrationSource& source, const PruneOptions& with,
                           bool in_file) {
    return rounded_up_for_text(
        planned_peak_bytes(run_.spec, run_.checkpoint, source, with, in_file));
  };
  uint64_t bytes = planned(source_, options, false);
  if (options.memory > 0 && bytes > options.memory && run_.passes.states_may_move()) {
    const uint64_t moved = planned(source_, options, true);
    if (moved < bytes) run_.states_in = run_.out.parent_path();
    bytes = moved;
  }
  const bool in_file = !run_.states_in.empty();
  if (options.memory > 0 && bytes > options.memory) {
    std::string ways;
    if (!options.reconstruct.none()) {
      PruneOptions plain = options;
      plain.reconstruct = {};
      const Passes passes(run_.spec, source_.samples, plain, run_.method->slope());
      ways += fmt::format("; without --reconstruct {} do",
                          bytes_text(planned(source_, plain, passes.states_may_move())));
    }
    if (source_.self) {
      CalibrationSource text = source_;
      text.self.reset();
      ways += fmt::format("; with --calibration FILE {} do",
                          bytes_text(planned(text, options, in_file)));
    }
    return not_possible("--memory: the run takes up to {}{} (got {}). Give that much{}.",
                        bytes_text(bytes), in_file ? ", its activations in a file" : "",
                        bytes_text(options.memory), ways);
  }
  run_.report.planned_peak_bytes = bytes;
  run_.progress.log(
      fmt::format("peak memory: at most {}{}", bytes_text(bytes),
                  in_file ? fmt::format("; activations ({}) lie in a file in {}",
                                        bytes_text(states_bytes()), run_.states_in.string())
                          : ""));
  return {};
}

uint64_t Pipeline::states_bytes() const {
  return static_cast<uint64_t>(source_.samples * source_.length * run_.spec.hidden) *
         c10::elementSize(run_.options.compute.dtype);
}

Result<PruneReport> Pipeline::finish() {
  LACUNA_CHECK(ended(written()));
  run_.clock.enter("write");
  LACUNA_CHECK(write_model(run_, *journal_, reconstructed_));
  LACUNA_CHECK(journal_->remove());
  run_.clock.settle();
  run_.report.phases = run_.clock.seconds();
  run_.report.seconds = seconds_since(start_);
  return std::move(run_.report);
}

Status Pipeline::prune_from(int64_t layer, InputsByTarget inputs) {
  if (layer < resumed_) return resume_block(layer, nullptr);
  Status done = prune_targets(layer, nullptr, std::move(inputs));
  if (!done.ok()) (void)written();  // before the journal is looked at
  return done.ok() ? done : ended(std::move(done));
}

Status Pipeline::calibrate() {
  if (source_.samples == 0) return {};
  run_.clock.enter("calibration");
  LACUNA_TRY(run_.calibration, source_.make());
  // The model's own samples came from all of its weights.
  for (const auto& [name, info] : run_.checkpoint.weights()) run_.checkpoint.release(name);
  return check_calibration(run_.calibration, run_.spec);
}

Status Pipeline::blocks_or_nothing() {
  Status done = blocks();
  if (Status last = written(); done.ok()) done = std::move(last);
  return ended(std::move(done));
}

Status Pipeline::ended(Status done) {
  if (done.ok() || journal_->finished_blocks() > 0) return done;
  (void)journal_->remove();  // what stopped the run is the news
  if (done.error().code != Code::kInterrupted) return done;
  return run_.progress.interrupted(/*blocks=*/false);
}

Status Pipeline::blocks() {
  run_.progress.begin(run_.passes.all_blocks());
  run_.clock.enter("load");
  if (run_.passes.through_blocks()) {
    LACUNA_TRY(activations_, Activations::embed(run_.checkpoint, run_.spec, run_.calibration,
                                                run_.options, run_.states_in));
    if (!run_.options.reconstruct.none()) dense_.emplace(activations_->copy());
  }
  for (int64_t layer = 0; layer < layers(); ++layer) {
    const auto count = run_.progress.counter(run_.block_text(layer));
    run_.clock.enter("load");
    std::optional<model::Block> block;
    if (activations_) {
      LACUNA_TRY(block,
                 model::Block::load(run_.checkpoint, run_.spec, layer, run_.options.compute));
    }
    model::Block* const loaded = block ? &*block : nullptr;
    if (dense_) {
      run_.clock.enter("forward");
      LACUNA_CHECK(dense_->forward(*block, count));
      run_.clock.enter("load");
    }
    LACUNA_CHECK(layer < resumed_ ? resume_block(layer, loaded) : prune_block(layer, loaded));
    if (!activations_) {
      LACUNA_CHECK(count(1));
    } else if (layer + 1 < layers()) {  // nobody reads the last block's outputs
      run_.clock.enter("forward");
      LACUNA_CHECK(activations_->forward(*block, count));
    }
    block.reset();
    run_.release(layer);
  }
  return {};
}

Status Pipeline::resume_block(int64_t layer, model::Block* block) {
  LACUNA_TRY(const Journal::Block finished, journal_->read(layer));
  PruneReport& report = run_.report;
  for (const json& warning : finished.notes.at("warnings")) report.warnings.push_back(warning);
  for (const json& noted : finished.notes.at("layers")) report.layers.push_back(layer_from(noted));
  if (block == nullptr) return {};
  std::map<std::string, Tensor> weights;
  for (const auto& [name, tensor] : finished.tensors) weights[name] = tensor;
  LACUNA_TRY(auto coded, finished.coded());
  for (auto& [name, matrix] : coded) {
    matrix.values_dtype = DType::kF32;  // as the solver had them
    weights[name] = format::expand(matrix);
  }
  for (const std::string& linear : run_.targets_of(layer))
    if (const auto found = weights.find(run_.weight_name(layer, linear)); found != weights.end())
      block->linear(linear).set_weight(model::wrap(found->second)
                                           .to(run_.options.compute.device,
                                               run_.options.compute.dtype,
                                               /*non_blocking=*/false, /*copy=*/true));
  return run_.progress.step(run_.passes.until_finished(), run_.block_text(layer));
}

Status Pipeline::prune_block(int64_t layer, model::Block* block) {
  const auto& targets = run_.targets_of(layer);
  const std::string what = run_.block_text(layer);
  InputsByTarget inputs;
  if (run_.statistics) {  // also where they are for the error alone
    run_.clock.enter("load");
    LACUNA_TRY(inputs, read_inputs(*run_.statistics, layer, run_.options.compute.device));
  }
  if (block != nullptr && targets.empty()) {
    LACUNA_CHECK(run_.progress.step(run_.passes.until_pruned(), what));
  } else if (block != nullptr) {
    LACUNA_TRY(inputs,
               collect_inputs(run_, *activations_, *block, targets, what, /*replace=*/false));
    if (run_.passes.wants_regional_gradients())
      LACUNA_CHECK(regional_gradient_pass(run_, layer, *activations_));
  }
  return prune_targets(layer, block, std::move(inputs));
}

Status Pipeline::prune_targets(int64_t layer, model::Block* block, InputsByTarget inputs) {
  Journal::Block finished;
  finished.notes = {{"layers", json::array()}, {"warnings", json::array()}};
  for (const std::string& linear : run_.targets_of(layer)) {
    LACUNA_TRY(const at::Tensor pruned,
               prune_linear(run_, run_.weight_name(layer, linear), inputs[linear].get(), finished));
    inputs.erase(linear);  // the last one frees the Gram matrix and its factor
    if (block != nullptr) block->linear(linear).set_weight(pruned.to(run_.options.compute.dtype));
  }
  if (run_.options.reconstruct.block && !run_.targets_of(layer).empty())
    LACUNA_CHECK(reconstruct_block(run_, layer, *block, *activations_, *dense_, finished));
  run_.clock.enter("journal");
  LACUNA_CHECK(written());
  writing_ = std::async(std::launch::async, [this, layer, block = std::move(finished)] {
    return journal_->write(layer, block);
  });
  return {};
}

}  // namespace

Result<Method> method_of(const PruneOptions& options) {
  const bool codes = !options.request.quantization.none();
  if (options.request.keep_mask && !codes)
    return usage_error("--keep-mask: nothing to do without --quantize.");
  if (codes && options.store != io::Store::kCompact)
    return usage_error(
        "--quantize: only the compact store has codes (got --store {}). Leave it out.",
        io::store_name(options.store));
  if (codes && !options.reconstruct.none())
    return usage_error(
        "--reconstruct: can't be combined with --quantize, whose codes would leave their grid. "
        "Reconstruct first; then quantise the result by --keep-mask --quantize.");
  return compose({options.method, options.score, options.solve, options.refine, codes});
}

Result<PruneReport> prune_model(const io::Checkpoint& checkpoint, const CalibrationSource& source,
                                const fs::path& out, const PruneOptions& options,
                                const PruneProgress& progress) {
  try {
    return Pipeline(checkpoint, source, out, options, progress).run();
  } catch (const std::exception& error) {  // torch, the file system
    return check_failed("prune: {}", model::what(error));
  }
}

namespace {

/// All of a block's variants from one reading of its statistics.
Result<std::vector<PruneReport>> run_variants(const io::Checkpoint& checkpoint,
                                              const std::vector<Variant>& variants,
                                              const PruneProgress& progress) {
  const CalibrationSource none;
  PruneProgress quiet{.interrupted = progress.interrupted};
  std::vector<std::unique_ptr<Pipeline>> runs;
  std::vector<std::optional<PruneReport>> reports;
  int64_t layers = 0, unfinished = 0;
  for (const Variant& variant : variants) {
    auto run = std::make_unique<Pipeline>(checkpoint, none, variant.out, variant.options, quiet);
    LACUNA_CHECK(run->begin());
    layers = run->layers();
    LACUNA_TRY(auto report, run->finished_before(variant.overwrite));
    if (report) run.reset();
    unfinished += report ? 0 : 1;
    runs.push_back(std::move(run));
    reports.push_back(std::move(report));
  }
  LACUNA_TRY(const auto statistics, StatisticsFolder::open(variants.front().options.statistics));
  const int64_t total = layers * unfinished;
  int64_t done = 0;
  for (int64_t layer = 0; layer < layers && unfinished > 0; ++layer) {
    LACUNA_TRY(const InputsByTarget inputs,
               read_inputs(statistics, layer, variants.front().options.compute.device));
    for (const auto& run : runs) {
      if (!run) continue;
      LACUNA_CHECK(run->prune_from(layer, inputs));
      if (progress.step) progress.step(++done, total, fmt::format("block {}", layer + 1));
      if (progress.interrupted != nullptr && progress.interrupted->load())
        return Error{Code::kInterrupted,
                     "interrupted; finished blocks are kept. Go on with the same command and "
                     "--resume."};
    }
  }
  std::vector<PruneReport> all;
  for (size_t i = 0; i < runs.size(); ++i) {
    if (!reports[i]) {
      LACUNA_TRY(reports[i], runs[i]->finish());
    }
    all.push_back(std::move(*reports[i]));
    runs[i].reset();
  }
  return all;
}

}  // namespace

Result<std::vector<PruneReport>> prune_variants(const io::Checkpoint& checkpoint,
                                                const std::vector<Variant>& variants,
                                                const PruneProgress& progress) {
  if (variants.empty()) return std::vector<PruneReport>();
  for (const Variant& variant : variants)
    if (variant.options.statistics.empty() ||
        variant.options.statistics != variants.front().options.statistics)
      return usage_error("prune: variants need the statistics of one folder.");
  // What is derived from the statistics is shared too.
  for (const Variant& variant : variants)
    if (variant.options.request.damping != variants.front().options.request.damping ||
        variant.options.compute.dtype != variants.front().options.compute.dtype ||
        variant.options.compute.device != variants.front().options.compute.device)
      return usage_error(
          "prune: variants need one damping, one device and one type to compute in.");
  try {
    return run_variants(checkpoint, variants, progress);
  } catch (const std::exception& error) {
    return check_failed("prune: {}", model::what(error));
  }
}

Result<PruneReport> prune_model(const io::Checkpoint& checkpoint, const Calibration& calibration,
                                const fs::path& out, const PruneOptions& options,
                                const PruneProgress& progress) {
  const CalibrationSource ready{.samples = calibration.samples(),
                                .length = calibration.length(),
                                .make = [&]() -> Result<Calibration> { return calibration; }};
  return prune_model(checkpoint, ready, out, options, progress);
}

}  // namespace lacuna::prune
