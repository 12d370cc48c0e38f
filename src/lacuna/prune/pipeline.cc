#include "lacuna/prune/pipeline.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <future>
#include <map>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/core/version.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/quantize.h"
#include "lacuna/io/checksums.h"
#include "lacuna/io/file.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/io/safetensors.h"
#include "lacuna/model/decoder.h"
#include "lacuna/prune/activations.h"
#include "lacuna/prune/budget.h"
#include "lacuna/prune/chunks.h"
#include "lacuna/prune/gradients.h"
#include "lacuna/prune/grid.h"
#include "lacuna/prune/journal.h"
#include "lacuna/prune/passes.h"
#include "lacuna/prune/phase_clock.h"
#include "lacuna/prune/progress.h"
#include "lacuna/prune/statistics.h"
#include "lacuna/prune/statistics_folder.h"
#include "lacuna/prune/targets.h"

namespace lacuna::prune {
namespace fs = std::filesystem;
using nlohmann::json;
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}


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

// ---- which run this is --------------------------------------------------------------------------

std::string hash_of(const Calibration& calibration) {
  std::vector<int32_t> flat;
  for (const auto& row : calibration.ids) flat.insert(flat.end(), row.begin(), row.end());
  return calibration.ids.empty() ? "" : io::whole_checksum(Bytes::take(std::move(flat)));
}

json about_calibration(const Calibration& calibration) {
  return {{"source", calibration.source},
          {"samples", calibration.samples()},
          {"length", calibration.length()},
          {"hash", hash_of(calibration)}};
}

json about_allocation(const AllocationOptions& options) {
  json about = {{"by", allocation_name(options.by)}};
  if (options.budget) about["budget"] = options.budget->text();
  if (options.by == Allocation::kOwl)
    about.update({{"multiple", options.owl_multiple}, {"lambda", options.owl_lambda}});
  if (options.by == Allocation::kError) about["width"] = options.error_width;
  return about;
}

json about_reconstruction(const ReconstructOptions& options) {
  return {{"block", options.block},
          {"model", options.model},
          {"epochs", options.epochs},
          {"batch", options.batch},
          {"learning_rate", options.rate}};
}

json about_method(const PruneOptions& options, const Method& method,
                  const Calibration& calibration) {
  json about = {{"method", method.name()}, {"seed", options.seed}, {"tool_version", kVersion}};
  if (options.request.keep_mask) {
    about["mask"] = "kept";
  } else {
    about["pattern"] = options.request.pattern.text();
    about["sparsity"] = options.request.sparsity;
  }
  if (options.request.rest.kind != format::PatternKind::kDense)
    about["dense_columns_beside"] = options.request.rest.text();
  if (options.request.pattern.kind != format::PatternKind::kKeepOf && !options.request.keep_mask)
    about["group"] = group_name(options.request.group.value_or(method.default_group()));
  if (!options.request.quantization.none()) {
    about["quantization"] = options.request.quantization.text();
    about["coding"] = coding_name(options.request.coding);
  }
  if (method.needs_gram()) about["damping"] = options.request.damping;
  if (!options.reconstruct.none()) about["reconstruct"] = about_reconstruction(options.reconstruct);
  if (!options.allocation.none()) about["allocation"] = about_allocation(options.allocation);
  if (calibration.samples() > 0) about["calibration"] = about_calibration(calibration);
  if (!options.refine_target.empty()) about["refine_target"] = options.refine_target;
  return about;
}

/// Hashes of a tensor's first, middle and last 64 KiB; of a smaller one, of all of it.
std::vector<std::string> sampled_hashes(const Bytes& bytes) {
  constexpr size_t kSample = size_t{64} << 10;
  std::vector<size_t> starts = {0};
  if (bytes.size() > kSample) starts = {0, (bytes.size() - kSample) / 2, bytes.size() - kSample};
  std::vector<std::string> hashes;
  for (const size_t start : starts) {
    const Bytes sample = bytes.slice(start, std::min(kSample, bytes.size() - start));
    hashes.push_back(io::whole_checksum(sample));
    io::release_pages(sample);
  }
  return hashes;
}

/// Which weights these are, whatever their folder and times: for each file its size and a hash over
/// name, dtype, shape and sampled_hashes() of every tensor. A change shows when it touches one of
/// the samples, so any training does; a value changed by hand between them does not.
Result<json> about_model(const io::Checkpoint& checkpoint) {
  json about = json::object();
  for (const auto& entry : fs::directory_iterator(checkpoint.folder())) {
    if (entry.path().extension() != ".safetensors") continue;
    LACUNA_TRY(const auto file, io::SafetensorsFile::open(entry.path()));
    json tensors = json::object();
    for (const auto& described : file.entries()) {
      LACUNA_TRY(const Tensor tensor, file.tensor(described.name));
      tensors[described.name] = {safetensors_name(tensor.dtype), tensor.shape,
                                 sampled_hashes(tensor.bytes)};
    }
    const std::string text = tensors.dump();
    about[entry.path().filename().string()] = {
        fs::file_size(entry.path()),
        io::whole_checksum(Bytes::take(std::vector<char>(text.begin(), text.end())))};
  }
  return about;
}

/// Everything that decides the bytes of the journal; of the weights, about_model() and the times of
/// their files.
Result<json> about_run(const io::Checkpoint& checkpoint, const Calibration& calibration,
                       const PruneOptions& options, const Method& method, const Targets& targets) {
  json about = about_method(options, method, calibration);
  about["compute"] = {options.compute.device.str(), c10::toString(options.compute.dtype)};
  about["targets"] = targets;
  about["config"] = checkpoint.config();
  LACUNA_TRY(about["model"], about_model(checkpoint));
  for (const auto& [file, parts] : about["model"].items())
    about["times"][file] =
        fs::last_write_time(checkpoint.folder() / file).time_since_epoch().count();
  return about;
}

// ---- calibration activations --------------------------------------------------------------------

/// Collects the distinct inputs of a block's targets: q, k and v share one, gate and up another.
class InputCollector {
 public:
  InputCollector(const std::vector<std::string>& targets, int64_t places)
      : targets_(targets), seen_(static_cast<size_t>(places)) {}

