#include "lacuna/cli/tool.h"
#include "lacuna/report/json.h"

namespace lacuna::cli {

void add_eval(Tool& tool) {
  auto* verb = tool.verb(
      "eval", "Measure perplexity on a text, and KL divergence to the dense model.",
      {"lacuna eval models/llama --text wiki.test.raw",
       "lacuna eval models/llama-24 --text wiki.test.raw --windows 8 --compare models/llama"});
  static api::EvalJob job;
  static std::string compare, protocol = "raw-file";
  tool.runs_sparse(verb);
  tool.model(verb, job.model, "model folder");
  verb->add_option("--text", job.text, "text or .jsonl file, or a data set name")->required();
  verb->add_option("--compare", compare, "dense model to compare with, token by token");
  verb->add_option("--protocol", protocol,
                   "raw-file (tokenised once, no BOS) or hf-rows (rows joined by blank lines)")
      ->check(accepted_by([](const std::string& text) { return eval::parse_protocol(text); }))
      ->capture_default_str();
  verb->add_option("--length", job.options.length, "tokens a window")
      ->check(between(2, 1 << 20))
      ->capture_default_str();
  verb->add_option("--windows", job.options.windows, "this many, evenly spread (0 = all)")
      ->check(between(0))
      ->capture_default_str();
  verb->add_option("--batch", job.options.batch, "windows at once")
      ->check(between(1))
      ->capture_default_str();
  tool.action(verb, [&tool]() -> Status {
    LACUNA_TRY(job.options.protocol, eval::parse_protocol(protocol));
    if (!compare.empty()) job.compare = compare;
    job.choice = tool.compute();
    LACUNA_TRY(const auto report, api::evaluate(job, tool.progress()));
    auto json = report::to_json(report);
    json["model"] = job.model.string();
    json["text"] = report.text;
    std::string text = fmt::format(
        "perplexity {:.4f} ± {} ({}, {} windows of {}, {} tokens in {}, {:.1f} s)\n",
        report.perplexity, report.std_error ? fmt::format("{:.4f}", *report.std_error) : "-",
        report.protocol, report.windows, report.length, report.tokens, report.text, report.seconds);
    if (report.kl) {
      const auto& kl = *report.kl;
      text += fmt::format(
          "dense      {:.4f} (difference {:+.4f}, {:+.2f} %)\n"
          "KL         mean {:.5f} ± {:.5f}, median {:.5f}, 90 % {:.5f}, 99 % {:.5f}, max {:.4f}\n"
          "same top   {:.2f} % of tokens\n"
          "Δp         mean {:+.4f}, rms {:.4f}\n",
          kl.perplexity_reference, kl.ppl_delta, 100 * kl.ppl_delta / kl.perplexity_reference,
          kl.kl_mean, kl.kl_stderr, kl.kl_median, kl.kl_p90, kl.kl_p99, kl.kl_max,
          100 * kl.same_top, kl.delta_p_mean, kl.delta_p_rms);
    }
    tool.print(json, text);
    return {};
  });
}

}  // namespace lacuna::cli
