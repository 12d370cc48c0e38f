#include "lacuna/api/store.h"

#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/api/layers.h"
#include "lacuna/io/out_folder.h"

namespace lacuna::api {
namespace fs = std::filesystem;
namespace {

/// The pattern under which a dense tensor is worth compacting, or kDense.
format::Pattern compactable(const io::WeightInfo& info, const io::Weight& weight, bool prunable) {
  const format::Pattern pattern = pattern_of(info, weight);
  const bool declared = info.pattern.kind != format::PatternKind::kDense;
  return declared || prunable ? pattern : format::Pattern();
}

/// What tells two masks apart.
std::vector<std::string> mask_checksums(const format::CompactMatrix& matrix) {
  std::vector<std::string> all = {matrix.pattern.text()};
  for (const Bytes* part : {&matrix.bitmap, &matrix.block_columns, &matrix.block_offsets})
    for (std::string& chunk : io::chunk_checksums(*part)) all.push_back(std::move(chunk));
  return all;
}

/// Quantises weights and remembers what they were.
class Quantizer {
 public:
  Quantizer(const io::DecoderSpec& spec, const ConvertOptions& options)
      : blocks_(options.quantization) {
    if (!options.keep_head) head_ = spec.end_weights();
  }

  /// Refuses what can't be quantised before anything is written.
  Status check(const io::Checkpoint& checkpoint, io::Store store) const {
    if (blocks_.none()) return {};
    if (store != io::Store::kCompact)
      return usage_error(
          "--quantize: only the compact store has codes. Leave --store (--format) out.");
    for (const auto& [name, info] : checkpoint.weights())
      if (!info.quantization.none())
        return bad_input(
            "{0}: weight \"{1}\" is quantised already (got {2}; need unquantised weights). Write "
            "their values out first: lacuna convert {0} -o FOLDER --store dense.",
            checkpoint.folder().string(), name, info.quantization.text());
    return {};
  }

  /// The weight as codes, if it is one of those that become some.
  Result<io::Weight> apply(const io::WeightInfo& info, io::Weight weight, bool in_block) {
    const bool head = head_.contains(info.name);
    if (blocks_.none() || (!in_block && !head)) return weight;
    const format::Quantization code =
        head ? format::Quantization{.code = format::Code::kInt8} : blocks_;
    LACUNA_TRY(auto coded, io::quantize(info.name, weight, code, model::torch_executor()));
    const auto* sparse = std::get_if<format::CompactMatrix>(&weight);
    const int64_t zeros =
        sparse ? format::count_zeros(*sparse) : format::count_zeros(std::get<Tensor>(weight));
    done_.push_back({.name = info.name,
                     .pattern = coded.pattern.text(),
                     .from = std::string(long_name(info.dtype)),
                     .to = code.text(),
                     .bytes_in = info.bytes,
                     .bytes_out = coded.size_bytes(),
                     .kept = format::count_kept(coded),
                     .rounded_to_zero = format::count_zeros(coded) - zeros});
    // Of what was read: the codes had no part in it.
    masks_.push_back(sparse ? mask_checksums(*sparse) : mask_checksums(format::CompactMatrix{}));
    return io::Weight(std::move(coded));
  }

  /// Compares the masks with those in the folder that was written.
  Result<std::vector<QuantizedWeight>> finish(const io::Checkpoint& written) {
    for (size_t i = 0; i < done_.size(); ++i) {
      LACUNA_TRY(const io::Weight weight, written.weight(done_[i].name));
      const auto* matrix = std::get_if<format::CompactMatrix>(&weight);
      if (matrix == nullptr || mask_checksums(*matrix) != masks_[i])
        return check_failed("{}: weight \"{}\" was written with another mask than it had.",
                            written.folder().string(), done_[i].name);
    }
    return std::move(done_);
  }

 private:
  format::Quantization blocks_;
  std::set<std::string> head_;
  std::vector<QuantizedWeight> done_;
  std::vector<std::vector<std::string>> masks_;
};

}  // namespace

Result<io::Store> parse_store(const std::string& name, std::string_view option) {
  using io::Store;
  if (name == "compressed-tensors") return Store::kSparseBitmask;
  for (const Store store : {Store::kCompact, Store::kDense, Store::kCsr, Store::kCoo, Store::kBsr})
    if (name == io::store_name(store)) return store;
  return usage_error(
      "{}: unknown store (got {}; need compact, dense, compressed-tensors, csr, coo or bsr).",
      option, name);
}

Result<ConvertReport> convert_store(const fs::path& model, const fs::path& out,
                                    const ConvertOptions& options,
                                    const std::function<void(int64_t, int64_t)>& progress) {
  LACUNA_CHECK(io::check_not_source(out, model));
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(model));
  LACUNA_TRY(const auto spec, model::spec_of(checkpoint));
  const auto prunable = block_weights(spec);
  Quantizer quantizer(spec, options);
  LACUNA_CHECK(quantizer.check(checkpoint, options.store));
  LACUNA_TRY(auto writer,
             io::CheckpointWriter::create(out, {.store = options.store, .blocks = options.blocks}));
  int64_t done = 0;
  const auto total = static_cast<int64_t>(checkpoint.weights().size());
  for (const auto& [name, info] : checkpoint.weights()) {
    LACUNA_TRY(io::Weight weight, checkpoint.weight(name));
    if (const Tensor* dense = std::get_if<Tensor>(&weight)) {
      const format::Pattern pattern = compactable(info, weight, prunable.contains(name));
      if (pattern.kind != format::PatternKind::kDense) {
        LACUNA_TRY(weight, format::compress(*dense, pattern, model::torch_executor()));
      }
    }
    LACUNA_TRY(weight, quantizer.apply(info, std::move(weight), prunable.contains(name)));
    LACUNA_CHECK(std::visit([&](const auto& held) { return writer.add(name, held); }, weight));
    if (progress) progress(++done, total);
  }
  LACUNA_CHECK(io::copy_companion_files(model, writer));
  // What described the old store goes; the writer describes the new one.
  nlohmann::json config = checkpoint.config();
  config.erase("quantization_config");
  config.erase("compression_config");
  LACUNA_CHECK(writer.finish(config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out));
  ConvertReport report{checkpoint.total_bytes(), written.total_bytes(), out.string()};
  LACUNA_TRY(report.quantized, quantizer.finish(written));
  return report;
}

}  // namespace lacuna::api
