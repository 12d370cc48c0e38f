// bench, tune and doctor --op from outside.
#include <fmt/format.h>

#include <fstream>
#include <map>
#include <sstream>

#include "cli/run_tool.h"
#include "lacuna/bench/tune.h"
#include "lacuna/kernels/linear_nm/linear_nm.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::Gt;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::MatchesRegex;
using ::testing::Not;
using ::testing::Pair;
using ::testing::StartsWith;
using ::testing::UnorderedElementsAre;

std::vector<json> lines_of(const Output& run) {
  std::vector<json> lines;
  std::istringstream text(run.out);
  for (std::string line; std::getline(text, line);) lines.push_back(json::parse(line));
  return lines;
}

std::string text_of(const fs::path& file) { return io::read_text(file).value(); }

TEST(Bench, AProblemIsAnObjectAndSeveralAreResults) {
  const std::string bitmap = "linear_bitmap:f32:64x96x2:0.5", nm = "linear_nm:f32:64x96x2:2:4";
  const json one = done("bench op " + bitmap + " --quick --threads 1 --json").report();
  EXPECT_EQ(one["problem"], bitmap);
  EXPECT_EQ(one["threads"], 1);
  EXPECT_THAT(one["failed"], IsEmpty());
  ASSERT_FALSE(one["candidates"].empty());
  for (const json& candidate : one["candidates"])
    for (const char* key : {"name", "median_us", "p10_us", "p90_us", "gbps", "share_of_limit",
                            "speedup", "max_error", "weight_bytes"})
      EXPECT_TRUE(candidate.contains(key) && !candidate[key].is_null()) << key;
  for (const char* key : {"name", "median_us", "gbps"}) EXPECT_TRUE(one["dense"].contains(key));
  EXPECT_EQ(one["dense"]["speedup"], 1.0);
  EXPECT_FALSE(one["other_dense"].empty());
  for (const json& other : one["other_dense"])
    EXPECT_GE(other["median_us"], one["dense"]["median_us"]);
  const json& first = one["candidates"][0];
  EXPECT_GT(first["max_error"], 0.0) << "float32 sums of 96 products are rounded";
  EXPECT_LT(first["max_error"], 1e-5);

  for (const char* together : {"", " --compare"}) {
    const json both =
        done("bench " + bitmap + " " + nm + " --quick --threads 1 --json" + together).report();
    ASSERT_EQ(both["results"].size(), 2u);
    EXPECT_EQ(both["results"][0]["problem"], bitmap);
    EXPECT_EQ(both["results"][1]["problem"], nm);
    const bool same = both["results"][0]["dense"] == both["results"][1]["dense"];
    EXPECT_EQ(same, *together != '\0') << "each alone has its own round robin";
  }
}

TEST(Bench, WritesTablesAndAChart) {
  const fs::path folder = scratch_folder("bench_tables");
  const auto file = [&](const char* name) { return (folder / name).string(); };
  const std::string line =
      "bench linear_bitmap:f32:64x96x2:0.5 linear_bitmap:f32:64x96x2:0.9 "
      "linear_bitmap:bf16:64x96x2:0.5 --quick -q --threads 1 --table ";
  done(line + file("t.md") + " --chart " + file("c.svg"));
  EXPECT_THAT(text_of(file("t.md")),
              AllOf(HasSubstr("| problem | candidate | us |"), HasSubstr("f32:64x96x2:0.9")));
  // A curve of two points, one of one, and dense.
  const std::string chart = text_of(file("c.svg"));
  EXPECT_THAT(chart, AllOf(HasSubstr(">f32<"), HasSubstr(">bf16<"), HasSubstr(">dense<"),
                           HasSubstr("linear_bitmap:f32:64x96x2:0.9: (0.9, ")));
  EXPECT_THAT(chart, StartsWith("<svg xmlns="));
  done(line + file("t.csv"));
  EXPECT_THAT(text_of(file("t.csv")), HasSubstr("problem,candidate,us,p10,p90,GB/s"));
  done(line + file("t.jsonl"));
  std::istringstream lines(text_of(file("t.jsonl")));
  std::map<std::string, int> timed;
  for (std::string each; std::getline(lines, each);) {
    const json record = json::parse(each);
    if (record.contains("gbps")) ++timed[record["problem"]];
  }
  EXPECT_THAT(timed, UnorderedElementsAre(Pair("linear_bitmap:f32:64x96x2:0.5", Gt(0)),
                                          Pair("linear_bitmap:f32:64x96x2:0.9", Gt(0)),
                                          Pair("linear_bitmap:bf16:64x96x2:0.5", Gt(0)),
                                          Pair("linear_dense:f32:64x96x2", Gt(1)),
                                          Pair("linear_dense:bf16:64x96x2", Gt(0))));
}

