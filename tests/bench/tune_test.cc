// The measured table: how a winner is found, kept, read back, and refused when it isn't ours.
#include "lacuna/bench/tune.h"

#include <gmock/gmock.h>

#include <cstdlib>
#include <fstream>

#include "lacuna/io/file.h"
#include "lacuna/kernels/linear_dense/linear_dense.h"
#include "lacuna/kernels/measured.h"
#include "model/models.h"
#include "support/data.h"

namespace lacuna::bench {
namespace {
namespace fs = std::filesystem;
using kernels::Problem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using testing::must;

TunedProblem tuned(const char* problem, const char* candidate) {
  return {.problem = must(Problem::parse(problem)),
          .candidate = candidate,
          .order = "cpu_portable",
          .us = 12.5,
          .gain = 1.25,
          .threads = 2};
}

/// A cache folder of its own, and LACUNA_TUNE unset.
class Tune : public ::testing::Test {
 protected:
  void SetUp() override {
    folder_ = testing::scratch_folder("tune");
    setenv("XDG_CACHE_HOME", folder_.c_str(), 1);
    unsetenv("LACUNA_TUNE");
    file_ = must(tune_file());
  }
  void TearDown() override {
    unsetenv("XDG_CACHE_HOME");
    unsetenv("LACUNA_TUNE");
    kernels::set_measured_winners({});
  }
  void write(const std::string& text) const {
    fs::create_directories(file_.parent_path());
    std::ofstream(file_) << text;
  }
  /// Candidates of the list that takes this problem.
  static std::string chosen(const char* problem) {
    return must(kernels::linear_dense::plan(must(Problem::parse(problem)))).candidate->name;
  }
  fs::path folder_, file_;
};

TEST_F(Tune, findsACandidateOfTheList) {
  const auto best =
      must(tune(must(Problem::parse("linear_dense:f32:64x64x2")), CompareOptions::quick()));
  EXPECT_NE(kernels::linear_dense::candidates().find(best.candidate), nullptr);
  EXPECT_EQ(best.order, chosen("linear_dense:f32:64x64x2"));
  EXPECT_GT(best.us, 0);
  EXPECT_GE(best.gain, 1);
  EXPECT_GE(best.threads, 1);
}

TEST_F(Tune, saysWhyThereIsNothingToTime) {
  const auto many =
      tune(must(Problem::parse("linear_dense:f32:64x64x17")), CompareOptions::quick());
  ASSERT_FALSE(many.ok());
  EXPECT_EQ(many.error().code, Code::kNotPossible);
  EXPECT_THAT(many.error().message, HasSubstr("at most 16 tokens"));
}

TEST_F(Tune, keepsAndReplacesWinners) {
  EXPECT_EQ(file_.parent_path(), folder_ / "lacuna");
  EXPECT_EQ(file_.filename().string().substr(0, 5), "tune-");
  must(add_tuned(file_, {tuned("linear_dense:f32:64x64x1", "cpu_portable"),
                         tuned("linear_dense:f32:64x64x2", "cpu_portable")}));
  must(add_tuned(file_, {tuned("linear_dense:f32:64x64x1", "cpu_avx2_fma")}));
  const auto table = must(read_tuned(file_));
  ASSERT_EQ(table.size(), 2u);
  EXPECT_EQ(table[0].problem.text(), "linear_dense:f32:64x64x2");
  EXPECT_EQ(table[1].candidate, "cpu_avx2_fma");
  EXPECT_EQ(table[1].us, 12.5);
  EXPECT_EQ(table[1].gain, 1.25);
  EXPECT_EQ(table[1].threads, 2);
  size_t files = 0;
  for ([[maybe_unused]] const auto& entry : fs::directory_iterator(file_.parent_path())) ++files;
  EXPECT_EQ(files, 1u) << "nothing temporary stays";
}

TEST_F(Tune, whatCannotBeWrittenLeavesTheOldTable) {
  must(add_tuned(file_, {tuned("linear_dense:f32:64x64x1", "cpu_portable")}));
  const std::string before = must(io::read_text(file_));
  // A folder where the cache should be.
  const fs::path blocked = folder_ / "blocked";
  std::ofstream(blocked) << "a file";
  const Status status =
      add_tuned(blocked / "lacuna" / "tune.json", {tuned("linear_dense:f32:1x1x1", "x")});
  ASSERT_FALSE(status.ok());
  EXPECT_THAT(status.error().message, HasSubstr("blocked"));
  EXPECT_EQ(must(io::read_text(file_)), before);
}

TEST_F(Tune, theTableChangesTheChoice) {
  const std::string own = chosen("linear_dense:f32:64x64x1");
  ASSERT_NE(own, "cpu_portable") << "this test needs a CPU with AVX2";
  EXPECT_EQ(use_tuned().problems, 0u) << "no table yet";
  must(add_tuned(file_, {tuned("linear_dense:f32:64x64x1", "cpu_portable")}));
  const TunedUse use = use_tuned();
  EXPECT_EQ(use.problems, 1u);
  EXPECT_EQ(use.remark, "");
  EXPECT_THAT(use.state, HasSubstr(file_.string()));
  EXPECT_EQ(chosen("linear_dense:f32:64x64x1"), "cpu_portable");
  EXPECT_EQ(chosen("linear_dense:f32:64x64x2"), own);
  setenv("LACUNA_TUNE", "off", 1);
  EXPECT_THAT(use_tuned().state, HasSubstr("off"));
  EXPECT_EQ(chosen("linear_dense:f32:64x64x1"), own);
}

TEST_F(Tune, aTableThatIsNotOursIsIgnoredWithAMessage) {
  const std::string own = chosen("linear_dense:f32:64x64x1");
  must(add_tuned(file_, {tuned("linear_dense:f32:64x64x1", "cpu_portable")}));
  const std::string good = must(io::read_text(file_));
  const auto changed = [&](const std::string& from, const std::string& to) {
    std::string text = good;
    const size_t at = text.find(from);
    EXPECT_NE(at, std::string::npos) << from;
    return text.replace(at, from.size(), to);
  };
  const std::pair<std::string, const char*> tables[] = {
      {"", "no measured table"},
      {"{\"lacuna_tune\"", "no measured table"},
      {good.substr(0, good.size() / 2), "no measured table"},
      {"[1, 2]", "no measured table"},
      {changed("\"lacuna_tune\": 1", "\"lacuna_tune\": 2"), "unknown version"},
      {changed(TuneKey::here().cpu, "Another CPU"), "Another CPU"},
      {changed(TuneKey::here().version, "0.0.1"), "0.0.1"},
      {changed("linear_dense:f32:64x64x1", "nonsense"), "entry 0"},
      {changed("\"candidate\": \"cpu_portable\"", "\"candidate\": 5"), "no measured table"},
      {changed("\"candidate\"", "\"kandidat\""), "candidate"},
  };
  for (const auto& [text, message] : tables) {
    write(text);
    const TunedUse use = use_tuned();
    EXPECT_EQ(use.problems, 0u) << text;
    EXPECT_THAT(use.remark, AllOf(HasSubstr(message), HasSubstr(file_.string()),
                                  HasSubstr("run `lacuna tune` again")))
        << text;
    EXPECT_EQ(chosen("linear_dense:f32:64x64x1"), own);
  }
  // Measuring again puts a sound table in its place.
  must(add_tuned(file_, {tuned("linear_dense:f32:64x64x1", "cpu_portable")}));
  EXPECT_EQ(use_tuned().problems, 1u);
}

TEST_F(Tune, eachCpuAndVersionHasItsOwnFile) {
  const TuneKey here = TuneKey::here();
  EXPECT_NE(must(tune_file({here.cpu, "9.9.9"})), file_);
  EXPECT_NE(must(tune_file({"another", here.version})), file_);
  unsetenv("XDG_CACHE_HOME");
  const char* home = std::getenv("HOME");
  const std::string kept = home != nullptr ? home : "";
  setenv("HOME", "/somewhere", 1);
  EXPECT_EQ(must(tune_file()).parent_path(), "/somewhere/.cache/lacuna");
  unsetenv("HOME");
  EXPECT_FALSE(tune_file().ok());
  if (!kept.empty()) setenv("HOME", kept.c_str(), 1);
}

}  // namespace
}  // namespace lacuna::bench
