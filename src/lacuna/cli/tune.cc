#include "lacuna/api/measure.h"
#include "lacuna/cli/tool.h"
#include "lacuna/report/table.h"

namespace lacuna::cli {

void add_tune(Tool& tool) {
  auto* verb = tool.verb(
      "tune", "Measure which kernels are fastest here and have every later run use them.",
      {"lacuna tune models/llama-50",
       "lacuna tune linear_stream:bf16:4096x4096x1:0.5 linear_stream:bf16:4096x4096x8:0.5"});
  tool.chooses_types(verb);
  tool.threaded(verb);
  tool.seeded(verb);
  static api::TuneJob job;
  static bool quick = false;
  verb->add_option("MODEL | PROBLEM", job.what, "a model folder (its layers), or problem strings")
      ->required();
  verb->add_option("--tokens", job.tokens, "numbers of tokens to measure a model's layers for")
      ->delimiter(',')
      ->check(between(1, static_cast<double>(format::kMaxTokens)))
      ->capture_default_str();
  verb->add_option("--seconds", job.options.seconds, "of timed products, each problem")
      ->check(above(0))
      ->capture_default_str();
  verb->add_flag("--quick", quick,
                 "one copy of each weight and a few products: a trial, nothing is kept");
  tool.action(verb, [&tool]() -> Status {
    if (quick) job.options = bench::CompareOptions::quick(), job.keep = false;
    job.options.seed = tool.seed();
    job.choice = tool.compute();
    job.choice.device = "cpu";  // the table is one of CPUs
    LACUNA_TRY(const auto report, api::tune(job, tool.stoppable_progress()));
    report::Table table({"problem", "fastest", "us", "the list's own choice", "gain"});
    for (const auto& tuned : report.tuned)
      table.add({tuned.problem.text(), tuned.candidate, fmt::format("{:.1f}", tuned.us),
                 tuned.order, fmt::format("{:.2f}", tuned.gain)});
    tool.print(to_json(report), table.text() + (job.keep ? fmt::format("kept in {}\n", report.file)
                                                         : "a trial: nothing was kept\n"));
    return {};
  });
}

}  // namespace lacuna::cli