TEST(Bench, TableSaysWhatEachNumberIsAndWhoDidNotRun) {
  const fs::path cases = scratch_folder("bench") / "cases.txt";
  std::ofstream(cases) << "# few\nlinear_nm:bf16:64x96x20:2:4\n";
  const Output run = done("bench --cases " + cases.string() + " --quick -q");
  EXPECT_EQ(run.err, "");
  for (const char* word : {"us", "p10", "p90", "GB/s", "share", "weight", "GFLOP/s", "ratio",
                           "cpu_expand_torch_linear", "streaming read", "not run"})
    EXPECT_THAT(run.out, HasSubstr(word));
}

TEST(Bench, AWrongKernelEndsInExitCodeOne) {
  // The tool runs in a child of this process and so knows this candidate.
  kernels::linear_nm::candidates().add_first(
      {{"cpu_wrong",
        [](const kernels::Problem& problem, const kernels::Device&) {
          return kernels::needs(problem.outputs == 78, "78 outputs");
        }},
       [](const kernels::Problem&) -> size_t { return 0; },
       [](const format::RowsView& rows, const format::RowProduct& product, void*, const Executor&) {
         format::run_reference_row_product(rows, product);
         static_cast<float*>(product.y)[5] *= 1.001f;
       }});
  const Output run = lacuna_tool("bench linear_nm:f32:78x64x1:2:4 --quick");
  EXPECT_EQ(run.code, 1);
  EXPECT_THAT(run.out, AllOf(HasSubstr("FAILED   linear_nm:f32:78x64x1:2:4 cpu_wrong"),
                             HasSubstr("cpu_portable")));
  EXPECT_THAT(run.err, AllOf(HasSubstr("cpu_wrong"), HasSubstr("y[0, 5]")));
  const Output tuned = lacuna_tool("tune linear_nm:f32:78x64x1:2:4 --quick");
  EXPECT_EQ(tuned.code, 1) << "a list with a wrong kernel is not tuned";
  EXPECT_THAT(tuned.err, HasSubstr("cpu_wrong"));
}

TEST(Bench, WhatNobodyCanComputeEndsInExitCodeFour) {
  const Output run = lacuna_tool("bench linear_bsr:fp8:64x64x1:block8x8@0.5 --quick");
  EXPECT_EQ(run.code, 4);
  EXPECT_THAT(run.out, HasSubstr("not run"));
  const Output file = lacuna_tool("bench --cases /nowhere/cases.txt");
  EXPECT_EQ(file.code, 3);
}

