#include <cstdio>
#include <iostream>
#include <iterator>

#include "lacuna/cli/tool.h"
#include "lacuna/report/json.h"

namespace lacuna::cli {

void add_generate(Tool& tool) {
  auto* verb =
      tool.verb("generate", "Continue a prompt, or answer it with --chat.",
                {"lacuna generate models/llama --prompt 'Once upon a time'",
                 "echo 'What is sparsity?' | lacuna generate models/smollm2 --prompt - --chat"});
  static api::GenerateJob job;
  auto& options = job.options;
  tool.computes(verb);
  tool.seeded(verb);
  tool.model(verb, job.model, "model folder");
  verb->add_option("--prompt", job.prompt, "text to continue; - reads stdin")->required();
  verb->add_flag("--chat", job.chat, "put the prompt through the model's chat template");
  verb->add_option("--max-new-tokens", options.max_new_tokens)
      ->check(between(1))
      ->capture_default_str();
  verb->add_option("--temperature", options.temperature, "0 = greedy")
      ->check(between(0))
      ->capture_default_str();
  verb->add_option("--top-k", options.top_k, "0 = all")->check(between(0))->capture_default_str();
  verb->add_option("--top-p", options.top_p)->check(between(0, 1))->capture_default_str();
  verb->add_option("--min-p", options.min_p)->check(between(0, 1))->capture_default_str();
  verb->add_option("--repetition-penalty", options.repetition_penalty)
      ->check(above(0))
      ->capture_default_str();
  verb->add_option("--stop", options.stop, "texts that end the answer");
  verb->add_flag("--ignore-eos", options.ignore_eos, "go on to --max-new-tokens");
  tool.action(verb, [&tool]() -> Status {
    if (job.prompt == "-") {
      job.prompt.assign(std::istreambuf_iterator<char>(std::cin), {});
      while (!job.prompt.empty() && job.prompt.back() == '\n') job.prompt.pop_back();
    }
    options.seed = tool.seed();
    job.choice = tool.compute();
    if (!tool.json())
      job.on_text = [](std::string_view piece) {
        std::fwrite(piece.data(), 1, piece.size(), stdout);
        std::fflush(stdout);
      };
    LACUNA_TRY(const auto report, api::generate(job, tool.stoppable_progress()));
    const auto& generation = report.generation;
    auto json = report::to_json(generation);
    json["model"] = job.model.string();
    json["prompt_ids"] = report.prompt_ids;
    json["dtype"] = report.dtype;
    json["device"] = report.device;
    tool.print(json, "\n");
    if (!tool.json() && !tool.quiet())
      std::fprintf(
          stderr,
          "[%zu tokens, %s; first after %.0f ms, then %.2f ms each = %.1f tokens/s; %s on %s]\n",
          generation.token_ids.size(), generation.finish_reason.c_str(), generation.ttft_ms,
          generation.tpot_ms, generation.tokens_per_second, report.dtype.c_str(),
          report.device.c_str());
    if (generation.finish_reason == "interrupted") return Error{Code::kInterrupted, "interrupted"};
    return {};
  });
}

}  // namespace lacuna::cli
