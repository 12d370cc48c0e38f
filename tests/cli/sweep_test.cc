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
  const fs::path table = scratch_folder("sweep_frontier") / "table.md";
  const json report =
      done(sweep(fmt::format("--methods wanda --patterns 0.5 --text {} --length 64 --windows 2 "
                             "--table {} --frontier 0.5 --json",
                             text_file().string(), table.string())))
          .report();
  EXPECT_THAT(bytes_of(table),
              HasSubstr("- no predicted time of dense, 0.5, frontier none, frontier int8, frontier "
                        "int4g64: the measured table is off (LACUNA_TUNE)"));
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

/// What lies in a folder, by name.
std::vector<std::string> names_in(const fs::path& folder) {
  std::vector<std::string> names;
  for (const auto& entry : fs::directory_iterator(folder))
    names.push_back(entry.path().filename().string());
  return names;
}

TEST(Sweep, TellsWhatStatisticsOfTheDenseModelLose) {
  const fs::path folder = scratch_folder("sweep_compared"), chart = folder / "chart.svg";
  const std::string line = sweep(fmt::format(
      "--methods magnitude,wanda,sparsegpt --patterns 0.5,2:4 --text {0} --length 64 --windows 2 "
      "--compare-propagated --calibration {0} --table {1} --chart {2} ",
      text_file().string(), (folder / "table.md").string(), chart.string()));
  const json report = done(line + "--json").report();
  EXPECT_GT(report.at("compare_seconds").get<double>(), 0);
  size_t compared = 0;
  for (const json& row : report.at("rows")) {
    EXPECT_EQ(row.contains("propagated"), row.at("best").get<bool>()) << row;
    if (!row.contains("propagated")) continue;
    ++compared;
    // The same as `prune` makes from the calibration itself.
    const fs::path out = folder / "alone";
    done(fmt::format(
        "prune {} -o {} --method {} {} --calibration {} --samples 4 --length 64 "
        "--overwrite -q",
        demo_model(), out.string(), row.at("method").get<std::string>(),
        row.at("pattern") == "2:4" ? "--pattern 2:4" : "--sparsity 0.5", text_file().string()));
    const json alone = done(fmt::format("eval {} --text {} --length 64 --windows 2 --json -q",
                                        out.string(), text_file().string()))
                           .report();
    const double perplexity = row.at("propagated").at("perplexity");
    EXPECT_NEAR(perplexity, alone.at("perplexity").get<double>(), 1e-6 * perplexity);
    EXPECT_NE(perplexity, row.at("perplexity").get<double>());
    EXPECT_NEAR(row.at("lost").get<double>(), row.at("perplexity").get<double>() / perplexity - 1,
                1e-12);
  }
  EXPECT_EQ(compared, 2u) << "the best of each pattern";
  EXPECT_THAT(bytes_of(folder / "table.md"), AllOf(HasSubstr("propagated"), HasSubstr("lost")));
  EXPECT_THAT(bytes_of(chart), HasSubstr("through the pruned blocks"));
}

TEST(Sweep, ComparesAllRowsAndWhatNeedsNoInputsWithItself) {
  const json report =
      done(sweep(fmt::format("--methods magnitude,wanda --patterns 0.5 --text {0} --length 64 "
                             "--windows 2 --calibration {0} --json --compare-propagated all",
                             text_file().string())))
          .report();
  const json &magnitude = report.at("rows")[0], &wanda = report.at("rows")[1];
  EXPECT_EQ(magnitude.at("lost"), 0.0);
  EXPECT_NE(wanda.at("lost"), 0.0);
}

TEST(Sweep, ComparesWithTheCalibrationOfTheStatisticsAlone) {
  const fs::path folder = scratch_folder("sweep_calibration"), other = folder / "other.txt";
  std::ofstream(other) << some_text(500);
  const std::string line =
      fmt::format("--methods wanda --patterns 0.5 --text {} --length 64 --windows 2 --write {} ",
                  text_file().string(), (folder / "models").string());
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {"--compare-propagated --calibration " + other.string(), "other tokens than those"},
      {"--compare-propagated --seed 7 --calibration " + text_file().string(),
       "other tokens than those"},
      {"--compare-propagated", "4 x 64 tokens of text.txt"},
      {"--compare-propagated most --calibration self", "need best or all"},
      {"--calibration " + text_file().string(), "--compare-propagated"}};
  for (const auto& [flags, message] : wrong) {
    const Output run = lacuna_tool(sweep(line + flags));
    EXPECT_EQ(run.code, 2) << flags << run.err;
    EXPECT_THAT(run.err, HasSubstr(message)) << flags;
  }
  EXPECT_FALSE(fs::exists(folder / "models")) << "all of it is known before anything is pruned";
}