  model::LinearObserver observer(int64_t place) {
    return [this, place](std::string_view name, const at::Tensor& input) {
      const auto target = std::find(targets_.begin(), targets_.end(), name);
      if (target == targets_.end()) return;
      // Inputs are held until they are added, so that no two share an address by chance.
      Seen& seen = seen_[static_cast<size_t>(place)];
      const auto same =
          std::find_if(seen.inputs.begin(), seen.inputs.end(),
                       [&](const at::Tensor& held) { return held.data_ptr() == input.data_ptr(); });
      seen.input_of[std::string(name)] = static_cast<size_t>(same - seen.inputs.begin());
      if (same == seen.inputs.end()) seen.inputs.push_back(input);
    };
  }

  /// Adds what the observers saw, in the order of the places.
  void add(const Executor& executor) {
    for (Seen& seen : seen_) {
      if (seen.inputs.empty()) continue;
      if (sums_.empty()) {
        input_of_ = seen.input_of;
        for (const at::Tensor& input : seen.inputs)
          sums_.emplace_back(input.size(-1), input.device());
      }
      for (size_t i = 0; i < sums_.size(); ++i) sums_[i].queue(seen.inputs[i]);
      seen = {};
    }
    add_queued(sums_, executor);
  }

  /// Inputs by target; targets of one input share the object.
  InputsByTarget take() {
    std::vector<std::shared_ptr<InputStatistics>> all;
    for (GramSum& sum : sums_) all.push_back(std::make_shared<InputStatistics>(sum.take()));
    sums_.clear();
    InputsByTarget by_target;
    for (const auto& [name, index] : input_of_) by_target[name] = all[index];
    return by_target;
  }

 private:
  struct Seen {
    std::vector<at::Tensor> inputs;
    std::map<std::string, size_t> input_of;
  };
  const std::vector<std::string>& targets_;
  std::vector<Seen> seen_;
  std::map<std::string, size_t> input_of_;
  std::vector<GramSum> sums_;
};

/// Statistics from a folder go where the weights are, each once.
void to_device(InputStatistics& statistics, at::Device device) {
  for (at::Tensor* each : {&statistics.gram, &statistics.square_sums, &statistics.sums})
    *each = each->to(device);
}

// ---- what is written ----------------------------------------------------------------------------

/// Writes the journal's blocks, each while the next one is under work.
class BlockWriter {
 public:
  explicit BlockWriter(Journal& journal) : journal_(journal) {}
  /// @errors those of the block before: as Journal::write()
  Status write(int64_t layer, Journal::Block finished) {
    LACUNA_CHECK(wait());
    writing_ = std::async(std::launch::async, [this, layer, block = std::move(finished)] {
      return journal_.write(layer, block);
    });
    return {};
  }
  /// Until all is durable.
  Status wait() { return writing_.valid() ? writing_.get() : Status(); }

 private:
  Journal& journal_;
  std::future<Status> writing_;
};

using MatricesByName = std::map<std::string, format::CompactMatrix>;

/// The pruned weights of a block in the store's form, all at a time; codes are in it already.
Result<MatricesByName> compressed(const Journal::Block& block, const format::Pattern& pattern) {
  LACUNA_TRY(MatricesByName coded, block.coded());
  if (!coded.empty()) return coded;
  std::vector<std::optional<Result<format::CompactMatrix>>> results(block.tensors.size());
  parallel_chunks(model::torch_executor(), static_cast<int64_t>(results.size()), [&](int64_t i) {
    const auto place = static_cast<size_t>(i);
    results[place].emplace(format::compress(block.tensors[place].tensor, pattern));
  });
  MatricesByName matrices;
  for (size_t i = 0; i < results.size(); ++i) {
    LACUNA_TRY(matrices[block.tensors[i].name], std::move(*results[i]));
  }
  return matrices;
}

/// The journal's blocks compressed one after another: the next while the last is written.
class CompressedBlocks {
 public:
  /// @param instead  weights by name that take the place of the journal's
  CompressedBlocks(const Journal& journal, const format::Pattern& pattern,
                   std::vector<int64_t> order, const std::map<std::string, Tensor>& instead)
      : journal_(journal), pattern_(pattern), order_(std::move(order)), instead_(instead) {
    begin();
  }

  /// Of the next block in the order. @errors as Journal::read(); kCheckFailed
  Result<MatricesByName> next() {
    Result<MatricesByName> matrices = coming_.get();
    begin();
    return matrices;
  }

 private:
  void begin() {
    if (begun_ == order_.size()) return;
    coming_ =
        std::async(std::launch::async, [this, layer = order_[begun_]]() -> Result<MatricesByName> {
          LACUNA_TRY(Journal::Block block, journal_.read(layer));
          for (auto& [name, tensor] : block.tensors)
            if (const auto found = instead_.find(name); found != instead_.end())
              tensor = found->second;
          return compressed(block, pattern_);
        });
    ++begun_;
  }

  const Journal& journal_;
  const format::Pattern pattern_;
  const std::vector<int64_t> order_;
  const std::map<std::string, Tensor>& instead_;
  size_t begun_ = 0;
  std::future<Result<MatricesByName>> coming_;
};

// ---- the run ------------------------------------------------------------------------------------

constexpr double kNoticeable = 0.005;  // of a sparsity that was missed: worth a warning

json to_json(const LayerReport& layer) {
  return {
      {"name", layer.name},       {"sparsity", layer.sparsity},     {"error", layer.error},
      {"damping", layer.damping}, {"iterations", layer.iterations}, {"fell_back", layer.fell_back},
      {"seconds", layer.seconds}};
}

/// Of a journal's notes, or of a finished model's config, which leaves the seconds out.
LayerReport layer_from(const json& layer) {
  return {layer.at("name"),           layer.at("sparsity"),   layer.at("error"),
          layer.at("damping"),        layer.at("iterations"), layer.at("fell_back"),
          layer.value("seconds", 0.0)};
}

class Run {
 public:
  Run(const io::Checkpoint& checkpoint, const CalibrationSource& source, const fs::path& out,
      const PruneOptions& options, const PruneProgress& progress)
      : checkpoint_(checkpoint),
        source_(source),
        given_out_(io::folder_path(out)),
        options_(options),
        progress_(progress, given_out_),
        clock_(options.compute.device) {
    options_.request.executor = model::executor_for(options.compute.device);
    options_.request.coder = model::torch_executor();
    options_.request.rounded_products =
        options.compute.device.is_cuda() && options.compute.dtype != at::kFloat;
  }

