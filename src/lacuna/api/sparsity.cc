#include "lacuna/api/sparsity.h"

#include <algorithm>
#include <filesystem>

#include "lacuna/api/jobs.h"
#include "lacuna/api/verify.h"
#include "lacuna/io/out_folder.h"
#include "lacuna/kernels/linear.h"

namespace lacuna {
namespace fs = std::filesystem;
namespace {

Error not_yet(std::string_view option, std::string_view value) {
  return usage_error("SparsityConfig.{}: \"{}\" is not available yet.", option, value);
}

/// The pattern that the options of these names spell.
Result<format::Pattern> spelled(std::string_view options, const std::string& text) {
  auto pattern = format::Pattern::parse(text);
  if (!pattern.ok()) return usage_error("SparsityConfig.{}: {}", options, pattern.error().message);
  return pattern;
}

Result<format::Pattern> square_blocks(const SparsityConfig& config) {
  return spelled("block_size", fmt::format("block:{0}x{0}", config.block_size));
}

Result<format::Pattern> pattern_of(const SparsityConfig& config) {
  if (config.pattern == "unstructured") return format::Pattern::unstructured();
  if (config.pattern == "n:m") return spelled("n and m", fmt::format("{}:{}", config.n, config.m));
  if (config.pattern == "block") return square_blocks(config);
  if (config.pattern == "dynamic") return not_yet("pattern", "dynamic");
  return usage_error(
      "SparsityConfig.pattern: unknown pattern (got {}; need unstructured, n:m or block).",
      config.pattern);
}

/// Everything that later work brings is refused by name, never silently ignored.
Status check_available(const SparsityConfig& config) {
  if (config.enable_dynamic) return not_yet("enable_dynamic", "true");
  if (config.fuse_with_quant && config.quant_dtype.empty())
    return usage_error(
        "SparsityConfig.fuse_with_quant: true needs a quant_dtype (got none; need int8, int4 or "
        "fp8).");
  const SparsityConfig defaults;
  if (config.dynamic_threshold != defaults.dynamic_threshold)
    return not_yet("dynamic_threshold", fmt::format("{}", config.dynamic_threshold));
  if (config.use_hardware_accel != defaults.use_hardware_accel)
    return not_yet("use_hardware_accel", "false");
  if (config.backend == "triton" || config.backend == "tensorrt")
    return usage_error("SparsityConfig.backend: there is no {} backend (need auto, cpu or cuda).",
                       config.backend);
  return {};
}

/// The score that a method takes where it may use gradients.
Result<std::string> gradient_score_of(const std::string& method) {
  constexpr std::pair<std::string_view, std::string_view> kForms[] = {{"magnitude", "gradient"},
                                                                      {"gradient", "gradient"},
                                                                      {"wanda", "regional"},
                                                                      {"hessian", "fisher"}};
  for (const auto& [name, score] : kForms)
    if (name == method) return std::string(score);
  return usage_error(
      "SparsityConfig.use_gradient: {} has no form with gradients (need magnitude, gradient, wanda "
      "or hessian).",
      method);
}

Result<format::Quantization> codes_of(const SparsityConfig& config) {
  if (config.quant_dtype.empty()) return format::Quantization{};
  const auto codes = format::Quantization::parse(config.quant_dtype);
  if (!codes.ok()) return usage_error("SparsityConfig.quant_dtype: {}", codes.error().message);
  if (!codes->none() && config.format != "compact")
    return usage_error("SparsityConfig.quant_dtype: the compact format alone has codes (got {}).",
                       config.format);
  return codes;
}

Result<api::PruneJob> job_of(const SparsityConfig& config) {
  LACUNA_CHECK(check_available(config));
  api::PruneJob job;
  LACUNA_TRY(job.options.request.pattern, pattern_of(config));
  if (config.sparsity_ratio < 0 || config.sparsity_ratio > 1)
    return usage_error("SparsityConfig.sparsity_ratio: outside [0, 1] (got {}).",
                       config.sparsity_ratio);
  job.options.request.sparsity =
      config.pattern == "n:m" ? job.options.request.pattern.sparsity() : config.sparsity_ratio;
  job.options.method = config.pruning_method;
  if (config.use_gradient) {
    LACUNA_TRY(job.options.score, gradient_score_of(config.pruning_method));
  }
  job.options.target = config.target_layers;
  job.options.exclude = config.exclude_layers;
  job.options.seed = config.seed;
  LACUNA_TRY(job.options.store, api::parse_store(config.format, "SparsityConfig.format"));
  if (job.options.store == io::Store::kBsr) {
    LACUNA_TRY(job.options.blocks, square_blocks(config));
  }
  job.calibration = config.calibration_dataset.empty() ? "self" : config.calibration_dataset;
  job.samples = config.calibration_samples;
  job.length = config.calibration_length;
  job.choice.device = config.backend;
  return job;
}

}  // namespace

SparsityManager::SparsityManager(SparsityConfig config) : config_(std::move(config)) {}
SparsityManager::~SparsityManager() = default;

Result<std::string> SparsityManager::prune(const std::string& model, const std::string& out) {
  LACUNA_TRY(api::PruneJob job, job_of(config_));
  LACUNA_TRY(const auto wanted, codes_of(config_));
  // What is left to do once it is pruned.
  const auto codes = config_.fuse_with_quant ? format::Quantization{} : wanted;
  if (config_.fuse_with_quant) job.options.request.quantization = wanted;
  job.model = model;
  std::string suffix = job.options.request.pattern.text();
  std::replace(suffix.begin(), suffix.end(), ':', '-');
  if (!wanted.none()) suffix += "-" + wanted.text();
  const fs::path folder =
      out.empty() ? fs::path(io::folder_path(model).string() + "-" + suffix) : fs::path(out);
  job.out = folder;
  if (!codes.none()) {
    LACUNA_CHECK(io::check_free(folder));
    job.out = io::folder_path(folder).string() + "-unquantized";
  }
  LACUNA_TRY(const auto done, api::prune(job));
  uint64_t bytes = done.bytes_out;
  if (!codes.none()) {
    LACUNA_TRY(const auto coded, api::convert(job.out, folder, {.quantization = codes}));
    bytes = coded.bytes_out;
    std::error_code ignored;  // it is in nobody's way
    fs::remove_all(job.out, ignored);
  }
  report_["avg_sparsity"] = done.sparsity;
  report_["memory_saving"] =
      1.0 - static_cast<double>(bytes) / static_cast<double>(done.bytes_dense);
  return folder.string();
}

Result<std::shared_ptr<const model::Decoder>> SparsityManager::load_sparse_model(
    const std::string& model) {
  LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(model));
  LACUNA_TRY(const auto spec, model::spec_of(checkpoint));
  LACUNA_TRY(const auto compute, api::resolve({.device = config_.backend}, spec.dtype));
  LACUNA_TRY(auto decoder, model::Decoder::load(checkpoint, compute));
  return std::make_shared<const model::Decoder>(std::move(decoder));
}