TEST(Sweep, MakesCodesAndDenseColumnsInTheSamePass) {
  const fs::path folder = scratch_folder("sweep_codes");
  const json report =
      done(sweep(fmt::format("--methods sparsegpt --patterns 0.5,2:4+dense@0.4 --write {} --json",
                             folder.string())))
          .report();
  EXPECT_NEAR(report.at("rows")[1].at("sparsity").get<double>(), 0.4, 0.002);
  const json coded =
      done(sweep(fmt::format("--methods sparsegpt --patterns 0.5,2:4 --quantize none,int4 --write "
                             "{} --resume --json",
                             folder.string())))
          .report();
  ASSERT_EQ(coded.at("rows").size(), 4u);
  for (size_t i = 0; i < 4; ++i) {
    const json& row = coded.at("rows")[i];
    EXPECT_EQ(row.at("code"), i % 2 == 0 ? "none" : "int4g64");
    EXPECT_TRUE(row.at("best").get<bool>()) << "alone with its pattern and code";
  }
  EXPECT_LT(coded.at("rows")[1].at("bytes").get<int64_t>(),
            coded.at("rows")[0].at("bytes").get<int64_t>() / 2);
  const fs::path alone = folder / "alone";
  const std::string prune =
      fmt::format("prune {} -o {} --method sparsegpt --statistics {} -q --overwrite ", demo_model(),
                  alone.string(), statistics());
  for (const auto& [name, flags] : std::vector<std::pair<std::string, std::string>>{
           {"sparsegpt-2-4-dense-0.4", "--pattern 2:4+dense --sparsity 0.4"},
           {"sparsegpt-2-4-int4g64", "--pattern 2:4 --quantize int4"}}) {
    done(prune + flags);
    for (const char* file : {"model.safetensors", "config.json"})
      EXPECT_EQ(bytes_of(folder / name / file), bytes_of(alone / file)) << name << " " << file;
  }
}

TEST(Sweep, NamesAllThatCantBeDoneBeforeItPrunesAnything) {
  const fs::path folder = scratch_folder("sweep_impossible") / "models";
  const Output run = lacuna_tool(
      sweep(fmt::format("--methods magnitude,alps+swaps,dsnot,gradient --patterns "
                        "0.5,block:4x4@0.5,2:4+dense@0.4 --quantize none,int4 --write {}",
                        folder.string())));
  EXPECT_EQ(run.code, 2) << run.err;
  EXPECT_THAT(run.err,
              AllOf(HasSubstr("alps+swaps block:4x4@0.5: --refine swaps: can't do"),
                    HasSubstr("dsnot block:4x4@0.5 int4g64: --refine dsnot: can't do"),
                    HasSubstr("magnitude 2:4+dense@0.4 int4g64: --pattern 2:4+dense: neither"),
                    HasSubstr("gradient: its gradients need the calibration text"),
                    HasSubstr("`lacuna prune --method gradient --calibration FILE`"),
                    HasSubstr("leave gradient out"),
                    HasSubstr("sweep dsnot apart, without block:4x4@0.5, block:4x4@0.5 int4g64, "
                              "2:4+dense@0.4 int4g64")));
  EXPECT_THAT(run.err, Not(HasSubstr("--save-statistics")));
  EXPECT_FALSE(fs::exists(folder)) << "no model, no journal";
}

TEST(Sweep, WhatItCantWriteOrReadIsKnownBeforeItPrunes) {
  const fs::path folder = scratch_folder("sweep_early");
  const std::string line =
      fmt::format("--methods wanda --patterns 0.5 --write {} ", (folder / "models").string());
  std::ofstream(folder / "short.txt") << "few words";
  const std::vector<std::pair<std::string, std::string>> wrong = {
      {fmt::format("--table {}/none/table.md", folder.string()), "there is no folder"},
      {fmt::format("--chart {}/none/chart.svg", folder.string()), "there is no folder"},
      {fmt::format("--text {}/none.txt", folder.string()), "none.txt"},
      {fmt::format("--text {}/short.txt", folder.string()), "shorter than one window"}};
  for (const auto& [flags, message] : wrong) {
    const Output run = lacuna_tool(sweep(line + flags));
    EXPECT_EQ(run.code, 3) << flags << run.err;
    EXPECT_THAT(run.err, HasSubstr(message)) << flags;
  }
  EXPECT_THAT(names_in(folder), ::testing::ElementsAre("short.txt"));
}

TEST(Sweep, WrongWordsAreUsageErrors) {
  for (const char* rest :
       {"--methods magic --patterns 0.5", "--methods wanda --patterns 1.5",
        "--methods wanda --patterns 2:4@0.5", "--methods wanda --patterns 0.5,0.5",
        "--methods wanda+magic --patterns 0.5", "--methods wanda",
        "--methods wanda --patterns 0.5 --frontier", "--methods wanda --patterns 0.5 --table t.txt",
        "--methods wanda --patterns 0.5 --resume", "--methods wanda --patterns 0.5+dense@0.4",
        "--methods wanda --patterns 2:4+dense", "--methods wanda --patterns 2:4+dense@0.5",
        "--methods wanda --patterns block:4x4+dense@0.4", "--methods wanda --patterns unstructured",
        "--methods wanda --patterns 0.5 --quantize int3",
        "--methods wanda --patterns 0.5 --quantize int4,int4g64",
        "--methods wanda --patterns 0.5 --compare-propagated"}) {
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
