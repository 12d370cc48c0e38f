#include "lacuna/report/html.h"

#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "lacuna/io/file.h"
#include "lacuna/report/svg.h"
#include "support/data.h"

namespace lacuna::report {
namespace {
using nlohmann::json;

std::filesystem::path save(const std::filesystem::path& folder, const char* name, const json& run) {
  const auto path = folder / name;
  EXPECT_TRUE(io::write_text(path, run.dump()).ok());
  return path;
}

TEST(Html, ShowsWhatTheRunsMeasuredAndNothingElse) {
  const auto folder = testing::scratch_folder("html");
  const std::vector<std::filesystem::path> runs = {
      save(
          folder, "a.json",
          {{"verb", "inspect"}, {"model", "m/dense"}, {"bytes", 269e6}, {"parameters", 134515008}}),
      save(folder, "b.json",
           {{"verb", "eval"},
            {"model", "m/dense"},
            {"perplexity", 21.764},
            {"windows", 24},
            {"length", 1024},
            {"protocol", "raw-file"}}),
      save(folder, "c.json",
           {{"verb", "prune"},
            {"out", "m/sparse"},
            {"seconds", 10.5},
            {"sparsity", 0.5},
            {"layers",
             {{{"name", "model.layers.3.mlp.up_proj.weight"},
               {"sparsity", 0.5},
               {"error", 0.125}}}}}),
      save(folder, "d.json",
           {{"verb", "generate"},
            {"model", "m/sparse"},
            {"text", "a < b & c"},
            {"tokens_per_second", 33.3}})};
  ASSERT_TRUE(write_html(runs, folder / "out.html").ok());
  const std::string page = io::read_text(folder / "out.html").value();
  EXPECT_NE(page.find("21.764"), std::string::npos);
  EXPECT_NE(page.find("269 MB"), std::string::npos);
  EXPECT_NE(page.find("a &lt; b &amp; c"), std::string::npos);
  EXPECT_NE(page.find("(3, 0.125)"), std::string::npos) << "the error of block 3";
  EXPECT_EQ(page.find("<h2>Proof</h2>"), std::string::npos) << "no verify run was given";
  EXPECT_EQ(page.find("http"), std::string::npos) << "the page needs no network";
}

TEST(Html, TellsModelsOfOneNameApart) {
  const auto folder = testing::scratch_folder("html");
  const auto eval = [](const char* model) {
    return json{{"verb", "eval"}, {"model", model}, {"perplexity", 21.5}};
  };
  const auto inspect = [](const char* model, double bytes) {
    return json{{"verb", "inspect"}, {"model", model}, {"bytes", bytes}};
  };
  const std::vector<std::filesystem::path> runs = {
      save(folder, "a.json", inspect("a/model", 100e6)),
      save(folder, "b.json", inspect("b/model/", 300e6)), save(folder, "c.json", eval("a/model/")),
      save(folder, "d.json", eval("b/model"))};
  ASSERT_TRUE(write_html(runs, folder / "out.html").ok());
  const std::string page = io::read_text(folder / "out.html").value();
  EXPECT_NE(page.find("a/model: (100, 21.5)"), std::string::npos) << page;
  EXPECT_NE(page.find("b/model: (300, 21.5)"), std::string::npos);
}

TEST(Html, RefusesWhatNoVerbPrinted) {
  const auto folder = testing::scratch_folder("html");
  ASSERT_TRUE(io::write_text(folder / "x.json", "{\"a\": 1}").ok());
  const Status status = write_html({folder / "x.json"}, folder / "out.html");
  ASSERT_FALSE(status.ok());
  EXPECT_EQ(status.error().code, Code::kBadInput);
  EXPECT_NE(status.error().message.find("x.json"), std::string::npos);
  EXPECT_FALSE(std::filesystem::exists(folder / "out.html"));
}

TEST(Chart, IsEmptyWithoutPointsAndHoldsEveryPoint) {
  EXPECT_EQ(xy_chart({"t", "x", "y"}, {{"s", {}}}), "");
  const std::string svg = xy_chart({"t", "x", "y"}, {{"s", {{1, 2, "p"}, {3, 4, "q"}}}});
  EXPECT_NE(svg.find("p: (1, 2)"), std::string::npos);
  EXPECT_NE(svg.find("q: (3, 4)"), std::string::npos);
}

TEST(Chart, SurvivesASinglePointAndEqualValues) {
  const std::string svg = xy_chart({"t", "x", "y", true}, {{"s", {{5, 0, ""}, {5, 0, ""}}}});
  EXPECT_EQ(svg.find("nan"), std::string::npos);
  EXPECT_EQ(svg.find("inf"), std::string::npos);
}

}  // namespace
}  // namespace lacuna::report