Result<std::map<std::string, double>> SparsityManager::verify_sparsity(const std::string& model) {
  LACUNA_TRY(const auto verified, api::verify(model));
  if (!verified.ok) return check_failed("{}", verified.violations.front());
  std::map<std::string, double> sparsity;
  for (const auto& layer : verified.layers) sparsity[layer.name] = layer.sparsity;
  report_["avg_sparsity"] = verified.sparsity;
  return sparsity;
}

Result<std::string> SparsityManager::select_kernel() const {
  LACUNA_CHECK(check_available(config_));
  LACUNA_TRY(const format::Pattern pattern, pattern_of(config_));
  LACUNA_TRY(const auto compute, api::resolve({.device = config_.backend}, DType::kBF16));
  constexpr std::string_view kExpands = "expand, then the dense product of torch";
  // A decode step of a matrix of the usual size; the choice depends on types and tokens, not on N.
  kernels::Problem problem{.activations = model::dtype_of(compute.dtype),
                           .outputs = 4096,
                           .inputs = 4096,
                           .tokens = 1,
                           .pattern = pattern,
                           .sparsity = config_.sparsity_ratio};
  if (pattern.kind == format::PatternKind::kKeepOf) problem.sparsity = pattern.sparsity();
  if (compute.device.is_cuda()) {
    const auto* operation = kernels::linear_operation(pattern.kind);
    problem.operation = operation->name;
    LACUNA_TRY(const auto* kernel,
               kernels::choose_gpu_kernel(*operation, problem, kernels::Device::this_gpu()));
    if (kernel == nullptr)
      return fmt::format("{} on {} (`lacuna doctor --op {}` says why)", kExpands,
                         compute.device.str(), problem.text());
    return fmt::format("{}:{} for {}; more tokens: {}", operation->name, kernel->name,
                       problem.text(), kExpands);
  }
  const auto* operation = kernels::linear_operation_on_cpu(problem);
  problem.operation = operation->name;
  LACUNA_TRY(const auto plan, operation->plan(problem, kernels::Device::this_cpu()));
  return fmt::format(
      "{}:{} for {}; more than {} tokens: a tiled kernel where one takes them, else {}",
      operation->name, plan.candidate->name, problem.text(), format::kMaxTokens, kExpands);
}

Status SparsityManager::measure(const std::string& model, const std::string& dense,
                                const std::string& text) {
  api::EvalJob job;
  job.model = model;
  job.compare = dense;
  job.text = text;
  job.choice.device = config_.backend;
  LACUNA_TRY(const auto evaluated, api::evaluate(job));
  report_["perplexity_delta"] = evaluated.kl->ppl_delta / evaluated.kl->perplexity_reference;
  double tpot[2];
  const std::string folders[2] = {dense, model};
  for (int i = 0; i < 2; ++i) {
    api::GenerateJob generate;
    generate.model = folders[i];
    generate.prompt = "The";
    generate.options.max_new_tokens = 64;
    generate.options.ignore_eos = true;
    generate.choice.device = config_.backend;
    LACUNA_TRY(const auto generated, api::generate(generate));
    tpot[i] = generated.generation.tpot_ms;
  }
  report_["speedup"] = tpot[0] / tpot[1];
  return {};
}

std::map<std::string, double> SparsityManager::report() const { return report_; }

}  // namespace lacuna