  Result<PruneReport> run();
  /// The same in steps, for several runs side by side: begin(), prune_from() for every block,
  /// finish().
  Status begin();
  /// @param inputs  statistics of the block, on the device; what is derived from them stays there
  Status prune_from(int64_t layer, InputsByTarget inputs);
  Result<PruneReport> finish();
  /// After begin(), in place of the blocks and finish(): the report of what OUT holds, if that is
  /// finished and what this run would write. @errors kBadInput: it is another model
  Result<std::optional<PruneReport>> finished_before(bool overwrite);
  int64_t layers() const { return spec_.layers; }

 private:
  io::CheckpointWriter::Options writer_options() const;
  Status probe_out() const;
  Status calibrate();
  /// Opens the statistics of the dense model, if they are asked for, after they are collected, if
  /// that is asked for.
  Status dense_statistics();
  Status collect_dense_statistics();
  /// Runs the calibration once through the dense blocks; `visit` gets the inputs of each.
  Status dense_pass(
      const std::function<Status(int64_t layer, const InputsByTarget& inputs)>& visit);
  GradientPlan gradient_plan() const {
    return {passes_.slope,          spec_,
            calibration_.samples(), calibration_.length(),
            options_.compute,       options_.working_bytes};
  }
  /// Those of the model's loss, for all targets.
  Status collect_loss_gradients();
  /// Those of a block's own output.
  Status collect_regional_gradients(int64_t layer, const std::string& what);
  /// Settles the layers' sparsities, where they differ.
  Status allocate();
  Result<std::vector<LayerShare>> measured_shares();
  /// Tells what the budget came to, and warns where that is off.
  Status check_budget();
  /// Compiles PruneOptions::refine_target.
  Status choose_refined();
  /// The method of one layer, without refinements where they are not wanted.
  const Method& method_for(const std::string& name) const;
  /// What is asked of one layer.
  Request request_of(const std::string& name) const;
  Status embed();
  Status blocks_or_nothing();
  /// What the reconstructions need beside calibration, and what they can't be combined with.
  Status check_reconstruction() const;
  /// @param weight  of a sample in the progress
  Training training(const std::string& what, int64_t weight);
  /// Trains what is finished of a block, and puts it into the block.
  Status reconstruct_block(int64_t layer, model::Block& block, Journal::Block& finished);
  /// Trains all blocks of the journal together; what comes of them is in reconstructed_.
  Status reconstruct_model(const Journal& journal);
  Result<BlockTraining> training_of(const Journal& journal, int64_t layer) const;
  /// Few steps at a high rate do harm. @return the warning
  std::string warn_of_rise(const std::string& what, const std::vector<double>& objectives);
  /// A run that fails before it has finished a block leaves nothing behind.
  Status ended(Status done);
  Status blocks(const Journal& journal, BlockWriter& writer);
  Status resume_block(const Journal& journal, int64_t layer, model::Block* block);
  Status prune_block(BlockWriter& writer, int64_t layer, model::Block* block);
  Status prune_targets(BlockWriter& writer, int64_t layer, model::Block* block,
                       InputsByTarget inputs);
  /// @return the pruned weight in the dtype of the file
  Result<at::Tensor> prune_linear(const std::string& name, InputStatistics* inputs,
                                  Journal::Block& finished);
  Result<InputsByTarget> collect_inputs(const model::Block& block,
                                        const std::vector<std::string>& targets,
                                        const std::string& what, bool replace = false);
  /// What config.json says of the run, before its results.
  json about_written() const;
  /// Whether a finished model has the weights that this run would leave alone.
  Result<bool> keeps_the_others(const io::Checkpoint& finished) const;
  Status write(const Journal& journal);
  /// A weight that is not pruned: as it was, but embedding and output matrix beside codes.
  Result<io::Weight> kept_weight(const std::string& name) const;

  std::string weight_name(int64_t layer, const std::string& linear) const {
    return spec_.block_prefix(layer) + linear + ".weight";
  }
  const std::vector<std::string>& targets_of(int64_t layer) const {
    return targets_[static_cast<size_t>(layer)];
  }

  const io::Checkpoint& checkpoint_;
  const CalibrationSource& source_;
  const fs::path given_out_;
  PruneOptions options_;
  Progress progress_;

  fs::path out_;  // absolute
  std::shared_ptr<const io::OutLock> lock_;
  Calibration calibration_;
  io::DecoderSpec spec_;
  std::optional<Method> method_, unrefined_;  // the second where refine_target names some weights
  std::vector<std::regex> refined_;
  Passes passes_;
  Targets targets_;
  std::map<std::string, double> allotted_;       // sparsities; none: all as the request says
  std::optional<Activations> activations_;       // none without calibration
  std::optional<Activations> dense_;             // of the dense blocks, for a reconstruction
  std::map<std::string, Tensor> reconstructed_;  // by name, in place of the journal's
  std::optional<StatisticsFolder> statistics_;   // of the dense model; then no activations
  Gradients gradients_;                          // by weight, until it is pruned
  PhaseClock clock_;
  Clock::time_point start_;
  std::optional<Journal> journal_;
  std::optional<BlockWriter> writer_;  // of prune_from()
  int64_t resumed_ = 0;                // blocks that an earlier process finished
  PruneReport report_;
};

Result<PruneReport> Run::run() {
  LACUNA_CHECK(begin());
  LACUNA_CHECK(blocks_or_nothing());
  if (options_.reconstruct.model) LACUNA_CHECK(reconstruct_model(*journal_));
  return finish();
}