TEST(BenchModel, TimesTwoModelsInTurns) {
  const json report =
      done(fmt::format("bench model {} --compare {} --tokens 3 --prompt 8 --repetitions 2 "
                       "--profile --threads 1 --json -q",
                       pruned("2:4").folder.string(), demo_model()))
          .report();
  ASSERT_EQ(report["models"].size(), 2u);
  const json &sparse = report["models"][0], &dense = report["models"][1];
  for (const json& model : report["models"]) {
    EXPECT_GT(model["prompt_tokens_per_second"], 0.0);
    EXPECT_DOUBLE_EQ(model["tokens_per_second"], 1000 / model["tpot_ms"].get<double>());
    EXPECT_LE(model["ttft_ms_p10"], model["ttft_ms_p90"]);
    EXPECT_GT(model["load"]["file_bytes"], 1e6);
    EXPECT_GT(model["load"]["gb_per_second"], 0.0);
    EXPECT_GE(model["load"]["peak_memory_bytes"], model["load"]["memory_before_bytes"]);
    EXPECT_GT(model["decode_linear_share"], 0.0);
    EXPECT_LT(model["decode_linear_share"], 1.0);
  }
  EXPECT_EQ(report["baseline"], dense["name"]);
  EXPECT_GT(sparse["speedup_decode"], 0.0);
  EXPECT_GT(sparse["speedup_prefill"], 0.0);
  EXPECT_FALSE(dense.contains("speedup_decode")) << "nobody is compared with itself";
  EXPECT_EQ(report["tpot_ms"], sparse["tpot_ms"]) << "the first stands at the top too";
  EXPECT_DOUBLE_EQ(sparse["memory_saving"],
                   1 - sparse["weight_bytes"].get<double>() / dense["weight_bytes"].get<double>());
  EXPECT_GT(sparse["memory_saving"], 0.2);
  EXPECT_GT(report["peak_bytes"], 1e6);
  EXPECT_THAT(report["commit"].get<std::string>(), MatchesRegex("unknown|[0-9a-f]{12}(-dirty)?"));
  EXPECT_EQ(report["threads"], 1);
  const Output text =
      done("bench model " + demo_model() + " --tokens 2 --prompt 4 --repetitions 1");
  EXPECT_THAT(text.out, AllOf(HasSubstr("prefill"), HasSubstr("decode"), HasSubstr("of memory"),
                              Not(HasSubstr("linear layers"))));
  EXPECT_THAT(lacuna_tool("bench model --help").out, HasSubstr("Examples:"));
}

TEST(BenchModel, MeasuresPerplexitiesOnAText) {
  const fs::path text = scratch_folder("bench_text") / "text.txt";
  std::ofstream(text) << text_of(source_folder() / "README.md");
  const std::string sparse = pruned("2:4").folder.string(),
                    protocol = " --text " + text.string() + " --length 128 --windows 4 --json -q";
  const json report = done("bench model " + sparse + " --compare " + demo_model() +
                           " --new-tokens 1 --prompt-tokens 2 --repetitions 1" + protocol)
                          .report();
  EXPECT_EQ(report["models"][0]["perplexity"],
            done("eval " + sparse + protocol).report()["perplexity"]);
  EXPECT_DOUBLE_EQ(report["ppl_delta"], report["perplexity"].get<double>() -
                                            report["models"][1]["perplexity"].get<double>());
  EXPECT_FALSE(report["models"][1].contains("ppl_delta"));
}

TEST(BenchModel, MakesVariantsOfAShapeInMemory) {
  const std::string line =
      "bench model --like opt-125m --tokens 1 --prompt 2 --repetitions 1 --json -q ";
  const json report =
      done(line + "--pattern 2:4 --quantize int8 --compare dense block:32x32@0.75").report();
  ASSERT_EQ(report["models"].size(), 3u);
  EXPECT_EQ(report["like"], "opt-125m");
  EXPECT_EQ(report["models"][0]["name"], "2:4/int8");
  EXPECT_EQ(report["models"][1]["name"], "dense");
  EXPECT_EQ(report["models"][2]["name"], "block:32x32@0.75");
  EXPECT_EQ(report["baseline"], "dense");
  EXPECT_GT(report["models"][0]["memory_saving"], report["models"][2]["memory_saving"])
      << "the embedding became int8 too";
  EXPECT_FALSE(report["models"][1].contains("speedup_decode"));
  const json alone = done(line).report();
  EXPECT_EQ(alone["models"][0]["name"], "dense");
  EXPECT_EQ(alone["models"][0]["weight_bytes"], report["models"][1]["weight_bytes"]);
  EXPECT_FALSE(alone.contains("baseline"));
}

TEST(BenchModel, TakesTurnsFromStandardInput) {
  const Output run = lacuna_tool(
      "bench model " + demo_model() + " --tokens 1 --prompt 2 --threads 1 --turns --json -q",
      "0 0\n");
  EXPECT_EQ(run.code, 0) << run.err;
  const auto lines = lines_of(run);
  ASSERT_EQ(lines.size(), 4u);
  EXPECT_EQ(lines[0]["ready"], json::array({demo_model()}));
  for (int turn : {1, 2}) {
    EXPECT_EQ(lines[turn]["model"], 0);
    EXPECT_GT(lines[turn]["tpot_ms"], 0.0);
  }
  EXPECT_GT(lines[3]["models"][0]["tokens_per_second"], 0.0);
  const Output wrong = lacuna_tool("bench model " + demo_model() + " --tokens 1 --turns -q", "1");
  EXPECT_EQ(wrong.code, 2);
  EXPECT_THAT(wrong.err, HasSubstr("no such model"));
}

