#include "lacuna/report/json.h"

#include <nlohmann/json.hpp>

#include "lacuna/prune/about.h"

namespace lacuna::report {

nlohmann::json to_json(const prune::PruneReport& report) {
  nlohmann::json layers = nlohmann::json::array();
  for (const prune::LayerReport& layer : report.layers) {
    layers.push_back(prune::to_json(layer));
    if (layer.error < 0) layers.back()["error"] = nullptr;
  }
  nlohmann::json phases = nlohmann::json::object();
  for (const auto& [phase, seconds] : report.phases) phases[phase] = seconds;
  nlohmann::json json = {{"verb", "prune"},
                         {"out", report.out.string()},
                         {"seconds", report.seconds},
                         {"phases", std::move(phases)},
                         {"sparsity", report.sparsity},
                         {"bytes_dense", report.bytes_dense},
                         {"bytes_out", report.bytes_out},
                         {"planned_peak_bytes", report.planned_peak_bytes},
                         {"warnings", report.warnings},
                         {"layers", std::move(layers)}};
  if (!report.reconstruction.empty()) json["reconstruction"] = report.reconstruction;
  if (!report.allocation.empty()) json["allocation"] = report.allocation;
  if (!report.budget.empty()) json["budget"] = report.budget;
  if (report.budget_reached > 0) json["budget_reached"] = report.budget_reached;
  return json;
}

nlohmann::json to_json(const eval::PerplexityReport& report) {
  nlohmann::json json = {{"verb", "eval"},           {"perplexity", report.perplexity},
                         {"stderr", nullptr},        {"mean_nll", report.mean_nll},
                         {"tokens", report.tokens},  {"windows", report.windows},
                         {"length", report.length},  {"protocol", report.protocol},
                         {"seconds", report.seconds}};
  if (report.std_error) json["stderr"] = *report.std_error;
  if (report.kl) {
    const eval::KlStatistics& kl = *report.kl;
    json.update({{"kl_mean", kl.kl_mean},
                 {"kl_stderr", kl.kl_stderr},
                 {"kl_median", kl.kl_median},
                 {"kl_max", kl.kl_max},
                 {"kl_p99", kl.kl_p99},
                 {"kl_p90", kl.kl_p90},
                 {"kl_p10", kl.kl_p10},
                 {"same_top", kl.same_top},
                 {"delta_p_mean", kl.delta_p_mean},
                 {"delta_p_rms", kl.delta_p_rms},
                 {"perplexity_reference", kl.perplexity_reference},
                 {"ppl_delta", kl.ppl_delta}});
  }
  return json;
}

nlohmann::json to_json(const model::Generation& generation) {
  return {{"verb", "generate"},
          {"text", generation.text},
          {"token_ids", generation.token_ids},
          {"finish_reason", generation.finish_reason},
          {"ttft_ms", generation.ttft_ms},
          {"tpot_ms", generation.tpot_ms},
          {"tokens_per_second", generation.tokens_per_second}};
}

}  // namespace lacuna::report