Status Run::begin() {
  start_ = Clock::now();
  LACUNA_TRY(method_, method_of(options_));
  LACUNA_TRY(spec_, model::spec_of(checkpoint_));
  passes_ = Passes(spec_, source_.samples, options_, method_->slope());
  LACUNA_TRY(targets_, find_targets(checkpoint_, spec_, options_));
  LACUNA_CHECK(choose_refined());
  LACUNA_CHECK(check_length(source_.length, spec_));
  if (method_->needs_inputs() && source_.samples == 0 && options_.statistics.empty())
    return usage_error("--method {}: needs calibration (got none). Give --calibration.",
                       method_->name());
  if (options_.allocation.needs_inputs() && source_.samples == 0 && options_.statistics.empty())
    return usage_error("--allocate {}: needs calibration (got none). Give --calibration.",
                       allocation_name(options_.allocation.by));
  LACUNA_CHECK(check_reconstruction());
  LACUNA_CHECK(check_allocation(options_.allocation, options_.request, options_.store));
  if ((passes_.slope != Slope::kNone && source_.samples == 0) ||
      (passes_.regional_gradients() && passes_.on_disk))
    return usage_error(
        "--score: gradients of {} need calibration text that runs through the blocks. Leave "
        "--statistics and --save-statistics out.",
        method_->name());
  if (options_.request.pattern.kind == format::PatternKind::kKeepOf)
    options_.request.sparsity = options_.request.pattern.sparsity();
  report_.out = given_out_;
  report_.quantization = options_.request.quantization.text();
  report_.planned_peak_bytes = planned_peak_bytes(spec_, checkpoint_, source_, options_);
  progress_.log(fmt::format("peak memory: at most {:.2f} GiB",
                            static_cast<double>(report_.planned_peak_bytes) / (1 << 30)));
  LACUNA_TRY(out_, io::out_folder(given_out_));
  LACUNA_CHECK(io::check_not_source(out_, checkpoint_.folder()));
  LACUNA_TRY(lock_, io::OutLock::take(out_));
  LACUNA_CHECK(Journal::check(out_, options_.resume));
  progress_.blocks_kept = options_.resume && Journal::exists(out_);
  LACUNA_CHECK(probe_out());
  LACUNA_CHECK(calibrate());
  LACUNA_CHECK(dense_statistics());
  LACUNA_CHECK(allocate());
  LACUNA_CHECK(collect_loss_gradients());
  LACUNA_TRY(json about, about_run(checkpoint_, calibration_, options_, *method_, targets_));
  if (statistics_) about["statistics"] = statistics_->about();
  if (!allotted_.empty()) about["allotted"] = allotted_;
  LACUNA_TRY(journal_, Journal::open(out_, about, options_.resume));
  progress_.blocks_kept = true;
  resumed_ = journal_->finished_blocks();
  if (journal_->finished_blocks() > 0)
    progress_.log(fmt::format("resuming: {} of {} blocks are finished", journal_->finished_blocks(),
                              spec_.layers));
  return {};
}

Result<PruneReport> Run::finish() {
  if (writer_) LACUNA_CHECK(ended(writer_->wait()));
  clock_.enter("write");
  LACUNA_CHECK(write(*journal_));
  LACUNA_CHECK(journal_->remove());
  clock_.settle();
  report_.phases = clock_.seconds();
  report_.seconds = seconds_since(start_);
  return std::move(report_);
}

Status Run::prune_from(int64_t layer, InputsByTarget inputs) {
  if (!writer_) writer_.emplace(*journal_);
  if (layer < resumed_) return resume_block(*journal_, layer, nullptr);
  Status done = prune_targets(*writer_, layer, nullptr, std::move(inputs));
  if (!done.ok()) (void)writer_->wait();  // before the journal is looked at
  return done.ok() ? done : ended(std::move(done));
}

io::CheckpointWriter::Options Run::writer_options() const {
  return {.store = options_.store, .blocks = options_.blocks, .lock = lock_};
}

/// Refuses a folder that can't be written to before the work, not after it.
Status Run::probe_out() const {
  LACUNA_CHECK(io::CheckpointWriter::create(out_, writer_options()));
  return {};  // given up again; write() opens its own
}

Status Run::calibrate() {
  if (source_.samples == 0) return {};
  clock_.enter("calibration");
  LACUNA_TRY(calibration_, source_.make());
  // The model's own samples came from all of its weights.
  for (const auto& [name, info] : checkpoint_.weights()) checkpoint_.release(name);
  return check_calibration(calibration_, spec_);
}

Status Run::embed() {
  LACUNA_TRY(activations_, Activations::embed(checkpoint_, spec_, calibration_, options_));
  return {};
}

Status Run::dense_statistics() {
  const bool again = options_.resume && StatisticsFolder::open(options_.save_statistics).ok();
  if (!options_.save_statistics.empty() && !again) LACUNA_CHECK(collect_dense_statistics());
  const fs::path& folder =
      options_.save_statistics.empty() ? options_.statistics : options_.save_statistics;
  if (folder.empty()) return {};
  LACUNA_TRY(statistics_, StatisticsFolder::open(folder));
  LACUNA_TRY(const json model, about_model(checkpoint_));
  if (statistics_->about().value("model", json()) != model)
    return bad_input("{}: statistics of another model. Collect them from {}.", folder.string(),
                     checkpoint_.folder().string());
  progress_.statistics_kept = !options_.save_statistics.empty();
  return {};
}

/// One pass: each block's inputs are those that the dense blocks before it gave.
Status Run::collect_dense_statistics() {
  json about;
  LACUNA_TRY(about["model"], about_model(checkpoint_));
  about["calibration"] = about_calibration(calibration_);
  about["compute"] = {options_.compute.device.str(), c10::toString(options_.compute.dtype)};
  LACUNA_TRY(StatisticsFolder folder, StatisticsFolder::create(options_.save_statistics, about));
  LACUNA_CHECK(dense_pass([&](int64_t layer, const InputsByTarget& inputs) {
    clock_.enter("journal");
    return folder.write(layer, inputs);
  }));
  return folder.finish();
}

Status Run::dense_pass(
    const std::function<Status(int64_t layer, const InputsByTarget& inputs)>& visit) {
  progress_.begin(passes_.dense_pass());
  clock_.enter("load");
  LACUNA_CHECK(embed());
  std::vector<std::string> all;
  for (const io::LinearSpec& linear : spec_.block_linears()) all.push_back(linear.name);
  for (int64_t layer = 0; layer < spec_.layers; ++layer) {
    clock_.enter("load");
    LACUNA_TRY(const auto block, model::Block::load(checkpoint_, spec_, layer, options_.compute));
    const std::string what = fmt::format("statistics {}/{}", layer + 1, spec_.layers);
    LACUNA_TRY(const auto inputs, collect_inputs(block, all, what, /*replace=*/true));
    LACUNA_CHECK(visit(layer, inputs));
    for (const std::string& linear : all) checkpoint_.release(weight_name(layer, linear));
  }
  activations_.reset();
  return {};
}

