#include "lacuna/api/quantization.h"

#include <algorithm>

#include "lacuna/api/jobs.h"
#include "lacuna/io/out_folder.h"

namespace lacuna {
namespace {

constexpr std::string_view kFloat16[] = {"bfloat16", "float16", "w8a16", "w4a16"};
constexpr std::string_view kInt8[] = {"int8", "w8a8", "w4a8"};

template <size_t N>
bool among(const std::string_view (&known)[N], std::string_view text) {
  return std::find(std::begin(known), std::end(known), text) != std::end(known);
}

}  // namespace

Result<QuantChoice> read(const QuantConfig& config) {
  QuantChoice choice;
  auto weights = format::Quantization::parse(config.weight_dtype);
  if (!weights.ok()) return usage_error("QuantConfig.weight_dtype: {}", weights.error().message);
  if (weights->none())
    return usage_error("QuantConfig.weight_dtype: none leaves nothing to do (need a code).");
  choice.weights = *weights;
  choice.int8_activations = among(kInt8, config.activation_dtype);
  if (!choice.int8_activations && !among(kFloat16, config.activation_dtype))
    return usage_error(
        "QuantConfig.activation_dtype: unknown type (got {}; need bfloat16, float16, w8a16 or "
        "w4a16; "
        "int8, w8a8 or w4a8).",
        config.activation_dtype);
  if (choice.int8_activations && choice.weights.code == format::Code::kFP8)
    return usage_error(
        "QuantConfig.activation_dtype: {} doesn't go with {} weights (need int8 or int4 weights, "
        "or "
        "activations of 16 bits).",
        config.activation_dtype, config.weight_dtype);
  if (config.calibration == "none") return choice;
  choice.calibrated = true;
  const auto coding = prune::parse_coding(config.calibration);
  if (!coding.ok())
    return usage_error("QuantConfig.calibration: unknown way (got {}; need none, awq or gptq).",
                       config.calibration);
  choice.coding = *coding;
  return choice;
}

Result<std::string> QuantizationManager::calibrate(const std::string& model,
                                                   const std::string& dataset,
                                                   const std::string& out) const {
  LACUNA_TRY(const QuantChoice choice, read(config_));
  const std::string folder =
      out.empty() ? io::folder_path(model).string() + "-" + choice.weights.text() : out;
  if (!choice.calibrated) {
    LACUNA_CHECK(api::convert(model, folder,
                              {.quantization = choice.weights, .keep_head = config_.keep_head}));
    return folder;
  }
  api::PruneJob job;
  job.model = model;
  job.out = folder;
  job.options.keep_head = config_.keep_head;
  job.options.seed = config_.seed;
  job.options.request.quantization = choice.weights;
  job.options.request.coding = choice.coding;
  job.options.request.keep_mask = true;
  job.calibration = dataset.empty() ? "self" : dataset;
  job.samples = config_.calibration_samples;
  job.length = config_.calibration_length;
  job.choice.device = config_.backend;
  LACUNA_CHECK(api::prune(job));
  return folder;
}

Result<std::shared_ptr<const model::Decoder>> QuantizationManager::load(
    const std::string& model) const {
  LACUNA_TRY(const QuantChoice choice, read(config_));
  LACUNA_TRY(auto decoder, api::load_decoder(model, {.device = config_.backend,
                                                     .int8_activations = choice.int8_activations}));
  return std::make_shared<const model::Decoder>(std::move(decoder));
}

}  // namespace lacuna
