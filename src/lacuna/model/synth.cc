#include "lacuna/model/synth.h"

#include <nlohmann/json.hpp>
#include <set>

#include "lacuna/core/version.h"
#include "lacuna/io/decoder_spec.h"
#include "lacuna/model/random_weight.h"
#include "lacuna/model/torch.h"

namespace lacuna::model {
namespace {

using format::Pattern;
using format::PatternKind;

Status write_tensors(const SynthOptions& options, const io::DecoderSpec& spec,
                     const std::set<std::string>& sparse, io::CheckpointWriter& writer) {
  uint64_t stream = 0;
  for (const auto& [name, shape] : spec.tensors()) {
    ++stream;
    if (shape.size() == 1) {  // norms are 1, biases 0
      const double value = name.ends_with(".weight") ? 1.0 : 0.0;
      LACUNA_CHECK(writer.add(name, unwrap(at::full(shape, value, scalar_type(options.dtype)))));
      continue;
    }
    const bool is_sparse = sparse.count(name) > 0;
    const Pattern pattern = is_sparse ? options.pattern : Pattern{};
    const Tensor dense = random_weight(shape[0], shape[1], options.dtype, pattern, options.sparsity,
                                       options.seed, stream);
    if (!is_sparse) {
      LACUNA_CHECK(writer.add(name, dense));
      continue;
    }
    LACUNA_TRY(const auto compact, format::compress(dense, pattern));
    LACUNA_CHECK(writer.add(name, compact));
  }
  return {};
}

}  // namespace

Result<SynthReport> synth(const SynthOptions& options, const std::filesystem::path& out) {
  if (options.dtype != DType::kF32 && options.dtype != DType::kF16 && options.dtype != DType::kBF16)
    return usage_error(
        "synth: weights of this type can't be made (got {}; need float32, float16 "
        "or bfloat16).",
        long_name(options.dtype));
  if (options.sparsity < 0 || options.sparsity > 1)
    return usage_error("synth: sparsity must lie in [0, 1] (got {}).", options.sparsity);
  LACUNA_TRY(const std::string text, synth_config(options.like));
  auto config = nlohmann::json::parse(text);
  config["dtype"] = long_name(options.dtype);
  LACUNA_TRY(const auto spec, io::decoder_spec(config, nullptr, options.like));
  std::set<std::string> sparse;
  if (options.pattern.kind != PatternKind::kDense)
    for (const auto& weight : spec.block_weights()) sparse.insert(weight.name);

  LACUNA_TRY(auto writer, io::CheckpointWriter::create(out, {.store = options.store}));
  LACUNA_CHECK(write_tensors(options, spec, sparse, writer));
  config["lacuna"] = {{"method", "synth"}, {"seed", options.seed}, {"tool_version", kVersion}};
  LACUNA_CHECK(writer.finish(config));
  LACUNA_TRY(const auto written, io::Checkpoint::open(out));
  return SynthReport{spec.parameters(), written.total_bytes()};
}

}  // namespace lacuna::model