Result<std::vector<LayerShare>> Run::measured_shares() {
  std::vector<LayerShare> all;
  Request request = options_.request;
  request.group = request.group.value_or(method_->default_group());
  const bool by_rows =
      request.pattern.kind == format::PatternKind::kUnstructured && request.group == Group::kRow;
  const auto add_block = [&](int64_t layer, const InputsByTarget& inputs) -> Status {
    std::vector<LayerShare> shares;
    std::vector<at::Tensor> weights;
    std::vector<const InputStatistics*> of;
    for (const std::string& linear : targets_of(layer)) {
      const std::string name = weight_name(layer, linear);
      const auto& shape = checkpoint_.weights().at(name).shape;
      shares.push_back({name, layer, shape[0], shape[1], by_rows ? shape[0] : 1});
      if (!options_.allocation.needs_inputs()) continue;
      LACUNA_TRY(const Tensor dense, checkpoint_.dense(name));
      weights.push_back(model::wrap(dense).to(options_.compute.device).to(at::kFloat));
      of.push_back(inputs.at(linear).get());
      if (const Status fine = method_->check(weights.back(), *of.back(), options_.request);
          !fine.ok())
        return Error{fine.error().code, fmt::format("{}: {}", name, fine.error().message)};
    }
    clock_.enter("allocation");
    if (!shares.empty()) measure(shares, weights, of, options_.allocation, request);
    all.insert(all.end(), shares.begin(), shares.end());
    return {};
  };
  if (options_.allocation.needs_inputs() && !statistics_) {
    LACUNA_CHECK(dense_pass(add_block));
    return all;
  }
  progress_.begin(spec_.layers);
  for (int64_t layer = 0; layer < spec_.layers; ++layer) {
    InputsByTarget inputs;
    if (options_.allocation.needs_inputs()) {
      clock_.enter("load");
      LACUNA_TRY(inputs, statistics_->read(layer));
      for (auto& [linear, shared] : inputs) to_device(*shared, options_.compute.device);
    }
    LACUNA_CHECK(add_block(layer, inputs));
    for (const std::string& linear : targets_of(layer))
      checkpoint_.release(weight_name(layer, linear));
    LACUNA_CHECK(progress_.step(1, fmt::format("allocation {}/{}", layer + 1, spec_.layers)));
  }
  return all;
}

Status Run::allocate() {
  const AllocationOptions& wanted = options_.allocation;
  if (wanted.none()) return {};
  LACUNA_TRY(const auto shares, measured_shares());
  LACUNA_TRY(const Target target, target_of(checkpoint_, shares, wanted, options_.request));
  LACUNA_TRY(const auto sparsities, prune::allocate(shares, wanted, target.cost, target.amount));
  double dropped = 0, all = 0;
  for (size_t i = 0; i < shares.size(); ++i) {
    allotted_[shares[i].name] = sparsities[i];
    dropped += sparsities[i] * static_cast<double>(shares[i].weights());
    all += static_cast<double>(shares[i].weights());
  }
  options_.request.sparsity = dropped / all;
  report_.allocation = allocation_name(wanted.by);
  if (wanted.budget) report_.budget = wanted.budget->text();
  const auto [least, most] = std::minmax_element(sparsities.begin(), sparsities.end());
  progress_.log(fmt::format("allocation {}: sparsity {:.4f}, of the layers {:.4f} to {:.4f}",
                            report_.allocation, options_.request.sparsity, *least, *most));
  return {};
}

Status Run::collect_loss_gradients() {
  if (!passes_.loss_gradients()) return {};
  clock_.enter("gradients");
  progress_.begin(passes_.dense_pass());
  LACUNA_TRY(gradients_, loss_gradients(checkpoint_, spec_, calibration_, targets_, gradient_plan(),
                                        [&](int64_t n) { return progress_.step(n, "gradients"); }));
  return {};
}

Status Run::collect_regional_gradients(int64_t layer, const std::string& what) {
  clock_.enter("gradients");
  // Of a block of its own: a graph changes how weights are held, and with that the bits of what
  // comes after.
  LACUNA_TRY(auto block, model::Block::load(checkpoint_, spec_, layer, options_.compute));
  LACUNA_TRY(
      Gradients found,
      regional_gradients(block, targets_of(layer), activations_->rotary(), activations_->hidden(),
                         gradient_plan(), [&](int64_t n) { return progress_.step(n, what); }));
  for (auto& [linear, gradient] : found)
    gradients_[weight_name(layer, linear)] = std::move(gradient);
  return {};
}

Status Run::choose_refined() {
  if (options_.refine_target.empty()) return {};
  LACUNA_TRY(refined_, compile(options_.refine_target, "--refine-target"));
  PruneOptions plain = options_;
  plain.refine = {"none"};
  LACUNA_TRY(unrefined_, method_of(plain));
  if (unrefined_->name() == method_->name())
    return usage_error("--refine-target: {} refines nothing. Leave it out.", method_->name());
  return {};
}

const Method& Run::method_for(const std::string& name) const {
  return !unrefined_ || any_matches(refined_, name) ? *method_ : *unrefined_;
}

Request Run::request_of(const std::string& name) const {
  Request request = options_.request;
  if (const auto found = allotted_.find(name); found != allotted_.end())
    request.sparsity = found->second;
  return request;
}

Status Run::blocks_or_nothing() {
  BlockWriter writer(*journal_);
  Status done = blocks(*journal_, writer);
  if (Status written = writer.wait(); done.ok()) done = std::move(written);
  return ended(std::move(done));
}

Status Run::ended(Status done) {
  if (done.ok() || journal_->finished_blocks() > 0) return done;
  (void)journal_->remove();  // what stopped the run is the news
  if (done.error().code != Code::kInterrupted) return done;
  return progress_.interrupted(/*blocks=*/false);
}

Status Run::blocks(const Journal& journal, BlockWriter& writer) {
  progress_.begin(passes_.all_blocks());
  clock_.enter("load");
  if (passes_.through_blocks()) {
    LACUNA_CHECK(embed());
    if (!options_.reconstruct.none()) dense_.emplace(activations_->copy());
  }
  for (int64_t layer = 0; layer < spec_.layers; ++layer) {
    const std::string what = fmt::format("block {}/{}", layer + 1, spec_.layers);
    clock_.enter("load");
    std::optional<model::Block> block;
    if (activations_) {
      LACUNA_TRY(block, model::Block::load(checkpoint_, spec_, layer, options_.compute));
    }
    model::Block* const loaded = block ? &*block : nullptr;
    const bool finished = layer < resumed_;
    if (dense_) {
      clock_.enter("forward");
      LACUNA_CHECK(
          dense_->forward(*block, [&](int64_t samples) { return progress_.step(samples, what); }));
      clock_.enter("load");
    }
    LACUNA_CHECK(finished ? resume_block(journal, layer, loaded)
                          : prune_block(writer, layer, loaded));
    if (!activations_) {
      LACUNA_CHECK(progress_.step(1, what));
    } else if (layer + 1 < spec_.layers) {  // nobody reads the last block's outputs
      clock_.enter("forward");
      LACUNA_CHECK(activations_->forward(
          *block, [&](int64_t samples) { return progress_.step(samples, what); }));
    }
    block.reset();
    for (const std::string& linear : targets_of(layer))
      checkpoint_.release(weight_name(layer, linear));
  }
  return {};
}

