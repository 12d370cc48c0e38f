#include <algorithm>
#include <cstdio>
#include <iostream>
#include <iterator>

#include "lacuna/cli/tool.h"
#include "lacuna/io/file.h"
#include "lacuna/io/lines.h"
#include "lacuna/report/json.h"

namespace lacuna::cli {
namespace {

/// Answers the lines of a file at once; a JSON object, or each text under its prompt.
Status generate_all(Tool& tool, api::GenerateJob& job, const std::filesystem::path& file) {
  LACUNA_TRY(const std::string text, io::read_text(file));
  LACUNA_CHECK(io::for_each_line(text, [&](size_t, std::string_view line) -> Status {
    if (!line.empty()) job.prompts.emplace_back(line);
    return {};
  }));
  if (job.prompts.empty())
    return bad_input("{}: holds no prompt (need one a line).", file.string());
  job.options.seed = tool.seed();
  job.choice = tool.compute();
  LACUNA_TRY(const auto report, api::generate(job, tool.stoppable_progress()));
  nlohmann::json json = {{"verb", "generate"},
                         {"model", job.model.string()},
                         {"dtype", report.dtype},
                         {"device", report.device},
                         {"generations", nlohmann::json::array()}};
  std::string all;
  for (size_t i = 0; i < report.generations.size(); ++i) {
    json["generations"].push_back(report::to_json(report.generations[i]));
    all += job.prompts[i] + report.generations[i].text + "\n";
  }
  tool.print(json, all);
  const model::Generation& first = report.generations.front();
  if (!tool.json() && !tool.quiet())
    std::fprintf(
        stderr,
        "[%zu answers; first tokens after %.0f ms, then %.2f ms for one of each; %s on %s]\n",
        report.generations.size(), first.ttft_ms, first.tpot_ms, report.dtype.c_str(),
        report.device.c_str());
  if (std::ranges::any_of(report.generations, [](const model::Generation& generation) {
        return generation.finish_reason == "interrupted";
      }))
    return Error{Code::kInterrupted, "interrupted"};
  return {};
}

}  // namespace

void add_generate(Tool& tool) {
  auto* verb =
      tool.verb("generate", "Continue a prompt, or answer it with --chat.",
                {"lacuna generate models/llama --prompt 'Once upon a time'",
                 "echo 'What is sparsity?' | lacuna generate models/smollm2 --prompt - --chat"});
  static api::GenerateJob job;
  auto& options = job.options;
  tool.runs_sparse(verb);
  tool.seeded(verb);
  tool.model(verb, job.model, "model folder");
  auto* prompt = verb->add_option("--prompt", job.prompt, "text to continue; - reads stdin");
  static std::filesystem::path prompts;
  verb->add_option("--prompts", prompts,
                   "instead: a file of up to 64 prompts, one a line, answered at once")
      ->excludes(prompt);
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
  tool.action(verb, [&tool, prompt]() -> Status {
    if (!prompts.empty()) return generate_all(tool, job, prompts);
    if (prompt->count() == 0) return usage_error("--prompt: need one, or --prompts FILE.");
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
