// Budgets and variants of whole models.
#include "lacuna/prune/budget.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <sstream>

#include "lacuna/core/random.h"
#include "lacuna/prune/pipeline.h"
#include "support/data.h"

namespace lacuna::prune {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

Calibration random_calibration() {
  Calibration calibration{"random", {}};
  for (uint64_t s = 0; s < 6; ++s) {
    calibration.ids.emplace_back();
    for (uint64_t i = 0; i < 48; ++i)
      calibration.ids.back().push_back(static_cast<int32_t>(random_bits(1, s, i) % 4096));
  }
  return calibration;
}

/// Names and contents of the weights' files and of config.json.
std::map<std::string, std::string> files_of(const fs::path& folder) {
  std::map<std::string, std::string> files;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors" || entry.path().filename() == "config.json") {
      std::stringstream text;
      text << std::ifstream(entry.path(), std::ios::binary).rdbuf();
      files[entry.path().filename().string()] = text.str();
    }
  EXPECT_GE(files.size(), 2u) << folder;
  return files;
}

double bytes_on_disk(const fs::path& folder) {
  double bytes = 0;
  for (const auto& entry : fs::directory_iterator(folder))
    if (entry.path().extension() == ".safetensors") bytes += static_cast<double>(entry.file_size());
  return bytes;
}

/// Statistics of the demo model, collected once.
class Budgeted : public ::testing::Test {
 protected:
  static void SetUpTestSuite() {
    statistics_ = lacuna::testing::scratch_folder("statistics") / "demo";
    const auto made = prune({.method = "magnitude", .save_statistics = statistics_},
                            lacuna::testing::scratch_folder("first") / "out");
    ASSERT_TRUE(made.ok()) << made.error().message;
  }

  static Result<PruneReport> prune(const PruneOptions& options, const fs::path& out,
                                   const PruneProgress& progress = {}) {
    LACUNA_TRY(const auto checkpoint, io::Checkpoint::open(lacuna::testing::demo_model_folder()));
    const bool calibrate = options.statistics.empty();
    return prune_model(checkpoint, calibrate ? random_calibration() : Calibration{}, out, options,
                       progress);
  }

  void SetUp() override { out_ = lacuna::testing::scratch_folder("budget") / "out"; }

  inline static fs::path statistics_;
  fs::path out_;
};

TEST_F(Budgeted, SparsityAndBytesAreMetWithinAThousandth) {
  for (const char* method : {"wanda", "sparsegpt", "ria"})  // within rows, stripes, the layer
    for (const Allocation by :
         {Allocation::kUniform, Allocation::kOwl, Allocation::kError, Allocation::kCurves})
      for (const char* text : {"sparsity=0.613", "bytes=6.1MB"}) {
        if (std::string(method) != "wanda" && by != Allocation::kCurves) continue;  // it takes long
        PruneOptions options{.method = method, .statistics = statistics_};
        options.allocation = {.by = by, .budget = *Budget::parse(text)};
        const auto report = prune(options, out_);
        ASSERT_TRUE(report.ok()) << report.error().message;
        const Budget& budget = *options.allocation.budget;
        const double came =
            budget.kind == Budget::Kind::kBytes ? bytes_on_disk(out_) : report->sparsity;
        EXPECT_NEAR(came / budget.amount, 1, 0.001)
            << method << " " << allocation_name(by) << " " << text;
        EXPECT_DOUBLE_EQ(report->budget_reached, came);
        EXPECT_TRUE(report->warnings.empty()) << report->warnings.front();
        double least = 1, most = 0;
        for (const LayerReport& layer : report->layers) {
          least = std::min(least, layer.sparsity);
          most = std::max(most, layer.sparsity);
        }
        // Rows of 128 columns give what they can.
        EXPECT_EQ(most - least > 0.02, by != Allocation::kUniform) << allocation_name(by);
        const auto about = io::Checkpoint::open(out_)->config().at("lacuna").at("allocation");
        EXPECT_EQ(about.at("by"), allocation_name(by));
        EXPECT_EQ(about.at("budget"), budget.text());
      }
}

