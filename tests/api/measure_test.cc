#include "lacuna/api/measure.h"

#include <gmock/gmock.h>

#include <cstdlib>
#include <map>
#include <set>

#include "lacuna/api/predict.h"
#include "lacuna/bench/speed_table.h"
#include "lacuna/kernels/measured.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::api {
namespace {
using ::testing::HasSubstr;
using testing::must;

TEST(TuneJob, measuresTheLayersOfAModelOnceEachAndUsesWhatItFound) {
  const auto folder = testing::scratch_folder("tune_job");
  setenv("XDG_CACHE_HOME", folder.c_str(), 1);
  TuneJob job{.what = {testing::demo_model_folder().string()},
              .tokens = {1, 3},
              .options = bench::CompareOptions::quick(),
              .choice = {.device = "cpu", .dtype = "float32", .threads = 1}};
  const auto report = must(tune(job));
  std::set<std::string> problems;
  for (const auto& tuned : report.tuned) {
    problems.insert(tuned.problem.text());
    EXPECT_EQ(tuned.problem.operation, "linear_dense");
    EXPECT_EQ(kernels::measured_winner(tuned.problem), tuned.candidate);
  }
  EXPECT_EQ(problems.size(), report.tuned.size()) << "each once";
  // q, k and v together 512x256, 256x256, gate and up 1280x256, 256x640 and the output matrix; 3
  // tokens are measured as 4.
  EXPECT_EQ(problems.size(), 5u * 2);
  EXPECT_TRUE(problems.contains("linear_dense:f32:1280x256x4"));
  EXPECT_EQ(must(bench::read_tuned(report.file)).size(), 10u);

  job.what = {"linear_dense:f32:32x32x5"};
  job.keep = false;
  const auto trial = must(tune(job));
  EXPECT_EQ(trial.file, "");
  EXPECT_EQ(must(bench::read_tuned(report.file)).size(), 10u);
  kernels::set_measured_winners({});
  unsetenv("XDG_CACHE_HOME");
}

TEST(TuneJob, MeasuresCodesAndTheirTimeIsPredicted) {
  const auto folder = testing::scratch_folder("tune_codes");
  setenv("XDG_CACHE_HOME", folder.c_str(), 1);
  for (const char* code : {"int8", "int4", "fp8"}) {
    const auto coded = folder / code;
    must(convert(testing::demo_model_folder(), coded,
                 {.quantization = must(format::Quantization::parse(code))}));
    TuneJob job{.what = {coded.string()},
                .tokens = {1},
                .options = bench::CompareOptions::quick(),
                .choice = {.device = "cpu", .dtype = "float32", .threads = 1}};
    const auto report = must(tune(job));
    const auto values = must(kernels::Problem::parse(fmt::format("linear_dense:{}:8x8x1", code)));
    bool found = false;
    for (const auto& tuned : report.tuned) {
      found = found || tuned.problem.values == values.values;
      EXPECT_EQ(kernels::measured_winner(tuned.problem), tuned.candidate);
    }
    EXPECT_TRUE(found) << code;
    const auto decoder = must(load_decoder(coded, job.choice));
    const auto table = bench::SpeedTable(must(bench::read_tuned(report.file)));
    EXPECT_GT(must(predicted_milliseconds(decoder, table)), 0) << code;
  }
  kernels::set_measured_winners({});
  unsetenv("XDG_CACHE_HOME");
}

TEST(ExplainOperation, saysWhatDecidedAndWhyNobodyCan) {
  const auto few = must(explain_operation("linear_dense:f32:32x32x5"));
  EXPECT_TRUE(few.status.ok());
  size_t chosen = 0;
  for (const auto& line : few.candidates) {
    if (line.candidate.starts_with("cuda_")) continue;  // a machine may have a GPU besides
    chosen += line.chosen;
    if (line.chosen) {
      EXPECT_EQ(line.note, "chosen by: order of the list");
    }
  }
  EXPECT_EQ(chosen, 1u);
  if (!gpus().empty()) GTEST_SKIP() << "this machine has a GPU, which takes any number of tokens";
  const auto many = must(explain_operation("linear_dense:f32:32x32x50"));
  ASSERT_FALSE(many.status.ok());
  EXPECT_EQ(many.status.error().code, Code::kNotPossible);
}

TEST(ExplainOperation, SaysWhyAGpuDoesNotRunIt) {
  EXPECT_FALSE(explain_operation("linear_magic:f32:1x1x1").ok());
  const auto report = must(explain_operation("linear_nm:bf16:4096x4096x8:2:4"));
  std::map<std::string, const kernels::Explanation*> lines;
  for (const auto& line : report.candidates) lines[line.candidate] = &line;
  ASSERT_TRUE(lines.contains("cuda_sm90_mma_sp") && lines.contains("cuda_expand_cublas"));
  EXPECT_EQ(report.candidates.back().candidate, "cuda_expand_cublas") << "the last of its list";
  if (!gpus().empty()) GTEST_SKIP() << "this machine has a GPU";
  for (const char* name : {"cuda_sm90_mma_sp", "cuda_expand_cublas"}) {
    EXPECT_FALSE(lines[name]->chosen);
    EXPECT_EQ(lines[name]->support.refusal(), "needs a GPU, but no NVIDIA GPU or driver answers");
  }
}

}  // namespace
}  // namespace lacuna::api