Status Run::resume_block(const Journal& journal, int64_t layer, model::Block* block) {
  LACUNA_TRY(const Journal::Block finished, journal.read(layer));
  for (const json& warning : finished.notes.at("warnings")) report_.warnings.push_back(warning);
  for (const json& noted : finished.notes.at("layers")) report_.layers.push_back(layer_from(noted));
  if (block == nullptr) return {};
  std::map<std::string, Tensor> weights;
  for (const auto& [name, tensor] : finished.tensors) weights[name] = tensor;
  LACUNA_TRY(MatricesByName coded, finished.coded());
  for (auto& [name, matrix] : coded) {
    matrix.values_dtype = DType::kF32;  // as the solver had them
    weights[name] = format::expand(matrix);
  }
  for (const std::string& linear : targets_of(layer))
    if (const auto found = weights.find(weight_name(layer, linear)); found != weights.end())
      block->linear(linear).set_weight(model::wrap(found->second)
                                           .to(options_.compute.device, options_.compute.dtype,
                                               /*non_blocking=*/false, /*copy=*/true));
  return progress_.step(passes_.until_finished(),
                        fmt::format("block {}/{}", layer + 1, spec_.layers));
}

Result<InputsByTarget> Run::collect_inputs(const model::Block& block,
                                           const std::vector<std::string>& targets,
                                           const std::string& what, bool replace) {
  InputCollector collector(targets, activations_->at_once());
  clock_.enter("forward");
  LACUNA_CHECK(activations_->run(
      block, replace, [&](int64_t place) { return collector.observer(place); },
      [&](int64_t samples) {
        clock_.enter("statistics");
        collector.add(activations_->executor());
        clock_.enter("forward");
        return progress_.step(samples, what);
      }));
  clock_.enter("statistics");
  return collector.take();
}

Status Run::prune_block(BlockWriter& writer, int64_t layer, model::Block* block) {
  const auto& targets = targets_of(layer);
  const std::string what = fmt::format("block {}/{}", layer + 1, spec_.layers);
  InputsByTarget inputs;
  if (statistics_) {  // also where they are for the error alone
    clock_.enter("load");
    LACUNA_TRY(inputs, statistics_->read(layer));
    for (auto& [linear, shared] : inputs) to_device(*shared, options_.compute.device);
  }
  if (block != nullptr) {
    if (targets.empty()) {
      LACUNA_CHECK(progress_.step(passes_.until_pruned(), what));
    } else {
      LACUNA_TRY(inputs, collect_inputs(*block, targets, what));
      if (passes_.regional_gradients()) LACUNA_CHECK(collect_regional_gradients(layer, what));
    }
  }
  return prune_targets(writer, layer, block, std::move(inputs));
}

Status Run::prune_targets(BlockWriter& writer, int64_t layer, model::Block* block,
                          InputsByTarget inputs) {
  Journal::Block finished;
  finished.notes = {{"layers", json::array()}, {"warnings", json::array()}};
  for (const std::string& linear : targets_of(layer)) {
    LACUNA_TRY(const at::Tensor pruned,
               prune_linear(weight_name(layer, linear), inputs[linear].get(), finished));
    inputs.erase(linear);  // the last one frees the Gram matrix and its factor
    if (block != nullptr) block->linear(linear).set_weight(pruned.to(options_.compute.dtype));
  }
  if (options_.reconstruct.block && !targets_of(layer).empty())
    LACUNA_CHECK(reconstruct_block(layer, *block, finished));
  clock_.enter("journal");
  return writer.write(layer, std::move(finished));
}

Result<at::Tensor> Run::prune_linear(const std::string& name, InputStatistics* inputs,
                                     Journal::Block& finished) {
  const auto start = Clock::now();
  const auto named = [&](const Error& error) {
    return Error{error.code, fmt::format("{}: {}", name, error.message)};
  };
  // With dense columns every weight has its own inputs.
  if (inputs != nullptr && options_.request.rest.kind == format::PatternKind::kDense) {
    clock_.enter("factor");
    const Status ready = method_->prepare(*inputs, options_.request);
    if (!ready.ok()) return named(ready.error());
  }
  clock_.enter("load");
  LACUNA_TRY(const Tensor dense, checkpoint_.dense(name));
  // Across the bus as it is stored: .to() with both would convert first.
  const at::Tensor weight = model::wrap(dense).to(options_.compute.device).to(at::kFloat);
  clock_.enter("solve");
  Request request = request_of(name);
  request.values = dense.dtype;
  if (request.keep_mask) request.pattern = checkpoint_.weights().at(name).pattern;
  if (auto gradient = gradients_.extract(name); !gradient.empty())
    request.gradient = std::move(gradient.mapped());
  auto pruned = method_for(name).prune(weight, inputs ? *inputs : InputStatistics(), request);
  if (!pruned.ok()) return named(pruned.error());
  // What codes stand for is not rounded.
  const at::Tensor stored = pruned->grid ? pruned->weight.to(weight.device())
                                         : pruned->weight.to(model::scalar_type(dense.dtype));
  if (!stored.isfinite().all().item<bool>())
    return check_failed("{}: an updated weight is too large for {}. Raise --damping.", name,
                        long_name(dense.dtype));
  clock_.enter("error");
  LayerReport layer{name};
  const at::Tensor zeros = pruned->grid ? pruned->mask.logical_not() : stored == 0;
  layer.sparsity =
      static_cast<double>(zeros.sum().item<int64_t>()) / static_cast<double>(stored.numel());
  layer.error = inputs ? relative_error(weight, stored.to(at::kFloat), inputs->gram,
                                        options_.request.executor)
                       : -1;
  layer.damping = pruned->damping;
  layer.iterations = pruned->iterations;
  layer.fell_back = pruned->fell_back;
  layer.seconds = seconds_since(start);
  if (const double off = layer.sparsity - request.sparsity;
      !request.keep_mask && request.pattern.kind == format::PatternKind::kBlock &&
      std::abs(off) > kNoticeable)
    pruned->warnings.push_back(fmt::format("whole blocks reach sparsity {:.4f} (asked for {:.4f})",
                                           layer.sparsity, request.sparsity));
  for (const std::string& warning : pruned->warnings) {
    report_.warnings.push_back(fmt::format("{}: {}", name, warning));
    finished.notes["warnings"].push_back(report_.warnings.back());
    progress_.log(report_.warnings.back());
  }
  finished.notes["layers"].push_back(to_json(layer));
  clock_.enter("journal");
  if (pruned->grid) {
    const auto coded = coded_matrix(*pruned, request.pattern, dense.dtype, request.coder);
    if (!coded.ok()) return named(coded.error());
    LACUNA_CHECK(finished.add(name, *coded));
  } else {
    finished.tensors.push_back({name, model::unwrap(stored)});
  }
  report_.layers.push_back(std::move(layer));
  return stored;
}