/// A cache folder with a measured table in it, and LACUNA_TUNE on, for one test.
class Table {
 public:
  Table() {
    folder_ = scratch_folder("table");
    setenv("XDG_CACHE_HOME", folder_.c_str(), 1);
    setenv("LACUNA_TUNE", "on", 1);
    file = *bench::tune_file();
  }
  ~Table() {
    unsetenv("XDG_CACHE_HOME");
    unsetenv("LACUNA_TUNE");
  }
  fs::path file;

 private:
  fs::path folder_;
};

TEST(Doctor, OpSaysWhatChoseTheKernel) {
  const Table table;
  const std::string line = "doctor --op linear_dense:f32:48x64x3";
  EXPECT_THAT(done(line).out,
              AllOf(HasSubstr("chosen by: order of the list"), HasSubstr("measured table: none")));
  const auto problem = *kernels::Problem::parse("linear_dense:f32:48x64x4");  // 3 is read as 4
  ASSERT_TRUE(
      bench::add_tuned(
          table.file,
          {{.problem = problem, .candidate = "cpu_portable", .order = "cpu_avx2_fma", .us = 1}})
          .ok());
  EXPECT_THAT(done(line).out, HasSubstr("* cpu_portable"));
  const json report = done(line + " --json").report();
  for (const json& candidate : report["candidates"]) {
    if (candidate["candidate"] == "cuda_cublas") continue;  // a machine may have a GPU besides
    EXPECT_EQ(candidate["chosen"], candidate["candidate"] == "cpu_portable");
    if (candidate["chosen"]) {
      EXPECT_EQ(candidate["note"], "chosen by: measured table");
    }
  }
  EXPECT_THAT(done("doctor").out, HasSubstr("1 problems in " + table.file.string()));
  setenv("LACUNA_FORCE", "linear_dense:reference", 1);
  EXPECT_THAT(done(line).out, HasSubstr("chosen by: LACUNA_FORCE"));
  unsetenv("LACUNA_FORCE");
  setenv("LACUNA_TUNE", "off", 1);
  EXPECT_THAT(done(line).out,
              AllOf(HasSubstr("order of the list"), HasSubstr("off (LACUNA_TUNE)")));
}

TEST(Doctor, OpThatNobodyComputesIsNotPossible) {
  if (!gpus().empty()) GTEST_SKIP() << "this machine has a GPU, which takes any number of tokens";
  const Output run = lacuna_tool("doctor --op linear_dense:f32:48x64x300");
  EXPECT_EQ(run.code, 4);
  EXPECT_THAT(run.out, HasSubstr("at most 16 tokens"));
}

TEST(Tune, ACorruptTableIsIgnoredWithAMessage) {
  const Table table;
  fs::create_directories(table.file.parent_path());
  std::ofstream(table.file) << "{\"lacuna_tune\": 1, \"cpu\"";
  const std::string generate =
      "generate " + demo_model() + " --prompt 'The city' --max-new-tokens 2 --threads 1 ";
  const Output loud = done(generate), quiet = done(generate + "-q");
  EXPECT_THAT(loud.err, AllOf(HasSubstr("ignored"), HasSubstr(table.file.string())));
  EXPECT_EQ(quiet.err, "");
  EXPECT_EQ(loud.out, quiet.out);
}

TEST(Tune, ATrialKeepsNothing) {
  const Table table;
  const Output run = done("tune linear_dense:f32:48x64x1 --quick --threads 1");
  EXPECT_THAT(run.out, AllOf(HasSubstr("fastest"), HasSubstr("nothing was kept")));
  EXPECT_FALSE(fs::exists(table.file));
}

}  // namespace
}  // namespace lacuna::testing
