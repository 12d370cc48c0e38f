// Budgets of time, from a table that nobody has to measure.
#include "lacuna/api/predict.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <numeric>
#include <sstream>

#include "lacuna/bench/tune.h"
#include "support/data.h"

namespace lacuna::api {
namespace {

namespace fs = std::filesystem;
using ::testing::HasSubstr;

/// An environment variable for the length of a test.
class Variable {
 public:
  Variable(const char* name, const std::string& value) : name_(name) {
    if (const char* before = std::getenv(name)) before_ = before;
    setenv(name, value.c_str(), 1);
  }
  ~Variable() {
    if (before_)
      setenv(name_, before_->c_str(), 1);
    else
      unsetenv(name_);
  }
  Variable(const Variable&) = delete;
  Variable& operator=(const Variable&) = delete;

 private:
  const char* name_;
  std::optional<std::string> before_;
};

/// What the error's "lacuna tune ..." names.
std::vector<kernels::Problem> named_problems(const std::string& message) {
  const size_t begin = message.find("`lacuna tune ") + 13, end = message.find("` first");
  EXPECT_LT(begin, end) << message;
  std::stringstream words(message.substr(begin, end - begin));
  std::vector<kernels::Problem> problems;
  for (std::string word; words >> word;) problems.push_back(*kernels::Problem::parse(word));
  return problems;
}

/// As if every weight that is there took a nanosecond, and a zero a fifth of that.
std::vector<bench::TunedProblem> table_of(const std::vector<kernels::Problem>& problems) {
  std::vector<bench::TunedProblem> table;
  for (const kernels::Problem& problem : problems)
    table.push_back({.problem = problem,
                     .candidate = "cpu_portable_axpy",
                     .order = "cpu_portable_axpy",
                     .us = static_cast<double>(problem.outputs * problem.inputs) *
                           (1 - 0.8 * problem.sparsity) / 1000,
                     .threads = 1});
  return table;
}

struct Demo {
  fs::path folder = lacuna::testing::demo_model_folder();
  io::Checkpoint checkpoint = *io::Checkpoint::open(folder);
  io::DecoderSpec spec = *model::spec_of(checkpoint);

  Result<LayerTimes> times(const std::vector<bench::TunedProblem>& table) const {
    return layer_times(
        checkpoint, spec, format::Pattern::unstructured(),
        [](const std::string& name) { return name.find("_proj") != std::string::npos; },
        bench::SpeedTable(table));
  }
  std::vector<std::string> pruned() const {
    std::vector<std::string> names;
    for (const auto& weight : spec.block_weights()) names.push_back(weight.name);
    return names;
  }
};

TEST(LayerTimes, NameWhatWasNotMeasuredAndTakeTheirShareOfAProduct) {
  const Demo demo;
  const auto missing = demo.times({});
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code, Code::kNotPossible);
  const auto problems = named_problems(missing.error().message);
  EXPECT_EQ(problems.size(), 4 * 4 + 1u) << "four products at four shares of zeros, and the head";
  const auto times = demo.times(table_of(problems));
  ASSERT_TRUE(times.ok()) << times.error().message;
  const double head = static_cast<double>(demo.spec.vocab * demo.spec.hidden) / 1e6;
  EXPECT_NEAR(times->others, head, 1e-9);
  for (const auto& weight : demo.spec.block_weights()) {
    const double whole = static_cast<double>(weight.linear.out * weight.linear.in) / 1e6;
    for (const double sparsity : {0.3, 0.62, 0.9})
      EXPECT_NEAR(*times->pruned(weight.name, sparsity), whole * (1 - 0.8 * sparsity),
                  0.005 * whole)
          << weight.name << " " << sparsity;
  }
}

TEST(PredictedMilliseconds, NameAllThatWasNotMeasuredAtOnce) {
  const Demo demo;
  const auto decoder =
      load_decoder(demo.folder, {.device = "cpu", .dtype = "float32", .threads = 1});
  ASSERT_TRUE(decoder.ok()) << decoder.error().message;
  const auto missing = predicted_milliseconds(*decoder, bench::SpeedTable({}));
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.error().code, Code::kNotPossible);
  const auto problems = named_problems(missing.error().message);
  EXPECT_EQ(problems.size(), 5u) << "q with k and v, o, gate with up, down, the head";
  const auto time = predicted_milliseconds(*decoder, bench::SpeedTable(table_of(problems)));
  ASSERT_TRUE(time.ok()) << time.error().message;
  double weights = static_cast<double>(demo.spec.vocab * demo.spec.hidden);
  for (const auto& weight : demo.spec.block_weights())
    weights += static_cast<double>(weight.linear.out * weight.linear.in);
  EXPECT_NEAR(*time, weights / 1e6, 1e-9) << "each product once";
}

TEST(LayerTimes, ABudgetOfTimeIsMetByTheTableOfTheMachine) {
  const fs::path scratch = lacuna::testing::scratch_folder("tpot");
  const Variable cache("XDG_CACHE_HOME", scratch.string()), tune("LACUNA_TUNE", "on");
  const Demo demo;
  std::ofstream(scratch / "ids.json") << "[[5, 6, 7, 8, 9, 10, 11, 12], [3, 1, 4, 1, 5, 9, 2, 6]]";
  PruneJob job{.model = demo.folder, .out = scratch / "out"};
  job.calibration_ids = scratch / "ids.json";
  job.options.method = "wanda";
  job.options.allocation = {.by = prune::Allocation::kCurves,
                            .budget = *prune::Budget::parse("tpot=1us")};
  job.choice = {.device = "cpu", .dtype = "float32"};
  EXPECT_THAT(prune(job).error().message, HasSubstr("no times were measured"));
  const auto table = table_of(named_problems(demo.times({}).error().message));
  ASSERT_TRUE(bench::add_tuned(*bench::tune_file(), table).ok());
  EXPECT_THAT(prune(job).error().message, HasSubstr("out of reach"));

  const auto times = demo.times(table);
  ASSERT_TRUE(times.ok()) << times.error().message;
  const auto sum_at = [&](const auto& sparsity_of) {
    double sum = times->others;
    for (const std::string& name : demo.pruned()) sum += *times->pruned(name, sparsity_of(name));
    return sum;
  };
  const double asked = sum_at([](const std::string&) { return 0.6; });
  job.options.allocation.budget = prune::Budget::parse(fmt::format("tpot={}ms", asked)).value();
  const auto report = prune(job);
  ASSERT_TRUE(report.ok()) << report.error().message;
  std::map<std::string, double> reached;
  for (const auto& layer : report->layers) reached[layer.name] = layer.sparsity;
  EXPECT_NEAR(sum_at([&](const std::string& name) { return reached.at(name); }), asked,
              0.002 * asked);
  const auto [least, most] = std::minmax_element(
      reached.begin(), reached.end(),
      [](const auto& one, const auto& other) { return one.second < other.second; });
  EXPECT_LT(least->second + 0.05, most->second) << "curves give some more than others";
}

}  // namespace
}  // namespace lacuna::api