Status Run::check_reconstruction() const {
  if (options_.reconstruct.none()) return {};
  if (passes_.on_disk)
    return usage_error(
        "--reconstruct: needs the calibration itself, which runs through the blocks (got "
        "statistics "
        "of the dense model). Leave --statistics and --save-statistics out.");
  if (source_.samples == 0)
    return usage_error("--reconstruct: needs calibration (got none). Give --calibration.");
  return {};
}

Training Run::training(const std::string& what, int64_t weight) {
  const auto stepped = [this, what, weight](int64_t epoch, int64_t samples) {
    return progress_.step(samples * weight, fmt::format("{}, epoch {}/{}", what, epoch + 1,
                                                        options_.reconstruct.epochs));
  };
  return {options_.reconstruct, options_.compute, dense_->rotary(), options_.seed, stepped};
}

std::string Run::warn_of_rise(const std::string& what, const std::vector<double>& objectives) {
  report_.warnings.push_back(fmt::format(
      "{}: the reconstruction's objective rose (from {:.4f} in the first epoch to {:.4f} in the "
      "last). Give a smaller --learning-rate or more calibration.",
      what, objectives.front(), objectives.back()));
  progress_.log(report_.warnings.back());
  return report_.warnings.back();
}

Status Run::reconstruct_block(int64_t layer, model::Block& block, Journal::Block& finished) {
  clock_.enter("reconstruct");
  std::vector<at::Tensor> weights;
  for (const io::NamedTensor& each : finished.tensors) weights.push_back(model::wrap(each.tensor));
  BlockTraining trained(block, targets_of(layer), weights, options_.compute);
  LACUNA_TRY(const auto objectives,
             train_block(trained, activations_->hidden(), dense_->hidden(),
                         training(fmt::format("block {}/{}", layer + 1, spec_.layers), 1)));
  progress_.log(
      fmt::format("block {}: relative error of the outputs {:.5f} in the first epoch, {:.5f} in "
                  "the last",
                  layer, objectives.front(), objectives.back()));
  if (objectives.back() > objectives.front())
    finished.notes["warnings"].push_back(warn_of_rise(fmt::format("block {}", layer), objectives));
  trained.release();
  for (size_t i = 0; i < finished.tensors.size(); ++i) {
    const at::Tensor stored = trained.weights().rounded(i, weights[i].scalar_type());
    finished.tensors[i].tensor = model::unwrap(stored);
    block.linear(targets_of(layer)[i]).set_weight(stored.to(options_.compute.dtype));
  }
  return {};
}

Result<BlockTraining> Run::training_of(const Journal& journal, int64_t layer) const {
  LACUNA_TRY(model::Block block, model::Block::load(checkpoint_, spec_, layer, options_.compute));
  LACUNA_TRY(const Journal::Block finished, journal.read(layer));
  std::vector<at::Tensor> weights;
  for (const io::NamedTensor& each : finished.tensors) weights.push_back(model::wrap(each.tensor));
  return BlockTraining(std::move(block), targets_of(layer), weights, options_.compute);
}

Status Run::reconstruct_model(const Journal& journal) {
  clock_.enter("reconstruct");
  activations_.reset();
  LACUNA_TRY(const auto ends, model::Ends::load(checkpoint_, spec_, options_.compute));
  std::vector<BlockTraining> blocks;
  for (int64_t layer = 0; layer < spec_.layers; ++layer) {
    LACUNA_TRY(BlockTraining block, training_of(journal, layer));
    blocks.push_back(std::move(block));
  }
  LACUNA_TRY(report_.reconstruction, train_model(blocks, ends, calibration_, dense_->hidden(),
                                                 training("model", spec_.layers)));
  if (report_.reconstruction.back() > report_.reconstruction.front())
    warn_of_rise("model", report_.reconstruction);
  for (int64_t layer = 0; layer < spec_.layers; ++layer) {
    const BlockTraining& block = blocks[static_cast<size_t>(layer)];
    for (size_t i = 0; i < block.names().size(); ++i) {
      const std::string name = weight_name(layer, block.names()[i]);
      const at::ScalarType dtype = model::scalar_type(checkpoint_.weights().at(name).dtype);
      reconstructed_[name] = model::unwrap(block.weights().rounded(i, dtype));
    }
  }
  dense_.reset();
  return {};
}

Result<io::Weight> Run::kept_weight(const std::string& name) const {
  LACUNA_TRY(io::Weight weight, checkpoint_.weight(name));
  const bool head = name == spec_.embedding + ".weight" || name == spec_.lm_head + ".weight";
  if (options_.request.quantization.none() || options_.keep_head || !head) return weight;
  constexpr format::Quantization kHead{.code = format::Code::kInt8};
  const auto* sparse = std::get_if<format::CompactMatrix>(&weight);
  if (sparse != nullptr && !sparse->quantization.none()) return weight;
  auto coded = sparse ? format::quantize(*sparse, kHead, model::torch_executor())
                      : format::quantize(std::get<Tensor>(weight), kHead, model::torch_executor());
  if (!coded.ok())
    return Error{coded.error().code, fmt::format("{}: {}", name, coded.error().message)};
  return io::Weight(std::move(coded).value());
}

