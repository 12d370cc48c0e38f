#include "lacuna/model/synth.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "lacuna/core/version.h"
#include "lacuna/format/quantize.h"
#include "lacuna/io/compact_store.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/model/random_weight.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {
namespace {

using format::Pattern;
using format::PatternKind;
using nlohmann::json;

bool leaves_sparsity_open(const Pattern& pattern) {
  return pattern.kind == PatternKind::kUnstructured || pattern.kind == PatternKind::kBlock;
}

/// What a model of the options is, before it has weights.
struct Plan {
  json config;
  io::DecoderSpec spec;
};

Result<Plan> plan_of(const SynthOptions& options) {
  if (options.dtype != DType::kF32 && options.dtype != DType::kF16 && options.dtype != DType::kBF16)
    return usage_error(
        "synth: weights of this type can't be made (got {}; need float32, float16 "
        "or bfloat16).",
        long_name(options.dtype));
  if (options.sparsity < 0 || options.sparsity > 1)
    return usage_error("synth: sparsity must lie in [0, 1] (got {}).", options.sparsity);
  LACUNA_TRY(const std::string text, synth_config(options.like));
  Plan plan{.config = json::parse(text)};
  plan.config["dtype"] = long_name(options.dtype);
  LACUNA_TRY(plan.spec, io::decoder_spec(plan.config, nullptr, options.like));
  plan.config["lacuna"] = {{"method", "synth"}, {"seed", options.seed}, {"tool_version", kVersion}};
  return plan;
}

/// The matrix `name` of a model, number `stream` of its tensors.
Result<io::Weight> make_matrix(const SynthOptions& options, const Pattern& pattern,
                               const format::Quantization& code, const Shape& shape,
                               uint64_t stream) {
  const Tensor dense = random_weight(shape[0], shape[1], options.dtype, pattern, options.sparsity,
                                     options.seed, stream);
  const Executor executor = torch_executor();
  if (pattern.kind == PatternKind::kDense) {
    if (code.none()) return io::Weight(dense);
    LACUNA_TRY(auto coded, format::quantize(dense, code, executor));
    return io::Weight(std::move(coded));
  }
  LACUNA_TRY(auto compact, format::compress(dense, pattern, executor));
  if (!code.none()) {
    LACUNA_TRY(compact, format::quantize(compact, code, executor));
  }
  return io::Weight(std::move(compact));
}

/// Makes the model's weights one after another. @param add  takes a name and its weight
Status make_weights(const SynthOptions& options, const io::DecoderSpec& spec,
                    const std::function<Status(const std::string&, const io::Weight&)>& add) {
  std::set<std::string> in_blocks;
  for (const auto& weight : spec.block_weights()) in_blocks.insert(weight.name);
  const std::set<std::string> ends = spec.end_weights();
  const format::Quantization int8{.code = format::Code::kInt8};
  uint64_t stream = 0;
  for (const auto& [name, shape] : spec.tensors()) {
    ++stream;
    if (shape.size() == 1) {  // norms are 1, biases 0
      const double value = name.ends_with(".weight") ? 1.0 : 0.0;
      LACUNA_CHECK(add(name, unwrap(at::full(shape, value, scalar_type(options.dtype)))));
      continue;
    }
    const bool in_block = in_blocks.contains(name);
    format::Quantization code;
    if (in_block) code = options.quantization;
    if (ends.contains(name) && !options.quantization.none()) code = int8;
    LACUNA_TRY(const io::Weight weight,
               make_matrix(options, in_block ? options.pattern : Pattern{}, code, shape, stream));
    LACUNA_CHECK(add(name, weight));
  }
  return {};
}

/// A file of these tensors that was never written. Their bytes begin on a cache line, as in one
/// that is mapped.
Result<io::SafetensorsFile> file_in_memory(const std::vector<io::NamedTensor>& tensors) {
  struct alignas(64) Line {
    std::byte bytes[64];
  };
  std::vector<io::SafetensorsFile::Entry> entries;
  uint64_t end = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t begin = end;
    end += tensor.bytes.size();
    entries.push_back({name, tensor.dtype, tensor.shape, begin, end});
  }
  LACUNA_TRY(const std::string header, io::safetensors_header("memory", entries));
  const size_t size = header.size() + end;
  std::vector<Line> lines((size + sizeof(Line) - 1) / sizeof(Line));
  auto* to = reinterpret_cast<std::byte*>(lines.data());
  to = std::copy_n(reinterpret_cast<const std::byte*>(header.data()), header.size(), to);
  for (const auto& [name, tensor] : tensors)
    to = std::copy_n(tensor.bytes.data(), tensor.bytes.size(), to);
  return io::SafetensorsFile::parse(Bytes::take(std::move(lines)).slice(0, size), "memory");
}

}  // namespace

