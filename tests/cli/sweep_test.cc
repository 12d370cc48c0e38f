// `sweep`, and `prune --allocate` and `--budget`, on the model that comes with the repository.
#include <fmt/format.h>

#include <fstream>
#include <map>

#include "cli/run_tool.h"

namespace lacuna::testing {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

const fs::path& text_file() {
  static const fs::path file = [] {
    fs::path path = scratch_folder("text") / "text.txt";
    std::ofstream(path) << some_text(600);
    return path;
  }();
  return file;
}

/// Statistics of the demo model on a text, collected once.
const std::string& statistics() {
  static const std::string folder = [] {
    const fs::path where = scratch_folder("statistics");
    done(
        fmt::format("prune {} -o {} --method wanda --calibration {} --samples 4 --length 64 "
                    "--save-statistics {} -q",
                    demo_model(), (where / "out").string(), text_file().string(),
                    (where / "statistics").string()));
    return (where / "statistics").string();
  }();
  return folder;
}

std::string sweep(const std::string& rest) {
  return fmt::format("sweep {} --statistics {} -q {}", demo_model(), statistics(), rest);
}

TEST(Sweep, MeasuresEveryCombinationAndMarksTheBestOfEachPattern) {
  const fs::path folder = scratch_folder("sweep");
  const fs::path csv = folder / "table.csv", chart = folder / "chart.svg";
  const std::string rest = fmt::format(
      "--methods magnitude,wanda,dsnot --patterns 0.5,2:4,block:8x8@0.5 --text {} --length 64 "
      "--windows 4 --table {} --chart {} --json",
      text_file().string(), csv.string(), chart.string());
  // DSnoT can't do blocks, which is said by name.
  EXPECT_EQ(lacuna_tool(sweep(rest)).code, 2);
  const std::string fine = std::string(rest)
                               .replace(rest.find(",block:8x8@0.5"), 14, ",block:8x8@0.4")
                               .replace(rest.find(",dsnot"), 6, "");
  const json report = done(sweep(fine)).report();
  ASSERT_EQ(report.at("rows").size(), 6u);
  EXPECT_GT(report.at("dense").at("perplexity").get<double>(), 1);
  std::map<std::string, std::pair<double, double>> best;  // pattern -> marked, least
  for (const json& row : report.at("rows")) {
    const double perplexity = row.at("perplexity");
    EXPECT_GT(row.at("kl_mean").get<double>(), 0);
    EXPECT_GT(row.at("layer_error").get<double>(), 0);
    EXPECT_LT(row.at("bytes").get<int64_t>(), report.at("dense").at("bytes").get<int64_t>());
    EXPECT_TRUE(row.at("predicted_ms").is_null());  // the tests have no measured table
    EXPECT_THAT(row.at("no_prediction").get<std::string>(), HasSubstr("LACUNA_TUNE"));
    EXPECT_FALSE(row.contains("folder"));
    auto& [marked, least] = best.try_emplace(row.at("pattern"), 0.0, 1e30).first->second;
    least = std::min(least, perplexity);
    if (row.at("best").get<bool>()) marked = perplexity;
  }
  for (const auto& [pattern, pair] : best) EXPECT_EQ(pair.first, pair.second) << pattern;
  const std::string table = bytes_of(csv);
  EXPECT_EQ(std::count(table.begin(), table.end(), '\n'), 8);  // header, dense, six rows
  EXPECT_THAT(bytes_of(chart), AllOf(HasSubstr("<svg xmlns="), HasSubstr("block:8x8@0.4")));
}

TEST(Sweep, WritesWhatPruneWrites) {
  const fs::path folder = scratch_folder("sweep_models");
  const std::string line =
      sweep(fmt::format("--methods wanda,alps+swaps --patterns 0.6 --write {}", folder.string()));
  const Output run = done(line);
  EXPECT_THAT(run.out, AllOf(HasSubstr("alps+swaps"), HasSubstr("no predicted time")));
  const fs::path alone = folder / "alone";
  done(fmt::format("prune {} -o {} --method alps --refine swaps --sparsity 0.6 --statistics {} -q",
                   demo_model(), alone.string(), statistics()));
  for (const char* file : {"model.safetensors", "config.json", "checksums.json"})
    EXPECT_EQ(bytes_of(folder / "alps-swaps-0.6" / file), bytes_of(alone / file)) << file;
  EXPECT_EQ(lacuna_tool(line).code, 3);  // they lie there now
  EXPECT_EQ(lacuna_tool(line + " --overwrite").code, 0);
}

TEST(Sweep, ResumeLeavesFinishedModelsAlone) {
  const fs::path folder = scratch_folder("sweep_resume");
  const std::string line =
      sweep(fmt::format("--methods magnitude,wanda --patterns 0.6 --write {}", folder.string()));
  const json whole = done(line + " --json").report();
  const fs::path kept = folder / "wanda-0.6", lost = folder / "magnitude-0.6";
  const std::string bytes = bytes_of(lost / "model.safetensors");
  const auto written = fs::last_write_time(kept / "config.json");
  fs::remove_all(lost);
  const json again = done(line + " --resume --json").report();
  EXPECT_EQ(fs::last_write_time(kept / "config.json"), written);
  EXPECT_EQ(bytes_of(lost / "model.safetensors"), bytes);
  for (const auto& entry : fs::directory_iterator(folder))
    EXPECT_THAT(entry.path().string(), Not(HasSubstr(".journal")));
  for (size_t i = 0; i < 2; ++i)
    for (const char* key : {"method", "pattern", "sparsity", "layer_error", "bytes"})
      EXPECT_EQ(again.at("rows")[i].at(key), whole.at("rows")[i].at(key)) << key;
  // A model of other options is neither taken for this one nor replaced unasked.
  fs::remove_all(lost);
  fs::rename(kept, lost);
  const Output refused = lacuna_tool(line + " --resume");
  EXPECT_EQ(refused.code, 3) << refused.err;
  EXPECT_THAT(refused.err, HasSubstr("another finished model"));
  done(line + " --resume --overwrite");
  EXPECT_EQ(bytes_of(lost / "model.safetensors"), bytes);
}

TEST(Sweep, FindsTheFrontierWithAndWithoutCodes) {
  const json report =
      done(sweep(fmt::format("--methods wanda --patterns 0.5 --text {} --length 64 --windows 2 "
                             "--frontier 0.5 --json",
                             text_file().string())))
          .report();
  ASSERT_EQ(report.at("frontier").size(), 3u);
  const double most = 1.5 * report.at("dense").at("perplexity").get<double>();
  const std::vector<std::string> codes = {"none", "int8", "int4g64"};
  for (size_t i = 0; i < 3; ++i) {
    const json& row = report.at("frontier")[i];
    EXPECT_EQ(row.at("code"), codes[i]);
    ASSERT_TRUE(row.at("sparsity").is_number());
    EXPECT_LE(row.at("perplexity").get<double>(), most);
    EXPECT_GE(row.at("probes").get<int>(), 6);
  }
  EXPECT_LT(report.at("frontier")[2].at("bytes").get<int64_t>(),
            report.at("dense").at("bytes").get<int64_t>() / 2);
}

TEST(Sweep, WrongWordsAreUsageErrors) {
  for (const char* rest :
       {"--methods magic --patterns 0.5", "--methods wanda --patterns 1.5",
        "--methods wanda --patterns 2:4@0.5", "--methods wanda --patterns 0.5,0.5",
        "--methods wanda+magic --patterns 0.5", "--methods wanda",
        "--methods wanda --patterns 0.5 --frontier", "--methods wanda --patterns 0.5 --table t.txt",
        "--methods wanda --patterns 0.5 --resume"}) {
    const Output run = lacuna_tool(sweep(rest));
    EXPECT_EQ(run.code, 2) << rest << run.err;
    EXPECT_NE(run.err, "") << rest;
  }
}

TEST(Allocate, ABudgetIsMetAndTold) {
  const fs::path out = scratch_folder("budget") / "out";
  const std::string line =
      fmt::format("prune {} -o {} --method wanda --statistics {} -q --overwrite ", demo_model(),
                  out.string(), statistics());
  const json bytes = done(line + "--budget bytes=6MB --json").report();
  EXPECT_EQ(bytes.at("allocation"), "curves");
  EXPECT_NEAR(bytes.at("budget_reached").get<double>(), 6e6, 6e3);
  EXPECT_NEAR(static_cast<double>(fs::file_size(out / "model.safetensors")), 6e6, 6e3);
  const Output owl = done(line + "--sparsity 0.6 --allocate owl");
  EXPECT_THAT(owl.out, HasSubstr("sparsity 0.6000"));
  EXPECT_THAT(done(line + "--budget sparsity=0.55 --allocate error").out,
              HasSubstr("budget sparsity=0.55: reached 0.5"));
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"--budget bytes=6XB", "not a budget"},
      {"--budget sparsity=0.6 --sparsity 0.5", "the budget settles it"},
      {"--budget sparsity=0.6 --pattern 2:4", "2:4 fixes"},
      {"--budget bytes=6MB --store dense", "compact store"}};
  for (const auto& [flags, message] : wrong) {
    const Output run = lacuna_tool(line + flags);
    EXPECT_EQ(run.code, 2) << flags;
    EXPECT_THAT(run.err, HasSubstr(message)) << flags;
  }
  const Output times = lacuna_tool(line + "--budget tpot=5ms");
  EXPECT_EQ(times.code, 4) << times.err;
  EXPECT_THAT(times.err, HasSubstr("--budget tpot"));
}

}  // namespace
}  // namespace lacuna::testing