TEST_F(Budgeted, BlocksComeWithinHalfABlockALayer) {
  PruneOptions options{.method = "wanda", .statistics = statistics_};
  options.request.pattern = format::Pattern::block(8, 8);
  options.allocation = {.by = Allocation::kCurves, .budget = *Budget::parse("sparsity=0.6")};
  const auto report = prune(options, out_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  EXPECT_NEAR(report->sparsity, 0.6, 0.001);
}

TEST_F(Budgeted, WhatCannotBeMetIsRefusedBeforeAnyWork) {
  PruneOptions options{.method = "wanda", .statistics = statistics_};
  const auto refusal = [&](const char* text) {
    options.allocation = {.by = Allocation::kCurves, .budget = *Budget::parse(text)};
    const auto report = prune(options, out_);
    EXPECT_FALSE(report.ok()) << text;
    EXPECT_FALSE(fs::exists(out_)) << text;
    EXPECT_FALSE(fs::exists(out_.string() + ".journal")) << text;
    return report.ok() ? std::string() : report.error().message;
  };
  EXPECT_THAT(refusal("bytes=1kB"), AllOf(HasSubstr("out of reach"), HasSubstr("takes 2.")));
  EXPECT_THAT(refusal("bytes=1GB"), AllOf(HasSubstr("out of reach"), HasSubstr(" MB to 1")));
  EXPECT_THAT(refusal("tpot=1ms"), HasSubstr("lacuna tune"));
  options.store = io::Store::kDense;
  EXPECT_THAT(refusal("bytes=6MB"), HasSubstr("compact store"));
  options.store = io::Store::kCompact;
  options.request.pattern = format::Pattern::keep_of(2, 4);
  EXPECT_THAT(refusal("sparsity=0.6"), HasSubstr("2:4 fixes"));
}

TEST_F(Budgeted, ATimeIsMetByWhatTheLayersAreSaidToTake) {
  PruneOptions options{.method = "wanda", .statistics = statistics_};
  options.allocation = {.by = Allocation::kCurves, .budget = *Budget::parse("tpot=10ms")};
  std::map<std::string, double> asked;
  options.allocation.milliseconds = [&](const std::string& weight,
                                        double sparsity) -> Result<double> {
    asked[weight] = sparsity;
    const double whole = weight.find("mlp") != std::string::npos ? 1.0 : 0.2;
    return whole * (1 - 0.8 * sparsity);
  };
  options.allocation.other_milliseconds = 2;
  const auto report = prune(options, out_);
  ASSERT_TRUE(report.ok()) << report.error().message;
  double time = options.allocation.other_milliseconds;
  for (const LayerReport& layer : report->layers)
    time += *options.allocation.milliseconds(layer.name, layer.sparsity);
  EXPECT_EQ(time, report->budget_reached);
  EXPECT_LE(time, 10.001);
  EXPECT_GE(time, 10 * 0.999);
  options.allocation.other_milliseconds = 11;
  EXPECT_THAT(prune(options, out_).error().message, HasSubstr("out of reach"));
}

TEST_F(Budgeted, InterruptedGoesOnToTheSameBytesAndOnlyWithTheSameAllocation) {
  for (const bool from_folder : {true, false}) {
    PruneOptions options{.method = "sparsegpt"};
    if (from_folder) options.statistics = statistics_;
    options.allocation = {.by = Allocation::kOwl, .budget = *Budget::parse("bytes=6MB")};
    ASSERT_TRUE(prune(options, out_).ok());
    const auto whole = files_of(out_);
    fs::remove_all(out_);
    std::atomic<bool> interrupted = false;
    const auto stop = [&](int64_t done, int64_t total, const std::string& what) {
      if (what.starts_with("block") && done > total / 2) interrupted = true;
    };
    const auto stopped = prune(options, out_, {.step = stop, .interrupted = &interrupted});
    ASSERT_FALSE(stopped.ok());
    EXPECT_EQ(stopped.error().code, Code::kInterrupted);
    options.resume = true;
    PruneOptions other = options;
    other.allocation.by = Allocation::kError;
    const auto refused = prune(other, out_);
    ASSERT_FALSE(refused.ok());
    EXPECT_THAT(refused.error().message, HasSubstr("different: allocation"));
    const auto report = prune(options, out_);
    ASSERT_TRUE(report.ok()) << report.error().message;
    EXPECT_EQ(files_of(out_), whole);
    fs::remove_all(out_);
  }
}

/// Six ways of pruning from the same statistics.
std::vector<Variant> some_variants(const fs::path& folder, const fs::path& statistics) {
  std::vector<Variant> variants;
  for (const char* method : {"magnitude", "wanda", "sparsegpt", "alps"}) {
    Variant variant{folder / method, {.method = method, .statistics = statistics}};
    variant.options.request.sparsity = 0.6;
    variants.push_back(variant);
  }
  Variant groups{folder / "groups", {.method = "sparsegpt", .statistics = statistics}};
  groups.options.request.pattern = format::Pattern::keep_of(2, 4);
  Variant shared{folder / "owl", {.method = "wanda", .statistics = statistics}};
  shared.options.allocation.by = Allocation::kOwl;
  variants.insert(variants.end(), {groups, shared});
  return variants;
}

TEST_F(Budgeted, VariantsAreWhatEachGivesAlone) {
  const auto checkpoint = io::Checkpoint::open(lacuna::testing::demo_model_folder());
  const auto variants = some_variants(out_, statistics_);
  const auto reports = prune_variants(*checkpoint, variants);
  ASSERT_TRUE(reports.ok()) << reports.error().message;
  ASSERT_EQ(reports->size(), variants.size());
  for (size_t i = 0; i < variants.size(); ++i) {
    const fs::path alone = out_ / "alone";
    const auto report = prune(variants[i].options, alone);
    ASSERT_TRUE(report.ok()) << report.error().message;
    EXPECT_EQ(files_of(variants[i].out), files_of(alone)) << variants[i].out;
    EXPECT_EQ((*reports)[i].layers.size(), report->layers.size());
    EXPECT_GT((*reports)[i].layers[0].error, 0);
    fs::remove_all(alone);
  }
}

TEST_F(Budgeted, VariantsGoOnWhereTheyWereStopped) {
  const auto checkpoint = io::Checkpoint::open(lacuna::testing::demo_model_folder());
  auto variants = some_variants(out_, statistics_);
  ASSERT_TRUE(prune_variants(*checkpoint, variants).ok());
  std::map<std::string, std::map<std::string, std::string>> whole;
  for (const Variant& variant : variants) whole[variant.out] = files_of(variant.out);
  fs::remove_all(out_);
  std::atomic<bool> interrupted = false;
  const auto stop = [&](int64_t done, int64_t total, const std::string&) {
    if (done > total / 2) interrupted = true;
  };
  const auto stopped =
      prune_variants(*checkpoint, variants, {.step = stop, .interrupted = &interrupted});
  ASSERT_FALSE(stopped.ok());
  EXPECT_EQ(stopped.error().code, Code::kInterrupted);
  for (Variant& variant : variants) variant.options.resume = true;
  const auto reports = prune_variants(*checkpoint, variants);
  ASSERT_TRUE(reports.ok()) << reports.error().message;
  for (const Variant& variant : variants) EXPECT_EQ(files_of(variant.out), whole[variant.out]);
}

/// The head is codes there, which stand for other weights than the model's.
TEST_F(Budgeted, FinishedVariantsWithCodesAreTakenAsTheyAre) {
  const auto checkpoint = io::Checkpoint::open(lacuna::testing::demo_model_folder());
  Variant variant{out_ / "wanda", {.method = "wanda", .statistics = statistics_, .resume = true}};
  variant.options.request.quantization = *format::Quantization::parse("int4");
  ASSERT_TRUE(prune_variants(*checkpoint, {variant}).ok());
  const auto whole = files_of(variant.out);
  const auto reports = prune_variants(*checkpoint, {variant});
  ASSERT_TRUE(reports.ok()) << reports.error().message;
  EXPECT_EQ(files_of(variant.out), whole);
  variant.options.keep_head = true;
  EXPECT_FALSE(prune_variants(*checkpoint, {variant}).ok()) << "another finished model";
}

TEST_F(Budgeted, VariantsNeedOneFolderOfStatisticsAndOneWayToCompute) {
  const auto checkpoint = io::Checkpoint::open(lacuna::testing::demo_model_folder());
  auto variants = some_variants(out_, statistics_);
  variants[1].options.statistics = "elsewhere";
  EXPECT_EQ(prune_variants(*checkpoint, variants).error().code, Code::kUsage);
  variants = some_variants(out_, statistics_);
  variants[1].options.compute.dtype = at::kBFloat16;
  EXPECT_EQ(prune_variants(*checkpoint, variants).error().code, Code::kUsage);
  EXPECT_TRUE(prune_variants(*checkpoint, {})->empty());
}

}  // namespace
}  // namespace lacuna::prune