Result<SynthOptions> SynthOptions::as_variant(std::string_view text) const {
  SynthOptions variant = *this;
  variant.pattern = {}, variant.sparsity = 0, variant.quantization = {};
  std::string_view rest = text;
  const auto cut = [&rest](char mark) -> std::optional<std::string> {  // what follows the mark
    const size_t at = rest.find(mark);
    if (at == rest.npos) return std::nullopt;
    std::string after(rest.substr(at + 1));
    rest = rest.substr(0, at);
    return after;
  };
  const auto code = cut('/'), share = cut('@');
  LACUNA_TRY(variant.pattern, Pattern::parse(rest));
  if (code) {
    LACUNA_TRY(variant.quantization, format::Quantization::parse(*code));
  }
  variant.sparsity = variant.pattern.sparsity();
  bool number = false;
  if (share) {
    char* end = nullptr;
    variant.sparsity = std::strtod(share->c_str(), &end);
    number = !share->empty() && *end == '\0' && variant.sparsity >= 0 && variant.sparsity <= 1;
  }
  if (leaves_sparsity_open(variant.pattern) ? !number : share.has_value())
    return usage_error(
        "{}: no variant of a model (need PATTERN[@SPARSITY][/CODE], the sparsity, 0 to 1, for "
        "unstructured and block:RxC alone: dense, unstructured@0.5, 2:4/int8).",
        text);
  return variant;
}

std::string SynthOptions::variant() const {
  std::string text = pattern.text();
  if (leaves_sparsity_open(pattern)) text += fmt::format("@{}", sparsity);
  return quantization.none() ? text : text + "/" + quantization.text();
}

Result<SynthReport> synth(const SynthOptions& options, const std::filesystem::path& out) {
  LACUNA_TRY(const Plan plan, plan_of(options));
  LACUNA_TRY(auto writer, io::CheckpointWriter::create(out, {.store = options.store}));
  LACUNA_CHECK(
      make_weights(options, plan.spec, [&](const std::string& name, const io::Weight& weight) {
        return std::visit([&](const auto& held) { return writer.add(name, held); }, weight);
      }));
  LACUNA_CHECK(writer.finish(plan.config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out));
  return SynthReport{plan.spec.parameters(), written.total_bytes()};
}

Result<io::Checkpoint> synth_in_memory(const SynthOptions& options) {
  LACUNA_TRY(Plan plan, plan_of(options));
  std::vector<io::SafetensorsFile> files;
  io::SparseDeclarations declared;
  LACUNA_CHECK(make_weights(
      options, plan.spec, [&](const std::string& name, const io::Weight& weight) -> Status {
        std::vector<io::NamedTensor> parts;
        if (const auto* matrix = std::get_if<format::CompactMatrix>(&weight)) {
          declared[name] = io::declaration_of(*matrix);
          LACUNA_TRY(parts, io::compact_parts(name, *matrix));
        } else {
          parts = {{name, std::get<Tensor>(weight)}};
        }
        LACUNA_TRY(auto file, file_in_memory(parts));
        files.push_back(std::move(file));
        return {};
      }));
  io::write_declarations(declared, plan.config);
  return io::Checkpoint::from_files(plan.config, files, options.like);
}

}  // namespace lacuna::model
