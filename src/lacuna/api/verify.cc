#include "lacuna/api/verify.h"

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/api/layers.h"
#include "lacuna/format/compact.h"
#include "lacuna/format/quantize.h"
#include "lacuna/io/misfit.h"
#include "lacuna/model/decoder.h"

namespace lacuna::api {
namespace {

constexpr double kSparsityTolerance = 0.005;

bool is_zero(const std::byte* element, size_t width) {
  // Both zeros: every bit but the sign (the top bit of the last byte, little-endian) is clear.
  for (size_t i = 0; i + 1 < width; ++i)
    if (element[i] != std::byte{0}) return false;
  return (element[width - 1] & std::byte{0x7f}) == std::byte{0};
}

/// The first kept value that differs from the dense model's, as a violation.
/// @param drops  zeros may stand for dropped values
std::optional<std::string> difference(const std::string& name, const Tensor& stored,
                                      const Tensor& dense, bool drops) {
  if (stored.shape != dense.shape || stored.dtype != dense.dtype)
    return fmt::format("{}: {} {} differs from the dense model's {} {}", name,
                       long_name(stored.dtype), shape_text(stored.shape), long_name(dense.dtype),
                       shape_text(dense.shape));
  const size_t width = size_bytes(stored.dtype);
  const int64_t columns = stored.shape.empty() ? 1 : stored.shape.back();
  for (int64_t i = 0; i < stored.elements(); ++i) {
    const std::byte* kept = stored.bytes.data() + i * width;
    if (drops && is_zero(kept, width)) continue;
    if (std::memcmp(kept, dense.bytes.data() + i * width, width) != 0)
      return fmt::format("{}: row {}, column {}: kept value differs from the dense model's", name,
                         i / columns, i % columns);
  }
  return std::nullopt;
}

Tensor densify(const io::Weight& weight) {
  if (const auto* compact = std::get_if<format::CompactMatrix>(&weight))
    return format::expand(*compact);
  return std::get<Tensor>(weight);
}

std::string violation_text(const std::string& name, const format::Violation& violation) {
  if (violation.row < 0) return fmt::format("{}: {}", name, violation.what);
  return fmt::format("{}: row {}, column {}: {}", name, violation.row, violation.column,
                     violation.what);
}

/// How a weight breaks an expected pattern, in one line.
std::optional<std::string> mismatch(const std::string& name, const io::Weight& weight,
                                    const format::Pattern& pattern,
                                    const format::Pattern& expected) {
  if (pattern == expected) return std::nullopt;
  // Zeros alone don't say which blocks were kept: blocks have to be declared.
  if (expected.kind == format::PatternKind::kBlock)
    return fmt::format("{}: follows {} (need {})", name, pattern.text(), expected.text());
  const auto broken = format::check_pattern(densify(weight), expected, 1);
  if (broken.empty()) return std::nullopt;
  return violation_text(name, broken[0]);
}

class Verifier {
 public:
  Verifier(const io::Checkpoint& checkpoint, const VerifyOptions& options, VerifyReport& report)
      : checkpoint_(checkpoint), options_(options), report_(report) {}

  /// @param prunable  the weight belongs to a Linear of a decoder block
  Status check(const io::WeightInfo& info, bool prunable, const io::Checkpoint* dense) {
    if (checkpoint_.has_checksums()) {
      auto chunks = checkpoint_.verify_checksums(info.name);
      if (!chunks.ok()) {
        fault(chunks.error().message);
      } else {
        for (const std::string& chunk : *chunks) fault(chunk);
      }
    }
    auto read = checkpoint_.weight(info.name);
    if (!read.ok()) {
      fault(read.error().message);
      return {};
    }
    const io::Weight& weight = *read;
    const SparsityCount count = count_zeros(weight);
    const format::Pattern pattern = pattern_of(info, weight);
    const bool sparse = pattern.kind != format::PatternKind::kDense;
    if (const auto place = first_not_finite(weight))
      fault(fmt::format("{}: row {}, column {}: not a finite number", info.name, place->first,
                        place->second));
    if (const Tensor* tensor = std::get_if<Tensor>(&weight); tensor && sparse) {
      for (const auto& violation : format::check_pattern(*tensor, info.pattern))
        fault(violation_text(info.name, violation));
    }
    if (prunable)
      report_.layers.push_back({info.name, pattern.text(), info.quantization.text(),
                                count.sparsity(), count.zeros, count.elements});
    const auto* coded = std::get_if<format::CompactMatrix>(&weight);
    if (coded != nullptr && coded->quantization.none()) coded = nullptr;
    if (prunable && sparse) {
      total_.add(count);
      if (options_.expect_pattern)
        if (auto broken = mismatch(info.name, weight, pattern, *options_.expect_pattern))
          fault(*broken);
    }
    if (dense != nullptr && dense->contains(info.name)) {
      LACUNA_TRY(const Tensor reference, dense->dense(info.name));
      if (coded != nullptr) {
        for (const auto& violation : format::check_codes(*coded, reference, 1))
          fault(violation_text(info.name, violation));
      } else if (auto different =
                     difference(info.name, densify(weight), reference, prunable && sparse)) {
        fault(*different);
        report_.differs = true;
      }
    } else if (dense != nullptr) {
      fault(fmt::format("{}: the dense model has no such weight", info.name));
    }
    ++report_.tensors;
    return {};
  }

