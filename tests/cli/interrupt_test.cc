// What a signal at any moment leaves behind.
#include <fmt/format.h>

#include <fstream>

#include "cli/run_tool.h"

namespace lacuna::testing {
namespace {
using ::testing::AllOf;
using ::testing::HasSubstr;

/// A SparseGPT run of a second or two, into `out`.
std::string prune_into(const fs::path& out, const std::string& flags = "") {
  static const fs::path text = [] {
    fs::path file = scratch_folder("calibration") / "text.txt";
    std::ofstream(file) << some_text(3000);
    return file;
  }();
  return fmt::format(
      "prune {} -o {} --pattern 2:4 --calibration {} --samples 16 --length 128 --threads 1 {}",
      demo_model(), out.string(), text.string(), flags);
}

TEST(Interrupt, APruneThatWasStoppedTwiceEndsInTheSameBytes) {
  const fs::path folder = scratch_folder("resume"), out = folder / "out";
  const fs::path journal = folder / "out.journal";
  const auto finished = [&](int block) {
    return fs::exists(journal / fmt::format("block-{:03}.safetensors", block));
  };

  Process polite(prune_into(out));
  ASSERT_TRUE(polite.until([&] { return finished(0); }));
  polite.send(SIGINT);
  const Output stopped = polite.wait();
  EXPECT_EQ(stopped.code, 130) << stopped.err;
  EXPECT_EQ(stopped.out, "");
  EXPECT_THAT(stopped.err, AllOf(HasSubstr("finished blocks are kept"), HasSubstr("--resume")));
  EXPECT_FALSE(fs::exists(out));
  EXPECT_TRUE(finished(0));
  EXPECT_FALSE(finished(5)) << "it stopped before the end";

  const Output other = lacuna_tool(prune_into(out, "--resume --damping 0.02"));
  EXPECT_EQ(other.code, 3) << "the journal is of another run";
  EXPECT_THAT(other.err, AllOf(HasSubstr("belongs to another run"), HasSubstr("damping")));

  Process killed(prune_into(out, "--resume"));
  ASSERT_TRUE(killed.until([&] { return finished(3); }));
  killed.send(SIGKILL);
  const Output cut = killed.wait();
  EXPECT_EQ(cut.code, 137);
  EXPECT_THAT(cut.err, HasSubstr("of 6 blocks are finished"));
  EXPECT_FALSE(fs::exists(out));

  const json resumed = done(prune_into(out, "--resume --json -q")).report();
  EXPECT_EQ(resumed["layers"].size(), 42u) << "also those of the runs before";
  EXPECT_FALSE(fs::exists(journal));

  const fs::path whole = folder / "whole";
  const json at_once = done(prune_into(whole, "--resume --json -q")).report();  // starts afresh
  for (const char* file : {"model.safetensors", "checksums.json", "config.json"})
    EXPECT_EQ(bytes_of(out / file), bytes_of(whole / file)) << file;
  for (size_t i = 0; i < 42; ++i) {
    EXPECT_EQ(resumed["layers"][i]["name"], at_once["layers"][i]["name"]);
    EXPECT_EQ(resumed["layers"][i]["error"], at_once["layers"][i]["error"]);
    EXPECT_GT(at_once["layers"][i]["error"], 0.0);
    EXPECT_LT(at_once["layers"][i]["error"], 0.9);
  }
}

TEST(Interrupt, AnAnswerThatIsCutOffIsStillPrinted) {
  const std::string endless = "generate " + demo_model() +
                              " --prompt 'The history' --max-new-tokens 2000 --ignore-eos "
                              "--threads 1 --device cpu";
  Process run(endless);
  ASSERT_TRUE(run.until([&] { return run.out().size() > 20; })) << "the answer streams";
  run.send(SIGINT);
  const Output output = run.wait();
  EXPECT_EQ(output.code, 130) << output.err;
  EXPECT_THAT(output.err, HasSubstr("interrupted"));
  EXPECT_EQ(output.out.back(), '\n');
}

TEST(Interrupt, AVerbThatKeepsNothingEndsAtOnce) {
  const fs::path folder = scratch_folder("interrupt");
  std::ofstream(folder / "text.txt") << some_text(200000);
  Process run(fmt::format("eval {} --text {} --length 512 --threads 1", demo_model(),
                          (folder / "text.txt").string()));
  std::this_thread::sleep_for(std::chrono::seconds(1));
  run.send(SIGINT);
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(run.wait().code, 130);
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

}  // namespace
}  // namespace lacuna::testing