json Run::about_written() const {
  json about = about_method(options_, *method_, calibration_);
  if (statistics_) {
    about["statistics"] = "dense";
    about["calibration"] = statistics_->about().value("calibration", json());
  }
  return about;
}

Result<bool> Run::keeps_the_others(const io::Checkpoint& finished) const {
  std::set<std::string> pruned;
  for (int64_t layer = 0; layer < spec_.layers; ++layer)
    for (const std::string& linear : targets_of(layer)) pruned.insert(weight_name(layer, linear));
  if (finished.weights().size() != checkpoint_.weights().size()) return false;
  for (const auto& [name, info] : checkpoint_.weights()) {
    if (!finished.contains(name)) return false;
    if (pruned.contains(name)) continue;
    LACUNA_TRY(const Tensor before, checkpoint_.dense(name));
    LACUNA_TRY(const Tensor after, finished.dense(name));
    if (sampled_hashes(before.bytes) != sampled_hashes(after.bytes)) return false;
  }
  return true;
}

Result<std::optional<PruneReport>> Run::finished_before(bool overwrite) {
  std::error_code failure;
  if (!options_.resume || resumed_ > 0 || !fs::exists(out_ / "config.json", failure))
    return std::optional<PruneReport>();
  LACUNA_TRY(const auto finished, io::Checkpoint::open(out_));
  const json about = finished.config().value("lacuna", json::object());
  const json wanted = about_written();
  bool same = about.contains("layers") && about.contains("sparsity_reached");
  for (const auto& [key, value] : wanted.items()) same = same && about.value(key, json()) == value;
  if (same) {
    LACUNA_TRY(same, keeps_the_others(finished));
  }
  if (!same) {
    if (overwrite) return std::optional<PruneReport>();
    (void)journal_->remove();
    return bad_input(
        "{}: holds another finished model. Move it away, or replace it by --overwrite.",
        given_out_.string());
  }
  LACUNA_CHECK(journal_->remove());
  for (const json& layer : about.at("layers")) report_.layers.push_back(layer_from(layer));
  report_.sparsity = about.at("sparsity_reached");
  report_.bytes_dense = checkpoint_.total_bytes();
  report_.bytes_out = finished.total_bytes();
  return std::optional<PruneReport>(std::move(report_));
}

Status Run::write(const Journal& journal) {
  LACUNA_TRY(auto writer, io::CheckpointWriter::create(out_, writer_options()));
  std::map<std::string, int64_t> pruned;  // weight -> its block
  for (int64_t layer = 0; layer < spec_.layers; ++layer)
    for (const std::string& linear : targets_of(layer)) pruned[weight_name(layer, linear)] = layer;
  // In the order of the input's names, whose blocks follow each other closely.
  std::vector<int64_t> order;
  for (const auto& [name, info] : checkpoint_.weights())
    if (const auto found = pruned.find(name);
        found != pruned.end() && (order.empty() || order.back() != found->second))
      order.push_back(found->second);
  CompressedBlocks blocks(journal, options_.request.pattern, std::move(order), reconstructed_);
  MatricesByName matrices;  // of the block that was read last
  int64_t held = -1, zeros = 0, elements = 0;
  for (const auto& [name, info] : checkpoint_.weights()) {
    report_.bytes_dense +=
        static_cast<uint64_t>(element_count(info.shape).value_or(0)) * size_bytes(info.dtype);
    const auto found = pruned.find(name);
    if (found == pruned.end()) {
      LACUNA_TRY(const io::Weight weight, kept_weight(name));
      LACUNA_CHECK(std::visit([&](const auto& kept) { return writer.add(name, kept); }, weight));
      checkpoint_.release(name);
      continue;
    }
    if (found->second != held) {
      matrices.clear();
      LACUNA_TRY(matrices, blocks.next());
      held = found->second;
    }
    const format::CompactMatrix& matrix = matrices.at(name);
    const int64_t size = matrix.rows * matrix.columns;
    zeros += matrix.quantization.none() ? format::count_zeros(matrix)
                                        : size - format::count_kept(matrix);
    elements += size;
    LACUNA_CHECK(writer.add(name, matrix));
  }
  report_.sparsity = static_cast<double>(zeros) / static_cast<double>(elements);
  LACUNA_CHECK(io::copy_companion_files(checkpoint_.folder(), writer));
  json config = checkpoint_.config();
  config.erase("quantization_config");  // what described the old store
  config.erase("compression_config");
  json& about = config["lacuna"];
  // Of an input that was pruned before, only what its other weights are.
  json kept = json::object();
  for (const char* key : {"format_version", "weights"})
    if (about.is_object() && about.contains(key)) kept[key] = about[key];
  about = std::move(kept);
  about.update(about_written());
  about["sparsity_reached"] = report_.sparsity;
  json& layers = about["layers"] = json::array();
  for (const LayerReport& layer : report_.layers) {
    layers.push_back(to_json(layer));
    layers.back().erase("seconds");  // the one thing that two equal runs don't share
  }
  LACUNA_CHECK(writer.finish(config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out_));
  report_.bytes_out = written.total_bytes();
  return check_budget();
}

Status Run::check_budget() {
  constexpr double kClose = 0.001;
  const auto& budget = options_.allocation.budget;
  if (!budget || budget->kind == Budget::Kind::kMilliseconds) return {};
  report_.budget_reached = reached(*budget, out_, report_.sparsity);
  if (std::abs(report_.budget_reached - budget->amount) <= kClose * budget->amount) return {};
  report_.warnings.push_back(
      fmt::format("the budget {} came to {:.6g}: more weights are zero than were dropped, or whole "
                  "blocks don't come out even",
                  budget->text(), report_.budget_reached));
  progress_.log(report_.warnings.back());
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
    return Run(checkpoint, source, out, options, progress).run();
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
  std::vector<std::unique_ptr<Run>> runs;
  std::vector<std::optional<PruneReport>> reports;
  int64_t layers = 0, unfinished = 0;
  for (const Variant& variant : variants) {
    auto run = std::make_unique<Run>(checkpoint, none, variant.out, variant.options, quiet);
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
    LACUNA_TRY(const InputsByTarget inputs, statistics.read(layer));
    for (const auto& [linear, shared] : inputs)
      to_device(*shared, variants.front().options.compute.device);
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
        variant.options.compute.device != variants.front().options.compute.device)
      return usage_error("prune: variants need one damping and one device.");
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