  void finish() {
    report_.sparsity = total_.sparsity();
    if (options_.expect_pattern && total_.elements == 0)
      fault(fmt::format("no layer is sparse (need pattern {})", options_.expect_pattern->text()));
    if (options_.expect_sparsity &&
        std::abs(report_.sparsity - *options_.expect_sparsity) > kSparsityTolerance)
      fault(fmt::format("sparsity is {:.4f} (need {:.4f} within {})", report_.sparsity,
                        *options_.expect_sparsity, kSparsityTolerance));
    report_.ok = report_.violations.empty();
  }

 private:
  void fault(std::string line) { report_.violations.push_back(std::move(line)); }

  const io::Checkpoint& checkpoint_;
  const VerifyOptions& options_;
  VerifyReport& report_;
  SparsityCount total_;
};

}  // namespace

Result<VerifyReport> verify(const std::filesystem::path& model, const VerifyOptions& options,
                            const std::function<void(int64_t, int64_t)>& progress) {
  if (!std::filesystem::is_directory(model))
    return bad_input("{}: no such model folder. Give the folder that holds config.json.",
                     model.string());
  if (!std::filesystem::exists(model / "config.json"))
    return bad_input("{}: no config.json, so no model. Give the folder that holds it.",
                     model.string());
  VerifyReport report;
  report.model = model.string();
  auto opened = io::Checkpoint::open(model);
  if (!opened.ok()) {
    report.violations.push_back(opened.error().message);
    return report;
  }
  auto spec = model::spec_of(*opened);
  if (!spec.ok()) {
    report.violations.push_back(spec.error().message);
    return report;
  }
  std::optional<io::Checkpoint> dense;
  if (options.against) {
    LACUNA_TRY(dense, io::Checkpoint::open(*options.against));
  }
  report.has_checksums = opened->has_checksums();
  const std::set<std::string> prunable = block_weights(*spec);
  report.violations = misfits(*opened, *spec);
  std::set<std::string> described;
  for (const auto& [name, shape] : spec->tensors()) {
    described.insert(name);
    if (prunable.contains(name)) continue;
    if (const auto line = io::misfit(*opened, name, shape)) report.violations.push_back(*line);
  }
  if (dense)
    for (const auto& [name, info] : dense->weights())
      if (!opened->contains(name) && !described.contains(name))
        report.violations.push_back(
            fmt::format("tensor \"{}\" is missing (the dense model has it)", name));
  Verifier verifier(*opened, options, report);
  int64_t done = 0;
  const auto total = static_cast<int64_t>(opened->weights().size());
  for (const auto& [name, info] : opened->weights()) {
    LACUNA_CHECK(verifier.check(info, prunable.contains(name), dense ? &*dense : nullptr));
    if (progress) progress(++done, total);
  }
  verifier.finish();
  return report;
}

Status check_checksums(const std::filesystem::path& model) {
  if (!std::filesystem::is_directory(model))
    return bad_input("{}: no such model folder, so there are no checksums. Leave --verify out.",
                     model.string());
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(model));
  if (!checkpoint.has_checksums())
    return bad_input("{}: has no checksums.json to verify. Leave --verify out.", model.string());
  for (const auto& [name, info] : checkpoint.weights()) {
    LACUNA_TRY(const auto chunks, checkpoint.verify_checksums(name));
    if (!chunks.empty()) return bad_input("{}. The file is damaged: get it again.", chunks.front());
  }
  return {};
}

nlohmann::json to_json(const VerifyReport& report) {
  nlohmann::json layers = nlohmann::json::array();
  for (const VerifiedLayer& layer : report.layers)
    layers.push_back({{"name", layer.name},
                      {"pattern", layer.pattern},
                      {"quantization", layer.quantization},
                      {"sparsity", layer.sparsity},
                      {"zeros", layer.zeros},
                      {"elements", layer.elements}});
  return {{"verb", "verify"},
          {"model", report.model},
          {"ok", report.ok},
          {"checksums", report.has_checksums},
          {"tensors", report.tensors},
          {"sparsity", report.sparsity},
          {"layers", std::move(layers)},
          {"violations", report.violations}};
}

}  // namespace lacuna::api
